"""experiments/serve.py as an operator calls it: start, keys, memory, signals, what it prints."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading

import httpx
import openai
import pytest

from mos_jax import BankOptions, Engine, EngineOptions, InputError, TenantBank
from mos_jax.models.base import load_base
from mos_jax.serving.http.launch import Launch, plan, read_access, serve
from mos_jax.serving.memory_plan import plan_memory
from tests.experiments.fixtures_programs import ROOT, call
from tests.serving.http.fixtures_http import ADMIN, ALL, KEYS, real_folder, wait_for

SIZES = ("--base=tiny-random", "--port=0", "--rows=2", "--length=512")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tenants")
    real_folder(folder)
    (folder / "broken").mkdir()
    return folder


@contextlib.contextmanager
def program(*flags, **environment):
    """Starts the server; gives the process, its URL, and its lines as they come."""
    process = subprocess.Popen(
        [sys.executable, "experiments/serve.py", *map(str, flags)],
        cwd=ROOT,
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines, ready = [], threading.Event()

    def read():
        for line in process.stdout:
            lines.append(line)
            if line.startswith("http://"):
                ready.set()
        ready.set()

    reader = threading.Thread(target=read)
    reader.start()
    try:
        assert ready.wait(200)
        assert process.poll() is None, "".join(lines)
        yield process, re.search(r"^(http://\S+?)/ ", "".join(lines), re.MULTILINE)[1], lines
    finally:
        process.kill()
        process.wait()
        reader.join()
        process.stdout.close()


def test_from_start_to_sigterm_under_load(folder, tmp_path):
    keys = tmp_path / "keys.json"
    keys.write_text(json.dumps(KEYS))
    keys.chmod(0o644)
    secret = "key-of-the-environment"
    flags = (*SIZES, f"--adapters={folder}", f"--keys={keys}", "--drain=200")
    with program(*flags, MOS_JAX_API_KEYS=secret) as (process, url, lines):
        text = "".join(lines)
        assert "ready: tiny-random and 4 tenants (anna, ben, carl, dora), 2 rows of 512" in text
        assert "note: the adapter broken is refused: " in text
        assert "others on this machine may read" in text
        # The command that it shows is one.
        command = re.search(r"^  (curl .*\\\n.*)$", text, re.MULTILINE)[1]
        shown = re.search(r"-d '(.*)'", command)[1]
        answer = httpx.post(
            f"{url}/v1/chat/completions",
            content=shown,
            headers={"Authorization": f"Bearer {secret}", "Content-Type": "application/json"},
            timeout=60,
        )
        assert answer.status_code == 200
        for wrong in ("a-key-that-is-wrong-1234", "short"):
            headers = {"Authorization": f"Bearer {wrong}"}
            assert httpx.get(f"{url}/v1/models?key={wrong}", headers=headers).status_code == 401
        with openai.OpenAI(base_url=f"{url}/v1", api_key=ALL, max_retries=0) as client:
            streams = [
                client.completions.create(
                    model=model, prompt="a", max_tokens=480, stream=True, temperature=0
                )
                for model in ("anna", "ben", "tiny-random")
            ]
            first = [next(streams[0])]
            process.send_signal(signal.SIGTERM)
            wait_for(lambda: httpx.get(f"{url}/health").json() == {"status": "draining"})
            with pytest.raises(openai.InternalServerError, match="going down"):
                client.completions.create(model="anna", prompt="a", max_tokens=1)
            rest = [list(stream) for stream in streams]
        rest[0] = first + rest[0]
        assert all(chunks[-1].choices[0].finish_reason for chunks in rest)
        assert process.wait(200) == 0
    text = "".join(lines)
    assert "SIGTERM: draining" in text
    assert re.search(r"POST /v1/completions 200 \d+\.\d{3}s key=all", text)
    assert " GET none 401 " in text
    for key in (ALL, ADMIN, secret, "a-key-that-is-wrong-1234", "short"):
        assert key not in text
    assert "Traceback" not in text


def test_a_signal_while_it_compiles(folder):
    process = subprocess.Popen(
        [sys.executable, "experiments/serve.py", *SIZES, f"--adapters={folder}"],
        cwd=ROOT,
        env=os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"},
        stderr=subprocess.PIPE,
        text=True,
    )
    text = ""
    while "compiling" not in text:
        text += process.stderr.readline()
    process.send_signal(signal.SIGTERM)
    text += process.communicate(timeout=60)[1]
    assert process.returncode == 0, text
    assert "Traceback" not in text


def test_a_dry_run_shows_where_the_memory_goes(folder):
    flags = (f"--adapters={folder}", "--memory=64MiB", "--host_cache=0")
    out = call("serve", *SIZES, *flags, "--dry_run").stdout
    for words in ("- base", "- key-value cache", "- bank", "4 slots", "4 tenants are known"):
        assert words in out, words
    assert "refused: broken: " in out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--base=tiny-random", "--memory=lots"), "no number of bytes"),
        (("--base=tiny-random", "--host=0.0.0.0"), "give --keys or set MOS_JAX_API_KEYS"),
        (("--base=tiny-random", "--port=70000"), "port"),
    ],
    ids=range(3),
)
def test_bad_input_is_one_line_and_status_2(flags, words):
    done = call("serve", "--port=0", *flags, ok=False)
    assert done.returncode == 2, done.stdout + done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert words in last


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"base": "smollm"}, "unknown base 'smollm'"),
        ({"host": "no.such.host.invalid", "open": True}, "cannot listen on"),
        ({"memory": 1 << 18}, "too little memory"),
        ({"engine": EngineOptions(rows=2, length=513)}, "take --length=512 or less"),
        ({"keys": "nowhere.json"}, "nowhere.json"),
        ({"adapters": ("nowhere",)}, "nowhere is not a folder"),
        ({"base_id": "a b"}, "the name of a tenant"),
        ({"base_id": "anna", "adapters": None}, "both called 'anna'"),
        ({"memory": 1 << 21, "engine": EngineOptions(2, 64, (4096,))}, "too little memory"),
    ],
    ids=range(9),
)
def test_what_cannot_be_served_is_said_before_anything_runs(folder, fields, words):
    sizes = {"base": "tiny-random", "port": 0, "memory": 1 << 24, "bank": NO_HOST}
    fields = {**sizes, "engine": EngineOptions(rows=2, length=64), **fields}
    if fields.get("adapters", ()) is None:
        fields["adapters"] = (str(folder),)
    with pytest.raises(InputError, match=words):
        serve(Launch(**fields), {}, lambda line: None)


NO_HOST = BankOptions(cached=2, host_bytes=0)


def test_without_its_packages_it_says_what_to_install():
    code = (
        "import runpy, sys; sys.modules['uvicorn'] = None; sys.argv[1:] = ['--base=tiny-random']; "
        "runpy.run_path('experiments/serve.py', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == (
        "error: the server needs uvicorn; install the extra: pip install 'mos_jax[serve]', or make "
        "setup EXTRAS=serve\n"
    )


def test_help_is_enough_to_work_from():
    out = call("serve", "--help", ok=False).stdout
    assert "python experiments/serve.py --base=smollm2-135m-instruct --adapters=DIR" in out
    assert "--memory" in out


BANK = BankOptions(cached=2)


class TestMemory:
    OPTIONS = EngineOptions(rows=2, length=100, pieces=(16, 64))

    def bank(self, folder, **options):
        bank = TenantBank(load_base("tiny-random"), BankOptions(cached=2, **options))
        bank.register_folder(folder)
        return bank

    @pytest.mark.parametrize("assembly", ["cached", "inside"])
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_the_bank_takes_what_was_planned(self, folder, assembly, dtype):
        bank = self.bank(folder, slots=3, assembly=assembly, dtype=dtype)
        planned = bank.planned_bytes(3)
        bank.open()
        assert bank.nbytes == planned

    def test_as_many_slots_as_fit(self, folder):
        bank, config = self.bank(folder, host_bytes=0), load_base("tiny-random").config
        each = bank.planned_bytes(2) - bank.planned_bytes(1)

        def planned(memory, slots=None):
            return plan_memory(
                config, "float32", None, bank, self.OPTIONS,
                memory=memory, reserve=0.0, slots=slots,
            )  # fmt: skip

        plenty = planned(1 << 30)
        assert plenty.slots == 4  # all that are known
        assert planned(plenty.total).slots == 4
        assert planned(plenty.total - 1).slots == 3
        assert planned(plenty.total - 3 * each).slots == 1
        with pytest.raises(InputError, match="too little memory"):
            planned(plenty.total - 3 * each - 1)
        with pytest.raises(InputError, match="too little memory"):
            planned(plenty.total, slots=5)

    def test_the_whole_plan_is_what_engine_and_base_hold(self, folder):
        launch = Launch("tiny-random", (str(folder),), engine=self.OPTIONS, bank=BANK, slots=3)
        found, refused = plan(launch)
        assert set(refused) == {"broken"}
        held = found.total - launch.bank.host_bytes
        base = load_base("tiny-random")
        bank = self.bank(folder, slots=3)
        bank.open()
        weights = sum(weight.nbytes for weight in base.model.weights.values())
        engine = Engine(base, bank, self.OPTIONS)
        # The token of each row is beside the cache.
        assert abs(weights + engine.nbytes - held) <= 4 * self.OPTIONS.rows


class TestAccess:
    def test_without_keys_others_get_in_only_where_it_is_meant(self):
        for host in ("127.0.0.1", "localhost", "::1"):
            _, notes = read_access(Launch("x", host=host), {})
            assert "there are no keys: whoever reaches the server may ask" in notes
        for host in ("0.0.0.0", "::", "192.168.0.1", "example.org"):
            with pytest.raises(InputError, match="give --keys"):
                read_access(Launch("x", host=host), {})
            assert read_access(Launch("x", host=host, open=True), {})[0].keys == ()
            read_access(Launch("x", host=host), {"MOS_JAX_API_KEYS": ALL})

    def test_notes_name_what_cannot_be_done(self):
        _, notes = read_access(Launch("x"), {"MOS_JAX_ADMIN_KEYS": ADMIN})
        assert notes == ["no key may use any model; give --keys or set MOS_JAX_API_KEYS"]
