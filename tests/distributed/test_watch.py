"""Who is missed, who says what, and where processes differ: without any process but this one."""

import json
import random
import threading
import time

import jax
import pytest

from mos_jax import InputError
from mos_jax.distributed import agreement
from mos_jax.distributed.agreement import agree_to_stop, describe_differences
from mos_jax.distributed.hosts import Meeting, find_meeting
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


@pytest.mark.parametrize("environment", [MPI, SLURM | MPI], ids=["alone", "in_slurm"])
def test_processes_of_open_mpi_5_do_not_each_train_for_themselves(environment):
    words = (
        r"OMPI_COMM_WORLD_SIZE=2 without .*; give --coordinator=host:port, --processes=\$OMPI_COMM_"
        r"WORLD_SIZE and --process_id=\$OMPI_COMM_WORLD_RANK, or --coordinator=none"
    )
    with pytest.raises(InputError, match=words):
        find_meeting("", None, None, environment)
    with pytest.raises(InputError, match="--processes=None must be 2 or more"):
        find_meeting(ADDRESS, None, None, environment)


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


def test_what_is_agreed_alone_is_not_even_made():
    agreement.agree("anything", lambda: json.loads("not JSON"))
