"""A server process on the tiny base, and what befalls it: full disks, folders that go, SIGTERM."""

import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import jax
import pytest

from experiments.bench.tenant_folders import write_tenants
from mos_jax import MoSConfig, create_adapter, load_base, save_adapter
from mos_jax.serving.engine import Engine
from mos_jax.serving.engine_options import EngineOptions
from mos_jax.serving.options import BankOptions
from mos_jax.serving.requests import Request, TokenSampling
from mos_jax.serving.tenants import TenantBank
from tests.experiments.fixtures_programs import ROOT

MOS = MoSConfig(equivalent_rank=2, rank=3, shards_per_vector=2, private_rank=1)
FLAGS = ("--base=tiny-random", "--rows=4", "--length=96", "--slots=4", "--drain=60")


@pytest.fixture(scope="module")
def base():
    return load_base("tiny-random")


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture
def server(tmp_path, base):
    """A process whose every line of output finds the disk full; yields it, a client, its folder."""
    folder = tmp_path / "tenants"
    write_tenants(folder, base, MOS, 6, size=0.1)
    port = free_port()
    with open("/dev/full", "w") as full:
        process = subprocess.Popen(
            [
                sys.executable,
                "experiments/serve.py",
                *FLAGS,
                f"--adapters={folder}",
                f"--port={port}",
            ],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=full,
            stderr=full,
        )
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
        try:
            until_it_answers(process, client)
            yield process, client, folder
        finally:
            process.kill()
            process.wait(60)


def until_it_answers(process, client):
    end = time.monotonic() + 240
    while time.monotonic() < end:
        assert process.poll() is None, f"the server ended with status {process.returncode}"
        try:
            if client.get("/health").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise AssertionError("the server did not answer within four minutes")


def body(model, **fields):
    return {"model": model, "prompt": "Once", "max_tokens": 8, "temperature": 0, **fields}


def answer(client, model):
    found = client.post("/v1/completions", json=body(model))
    assert found.status_code == 200, found.text
    return found.json()["choices"][0]["text"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_full_disks_lost_folders_and_sigterm_under_load(server):
    process, client, folder = server
    before = answer(client, "t0000")
    # Of a tenant on the device nothing is needed any more; one that is not cannot come.
    shutil.rmtree(folder / "t0000")
    shutil.rmtree(folder / "t0001")
    # As a full disk leaves a file that was being copied.
    arrays = folder / "t0002" / "adapter.safetensors"
    arrays.write_bytes(arrays.read_bytes()[:1000])
    assert answer(client, "t0000") == before
    for name in ("t0001", "t0002"):
        failed = client.post("/v1/completions", json=body(name))
        assert failed.status_code >= 400
        assert failed.json()["error"]["message"]
        assert str(folder) not in failed.text  # whoever asks learns nothing of the disk
    assert answer(client, "t0000") == before
    assert client.get("/health").status_code == 200

    outcomes, stop = [], threading.Event()
    threads = [
        threading.Thread(target=keep_asking, args=(client.base_url, number, outcomes, stop))
        for number in range(8)
    ]
    for thread in threads:
        thread.start()
    wait_for(lambda: len(outcomes) >= 8)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 0
    stop.set()
    for thread in threads:
        thread.join(60)
    assert "torn" not in outcomes
    assert outcomes.count("answered") >= 8


def keep_asking(url, number, outcomes, stop):
    """Streams answers until the server is gone; notes how each ended."""
    with httpx.Client(base_url=url, timeout=120) as client:
        while not stop.is_set():
            fields = body(f"t000{3 + number % 3}", max_tokens=60, stream=True)
            accepted = False
            try:
                with client.stream("POST", "/v1/completions", json=fields) as response:
                    if response.status_code != 200:
                        outcomes.append("refused")
                        stop.wait(0.05)
                        continue
                    accepted = True
                    lines = [line for line in response.iter_lines() if line]
            except (httpx.ConnectError, httpx.RemoteProtocolError, httpx.ReadError):
                # The process listens no more. A stream that breaks off is another thing.
                outcomes.append("torn" if accepted else "gone")
                return
            ended = lines and (lines[-1] == "data: [DONE]" or "error" in lines[-1])
            outcomes.append("answered" if ended else "torn")


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_disk_that_is_full_leaves_the_adapter_that_is_served(tmp_path, base, monkeypatch):
    (name,) = write_tenants(tmp_path, base, MOS, 1, size=0.1)
    card = json.loads((tmp_path / name / "adapter.json").read_text())
    newer = create_adapter(MOS, base.sites, jax.random.key(5))
    bank = TenantBank(base, BankOptions(slots=2, cached=2))
    bank.register(name, tmp_path / name)
    sizes = EngineOptions(rows=2, length=32, pieces=(8,))
    request = Request(name, (5, 6, 7), TokenSampling(max_tokens=6))
    with Engine(base, bank, sizes) as engine:
        synced, calls = os.fsync, []

        def full(descriptor):
            calls.append(descriptor)
            if len(calls) == 2:  # the arrays are there, the card does not fit
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            synced(descriptor)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(OSError, match="No space left"):
                save_adapter(tmp_path / name, newer, base_fingerprint=base.fingerprint)
        assert len(calls) == 2
        assert json.loads((tmp_path / name / "adapter.json").read_text()) == card
        assert [path.name for path in tmp_path.iterdir()] == [name]  # nothing is left lying about
        assert engine.complete(request).done.reason in ("stop", "length")
    bank.close()
