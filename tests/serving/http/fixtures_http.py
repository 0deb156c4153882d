"""A server in a thread of the tests, on the fake runner or on the tiny base."""

import contextlib
import dataclasses
import json
import socket
import threading
import time
import types

import httpx

from mos_jax import BankOptions, Engine, EngineOptions, TenantBank, load_base, save_adapter
from mos_jax.serving.http.keys import read_keys
from mos_jax.serving.http.metrics import Metrics
from mos_jax.serving.http.options import Limits
from mos_jax.serving.http.server import Server, listen
from mos_jax.serving.http.service import Service
from tests.models.fixtures_decoder import filled_adapter
from tests.serving.fixtures_serving import BASE, FakeRunner
from tests.serving.fixtures_tenants import DECODER, FINGERPRINT, LORA, MOS, bank_of

ALL = "key-for-all-models-1"
ANNA = "key-for-anna-alone-2"
TEAM = "key-for-the-a-team-3"
ADMIN = "key-for-the-admin-44"
KEYS = {
    "keys": [
        {"name": "all", "key": ALL, "models": ["*"]},
        {"name": "anna", "key": ANNA, "models": ["anna"]},
        {"name": "team", "key": TEAM, "models": ["a*", "tiny"]},
        {"name": "root", "key": ADMIN, "admin": True},
    ]
}
OPTIONS = EngineOptions(rows=4, length=64, pieces=(4, 8), queue=20, tenant_queue=12)
# A base as the fake runner has it, and what a server says of one.
NO_BASE = types.SimpleNamespace(
    tokenizer=BASE.tokenizer, config=BASE.config, sites=DECODER.sites, fingerprint=FINGERPRINT
)


@dataclasses.dataclass
class Live:
    """A server that answers."""

    url: str
    service: Service
    server: Server
    runner: FakeRunner | None

    def client(self, key=ALL, **options):
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60, **options)

    def chat(self, model="anna", content="Hello", key=ALL, **fields):
        with self.client(key) as client:
            body = {"model": model, "messages": [{"role": "user", "content": content}], **fields}
            return client.post("/v1/chat/completions", json=body)


def wait_for(condition, seconds=120.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def raw(live):
    """A plain connection to a server."""
    return socket.create_connection(live.server.address, timeout=60)


def keyring(folder, content=None):
    file = folder / "keys.json"
    file.write_text(json.dumps(KEYS if content is None else content))
    file.chmod(0o600)
    return read_keys(file, {})


@contextlib.contextmanager
def serving(engine, keys, *, roots=(), limits=None, base_id="tiny", runner=None, **service):
    """Serves an engine from a thread, on a free port, until the block ends."""
    metrics = Metrics(engine.summary, tenants=service.pop("tenant_figures", False))
    engine.observe(metrics)
    found = Service(engine, base_id, keys, limits or Limits(), metrics, roots, **service)
    server, ready = Server(found, engine, listen("127.0.0.1", 0)), threading.Event()
    host, port = server.address
    outcome = []

    def run():
        try:
            outcome.append(server.run_until_told(ready.set))
        finally:
            ready.set()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert ready.wait(280)
        yield Live(f"http://{host}:{port}", found, server, runner)
    finally:
        server.stop()
        server.stop()
        thread.join(60)
        assert not thread.is_alive()
        assert outcome


@contextlib.contextmanager
def fake_server(folder, keys, *, options=OPTIONS, **service):
    """A server of the tenants in a folder, whose runner is the fake one."""
    bank, _ = bank_of(folder, slots=4, cached=options.rows)
    runner = FakeRunner(options)
    engine = Engine(NO_BASE, bank, options, runner=runner)
    try:
        with serving(engine, keys, roots=[folder], runner=runner, **service) as live:
            yield live
    finally:
        bank.close()


def real_folder(folder):
    """Three tenants of MoS and one of LoRA for the tiny base; returns the base and the adapters."""
    base = load_base("tiny-random")
    made = {}
    for seed, (name, config) in enumerate(
        {"anna": MOS, "ben": MOS, "carl": MOS, "dora": LORA}.items()
    ):
        made[name] = filled_adapter(base.sites, config, seed)
        save_adapter(folder / name, made[name], base_fingerprint=base.fingerprint)
    return base, made


@contextlib.contextmanager
def real_server(folder, base, keys, **service):
    """A server of the tiny base and the tenants in a folder, all of it real."""
    bank = TenantBank(base, BankOptions(slots=4, cached=4))
    assert bank.register_folder(folder) == {}
    engine = Engine(base, bank, EngineOptions(rows=4, length=128, pieces=(16, 64)))
    try:
        with serving(engine, keys, roots=[folder], base_id="tiny-random", **service) as live:
            yield live
    finally:
        bank.close()
