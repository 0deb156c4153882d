"""Who is missed, who says what, and where processes differ: without any process but this one."""

import concurrent.futures
import contextlib
import json
import random
import signal
import threading
import time
import types

import jax
import pytest

from mos_jax import InputError, app
from mos_jax.distributed import agreement, hosts
from mos_jax.distributed.agreement import (
    agree_to_stop,
    agree_to_stop_at_the_end,
    describe_differences,
)
from mos_jax.distributed.meeting import Meeting, find_meeting, started_as_several
from mos_jax.distributed.watch import LOST, Lives, Watch

SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}
# Of Open MPI 5, and what it was told up to 4.
MPI = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}
MPI_ADDRESS = {"OMPI_MCA_orte_hnp_uri": "0.0;tcp://a:1"}
# Of MPICH and Intel MPI, and of MVAPICH.
PMI = {"PMI_SIZE": "2", "PMI_RANK": "1"}
MVAPICH = {"MV2_COMM_WORLD_SIZE": "2", "MV2_COMM_WORLD_RANK": "1"}
ADDRESS = "10.0.0.1:8476"


@pytest.mark.parametrize(
    ("flags", "environment", "meeting"),
    [
        (("", None, None), {}, None),
        (("", None, None), SLURM, Meeting(method="slurm")),
        (("", None, None), SLURM | {"SLURM_NTASKS": "1"}, None),
        # A step of one task in a job of several: srun -n1.
        (("", None, None), SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, None),
        # The script of a batch job is no step of it.
        (("", None, None), {k: v for k, v in SLURM.items() if "STEP" not in k}, None),
        (("none", None, None), SLURM, None),
        (("auto", None, None), {}, Meeting()),
        (("", None, None), {"TPU_WORKER_HOSTNAMES": "a,b"}, Meeting(method="gketpu")),
        (("", None, None), {"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        (("", None, None), MPI_ADDRESS | MPI, Meeting(method="ompi")),
        # mpirun starts its daemons with srun.
        (("", None, None), SLURM | MPI_ADDRESS | MPI, Meeting(method="ompi")),
        (("", None, None), MPI_ADDRESS | MPI | {"OMPI_COMM_WORLD_SIZE": "1"}, None),
        (("", None, None), {"OMPI_COMM_WORLD_SIZE": "1"}, None),
        (("none", None, None), MPI, None),
        (("auto", None, None), MPI, Meeting()),
        ((ADDRESS, 2, 1), MPI, Meeting(ADDRESS, 2, 1, "deactivate")),
        ((ADDRESS, 2, 1), PMI, Meeting(ADDRESS, 2, 1, "deactivate")),
        (("none", None, None), PMI, None),
        (("", None, None), {"PMI_SIZE": "1", "PMI_RANK": "0"}, None),
        # srun --mpi=pmi2 says it in both ways.
        (("", None, None), SLURM | PMI | {"PMI_RANK": "0"}, Meeting(method="slurm")),
        ((ADDRESS, 2, 1), SLURM, Meeting(ADDRESS, 2, 1, "deactivate")),
        ((ADDRESS, None, None), SLURM, Meeting(ADDRESS, method="slurm")),
    ],
)
def test_where_processes_meet(flags, environment, meeting):
    assert find_meeting(*flags, environment) == meeting


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("", 2, None), r"--processes=2 needs --coordinator=host:port"),
        (("auto", None, 1), r"--process_id=1 needs .*; got --coordinator='auto'"),
        (("10.0.0.1", 2, 0), r"--coordinator='10\.0\.0\.1' must be host:port, such as"),
        (("10.0.0.1:99999", 2, 0), r"must be host:port"),
        ((ADDRESS, None, 0), r"--processes=None must be 2 or more"),
        ((ADDRESS, 1, 0), r"--processes=1 must be 2 or more"),
        ((ADDRESS, 2, 2), r"--process_id=2 must be from 0 to 1 with --processes=2"),
        ((ADDRESS, 2, None), r"--process_id=None must be from 0 to 1"),
    ],
)
def test_flags_that_say_no_place_are_refused(flags, words):
    with pytest.raises(InputError, match=words):
        find_meeting(*flags, {})


@pytest.mark.parametrize(
    ("environment", "said", "size", "rank"),
    [
        (MPI, "without OMPI_MCA_orte_hnp_uri, as of Open MPI 5", *MPI),
        (SLURM | MPI, "without OMPI_MCA_orte_hnp_uri, as of Open MPI 5", *MPI),
        (PMI, "as of MPICH or Intel MPI", *PMI),
        # Two processes on each node, which mpirun began with a task of srun.
        (SLURM | PMI | {"PMI_SIZE": "2", "SLURM_NTASKS": "4"}, "as of MPICH", *PMI),
        (MVAPICH, "as of MVAPICH", *MVAPICH),
    ],
)
def test_processes_of_an_mpi_without_address_do_not_each_train_for_themselves(
    environment, said, size, rank
):
    words = (
        rf"{size}=2,? {said}.*; give --coordinator=host:port, --processes=\${size} and "
        rf"--process_id=\${rank}, or --coordinator=none"
    )
    with pytest.raises(InputError, match=words):
        find_meeting("", None, None, environment)
    with pytest.raises(InputError, match="--processes=None must be 2 or more"):
        find_meeting(ADDRESS, None, None, environment)


STEP_OF_ONE = SLURM | {"SLURM_STEP_NUM_TASKS": "1"}


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({}, None),
        (SLURM, "SLURM_NTASKS=2"),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "2"}, "SLURM_STEP_NUM_TASKS=2"),
        # The script of a job of several tasks, a shell of salloc, and srun -n1 or submitit's job.
        ({k: v for k, v in SLURM.items() if "STEP" not in k}, None),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2"}, None),
        (STEP_OF_ONE, None),
        (MPI, "OMPI_COMM_WORLD_SIZE=2"),
        (MPI | MPI_ADDRESS, "OMPI_COMM_WORLD_SIZE=2"),
        (MPI | {"OMPI_COMM_WORLD_SIZE": "1"}, None),
        (PMI, "PMI_SIZE=2"),
        (STEP_OF_ONE | PMI, "PMI_SIZE=2"),
        (MVAPICH, "MV2_COMM_WORLD_SIZE=2"),
    ],
)
def test_a_program_knows_whether_it_is_one_of_several(environment, told, monkeypatch):
    assert started_as_several(environment) == told
    for name in {**SLURM, **MPI, **PMI, **MVAPICH}:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(app.flags, "FLAGS", {})  # of a program without those of hosts
    monkeypatch.setattr("sys.argv", ["experiments/quickstart.py"])
    refused = pytest.raises(InputError, match=rf"quickstart\.py was .*\({told}\).*train\.py and ")
    with contextlib.nullcontext() if told is None else refused, app._together():
        pass
    monkeypatch.setenv(app.ALONE, "1")
    with app._together():
        pass


class Meets:
    """`jax.distributed` where nobody is met."""

    def __init__(self, monkeypatch, error, **state):
        self.error = error
        found = {"process_id": 0, "service": None, "coordinator_address": ADDRESS, **state}
        monkeypatch.setattr(hosts, "_state", lambda: types.SimpleNamespace(**found))
        monkeypatch.setattr(jax.distributed, "initialize", self.initialize)

    def initialize(self, *_args, **_kwargs):
        raise self.error


@pytest.mark.parametrize(
    ("error", "state", "words"),
    [
        (
            jax.errors.JaxRuntimeError("UNKNOWN: Failed to add port\nand more"),
            {},
            rf"^process 0 cannot open {ADDRESS} \(UNKNOWN: Failed to add port\); "
            "choose another port$",
        ),
        (
            jax.errors.JaxRuntimeError("ALREADY_EXISTS: a newer incarnation"),
            {"process_id": 1},
            rf"^process 1 cannot join the others at {ADDRESS} "
            r"\(ALREADY_EXISTS: a newer incarnation\); "
            "see that every process has a --process_id of its own",
        ),
        # It has opened its port, on a host that is not the one of the address.
        (
            jax.errors.JaxRuntimeError("ABORTED: a newer incarnation"),
            {"service": "there"},
            rf"^process 0 cannot join the others at {ADDRESS}",
        ),
        (
            RuntimeError("Failed to recognize coordinator address worker-0"),
            {},
            r"^JAX cannot find the other processes \(Failed to recognize .* worker-0\); .*metadata",
        ),
        (ConnectionError("no metadata server"), {}, r"cannot find .* \(no metadata server\)"),
        (ValueError("coordinator_address should be"), {}, r"JAX finds no other processes in this"),
    ],
    ids=["port", "other", "elsewhere", "detection", "metadata", "nothing"],
)
def test_processes_that_do_not_meet_say_why(error, state, words, monkeypatch):
    Meets(monkeypatch, error, **state)
    with pytest.raises(InputError, match=words):
        hosts._meet(Meeting(), 20.0, 60.0)


def test_a_program_that_meets_too_late_is_a_defect(monkeypatch):
    error = RuntimeError("jax.distributed.initialize() must be called before any JAX calls")
    Meets(monkeypatch, error)
    with pytest.raises(RuntimeError) as raised:
        hosts._meet(Meeting(), 20.0, 60.0)
    assert raised.value is error


def test_differences_are_named_by_field_with_values_and_processes():
    same = {"training": {"steps": 8, "seed": 0}, "mesh": {"fsdp": -1}}
    assert describe_differences({0: same, 1: same}) == ""
    other = {"training": {"steps": 9, "seed": 0}, "mesh": {"fsdp": -1, "data": 2}}
    assert describe_differences({0: same, 1: other, 2: same}) == (
        "mesh.data is missing in processes 0, 2 and 2 in process 1; "
        "training.steps is 8 in processes 0, 2 and 9 in process 1"
    )
    many = {number: {"a": number > 9} for number in range(12)}
    assert describe_differences(many) == (
        "a is False in processes 0, 1, 2, 3, 4, 5, 6, 7, ... and True in processes 10, 11"
    )


def test_a_process_is_missed_when_its_count_stands_still():
    lives = Lives([1, 2], silence=10.0, now=0.0)
    assert lives.observe({1: "1"}, 5.0) == []
    assert lives.observe({1: "2", 2: "1"}, 9.0) == []
    assert lives.observe({1: "2", 2: "2"}, 19.5) == [1]
    assert lives.observe({1: "3", 2: "2"}, 29.0) == []
    assert lives.observe({1: "3", 2: "2"}, 40.0) == [1, 2]


class Shared(dict):
    """A `Store` for threads; `broken`: what it raises."""

    broken = None
    gone = False

    def put(self, key, value):
        if self.broken:
            raise self.broken
        self[key] = value

    def entries(self, folder):
        if self.broken:
            raise self.broken
        found = {key: value for key, value in self.items() if key.startswith(f"{folder}/")}
        return {key.rpartition("/")[2]: value for key, value in found.items()}

    def is_gone(self):
        return self.gone


class Left(Exception):
    pass


def started(store, process, processes=2, silence=2.0):
    """A watch whose end is an entry in a list instead of the end of this process."""
    statuses, over = [], threading.Event()

    def leave(status):
        statuses.append(status)
        over.set()
        raise Left

    watch = Watch(store, process, processes, silence, leave)
    watch.start()
    return watch, statuses, over


@pytest.fixture(autouse=True)
def _harmless(monkeypatch):
    monkeypatch.setattr("mos_jax.distributed.watch._pause_before_aborting", lambda: None)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)  # of `Left`


def test_those_who_live_are_left_alone():
    store = Shared()
    watches = [started(store, number, silence=60.0) for number in range(2)]
    while any(int(store.get(f"alive/{number}", "0")) < 3 for number in range(2)):
        time.sleep(0.1)
    for watch, statuses, _ in watches:
        watch.stop()
        assert statuses == []


def test_the_first_process_tells_all_of_a_silent_one(capsys):
    store = Shared()
    watches = {number: started(store, number, processes=3) for number in (0, 2)}
    for _, statuses, over in watches.values():
        assert over.wait(60)
        assert statuses == [LOST]
    told = capsys.readouterr().err.splitlines()
    assert sorted(told) == [
        f"error: process 1 of 3 is lost: no sign of life for 2 s; process {number} ends with it. "
        "Start all processes again with the same command; the run goes on from its last checkpoint"
        for number in (0, 2)
    ]
    # The first one, which holds the store, left after the other had read.
    assert "read/2" in store


@pytest.mark.parametrize("how", ["raises", "refuses", "hangs"])
def test_a_lost_store_means_a_lost_first_process(capsys, how):
    store = Shared()
    _, statuses, over = started(store, 1)
    if how == "raises":
        store.broken = RuntimeError("UNAVAILABLE")
    else:
        store.gone = how == "refuses"
        hanging = threading.Event()
        store.put = lambda *_: hanging.wait(60)
    assert over.wait(60)
    assert statuses == [LOST]
    words = "no answer for 2 s" if how == "hangs" else "it does not answer"
    assert capsys.readouterr().err.startswith(f"error: process 0 of 2 is lost: {words}; process 1")
    if how == "hangs":
        hanging.set()


def test_an_end_is_told_with_its_words_and_its_status(capsys):
    store = Shared()
    first, statuses, _ = started(store, 0, silence=60.0)
    _, others, over = started(store, 1, silence=60.0)
    with pytest.raises(Left):
        first.end("--workdir is a file", 2)
    assert statuses == [2]
    assert over.wait(60)
    assert others == [2]
    assert capsys.readouterr().err.splitlines() == [
        "error: --workdir is a file",
        "error: process 0 of 2 ended: --workdir is a file",
    ]


class Client(dict):
    """The key-value store as JAX's client gives it."""

    def key_value_set(self, key, value):
        if key in self:
            raise jax.errors.JaxRuntimeError("ALREADY_EXISTS: it does")
        self[key] = value

    def key_value_dir_get(self, folder):
        return [(key, value) for key, value in self.items() if key.startswith(folder)]


@pytest.mark.parametrize(
    ("caught", "named", "found"),
    [
        ([None, None, None], None, None),
        ([None, signal.SIGTERM, None], None, signal.SIGTERM),
        # Asked for in a step, to stop after one that does not come.
        ([None, None, signal.SIGUSR1], f"9 {signal.SIGUSR1:d}", signal.SIGUSR1),
        ([signal.SIGINT, None, signal.SIGUSR1], f"9 {signal.SIGUSR1:d}", signal.SIGUSR1),
    ],
)
def test_a_signal_at_the_end_is_known_to_all(caught, named, found, monkeypatch):
    client = Client({"mos_jax/stop/first": named} if named else {})
    barrier = threading.Barrier(len(caught))
    monkeypatch.setattr(client, "wait_at_barrier", lambda *_: barrier.wait(60), raising=False)
    monkeypatch.setattr(jax, "process_count", lambda: len(caught))
    monkeypatch.setattr(agreement, "client", lambda: client)
    with concurrent.futures.ThreadPoolExecutor(len(caught)) as threads:
        assert list(threads.map(agree_to_stop_at_the_end, caught)) == [found] * len(caught)


@pytest.mark.parametrize("seed", range(20))
def test_all_processes_stop_after_one_step_whoever_is_asked_when(seed, monkeypatch):
    """Processes run as far apart as a training loop lets them: one has begun the step after."""
    draw = random.Random(seed)
    client, count = Client(), draw.randint(2, 5)
    monkeypatch.setattr(jax, "process_count", lambda: count)
    monkeypatch.setattr(agreement, "client", lambda: client)
    asked = {p: draw.randint(1, 12) for p in range(count) if p == 0 or draw.random() < 0.5}
    begun, stopped = dict.fromkeys(range(count), 0), {}
    # Whether a process has looked since it began its step; it first gets the metrics of the last.
    looked = dict.fromkeys(range(count), True)
    while len(stopped) < count:
        process = draw.choice([p for p in range(count) if p not in stopped])
        if looked[process]:
            begun[process] += 1
            looked[process] = False
        elif min(begun.values()) >= begun[process] - 1:
            step = begun[process]
            caught = 15 if step >= asked.get(process, 1 << 30) else None
            if agree_to_stop(step, caught) is not None:
                stopped[process] = step
                begun[process] = 1 << 30  # it waits for nobody
            looked[process] = True
    assert len(set(stopped.values())) == 1, stopped


def test_alone_a_signal_stops_at_once():
    assert agree_to_stop(3, 15) == 15
    assert agree_to_stop(3, None) is None
    assert agree_to_stop_at_the_end(15) == 15
    assert agree_to_stop_at_the_end(None) is None


def test_what_is_agreed_alone_is_not_even_made():
    agreement.agree("anything", lambda: json.loads("not JSON"))
