"""Clients that vanish, that read slowly, and servers that end under load; on the fake runner."""

import json
import socket
import threading
import time
import types

import pytest

from mos_jax import EngineOptions
from mos_jax.serving.http.options import Limits
from tests.serving.fixtures_tenants import LORA, tenants_in
from tests.serving.http.fixtures_http import ALL, fake_server, keyring, raw, wait_for

OPTIONS = EngineOptions(rows=2, length=4096, pieces=(64, 512), queue=200, tenant_queue=200)
# A gate that opens by itself, a step at a time.
SLOWLY = types.SimpleNamespace(acquire=lambda: time.sleep(0.02))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tenants")
    tenants_in(folder, anna=LORA, ben=LORA)
    return folder, keyring(tmp_path_factory.mktemp("keys"))


@pytest.fixture
def live(made):
    limits = Limits(write_seconds=0.5, body_seconds=0.5, drain_seconds=300)
    with fake_server(*made, options=OPTIONS, limits=limits) as live:
        yield live


def send(connection, **fields):
    body = json.dumps({"model": "anna", "prompt": "a", "max_tokens": 4000, **fields}).encode()
    connection.sendall(
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {ALL}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        + body
    )


def is_empty(live):
    summary = live.service.engine.summary()
    return summary["open"] == 0 and not live.runner.row


def reasons(live):
    found = live.service.metrics.registry.get_sample_value
    return {
        reason: found("mos_answers_total", {"reason": reason}) or 0
        for reason in ("stop", "length", "cancelled", "timeout", "error")
    }


@pytest.mark.parametrize("stream", [True, False])
def test_one_who_vanishes_frees_the_row(live, stream):
    live.runner.gate = SLOWLY
    connections = [raw(live) for _ in range(4)]  # two in rows, two waiting
    for connection in connections:
        send(connection, stream=stream)
    wait_for(lambda: live.service.engine.summary()["open"] == 4 and len(live.runner.row) == 2)
    for connection in connections:
        connection.close()
    wait_for(lambda: is_empty(live))
    assert reasons(live)["cancelled"] == 4
    sample = live.service.metrics.registry.get_sample_value
    labels = {"route": "/v1/completions", "status": "499"}
    wait_for(lambda: sample("mos_http_requests_total", labels) == 4)
    live.runner.gate = None
    assert live.chat(max_tokens=3).status_code == 200


def test_one_who_reads_nothing_holds_up_nobody_and_is_given_up(live):
    listening = live.server.servers[0].sockets[0]
    # What connections inherit: buffers that some chunks fill.
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
        slow.connect(live.server.address)
        send(slow, stream=True, n=2, max_tokens=3000)
        sample = live.service.metrics.registry.get_sample_value
        labels = {"route": "/v1/completions", "status": "499"}
        wait_for(lambda: live.runner.row)
        assert live.chat(max_tokens=3).status_code == 200
        wait_for(lambda: sample("mos_http_requests_total", labels) == 1)
        wait_for(lambda: is_empty(live))
        # The server drops the connection, though nobody empties its buffer.
        wait_for(lambda: not live.server.server_state.connections)
        assert slow.recv(100).startswith(b"HTTP/1.1 200 ")


def test_too_many_connections_are_told_in_the_same_form(made):
    with fake_server(*made, limits=Limits(connections=3)) as live:
        sample = live.service.metrics.registry.get_sample_value
        assert live.chat(max_tokens=2).status_code == 200
        idle = [raw(live) for _ in range(3)]
        wait_for(lambda: live.service.connections() >= 3)
        answer = live.chat(max_tokens=2)
        assert answer.status_code == 503
        error = answer.json()["error"]
        assert (error["type"], error["code"]) == ("server_error", "busy")
        assert int(answer.headers["Retry-After"]) >= 1
        assert answer.headers["Connection"] == "close"
        assert sample("mos_http_requests_total", {"route": "none", "status": "503"}) == 1
        with live.client(None) as client:  # or whoever watches it would restart it
            assert client.get("/health/live").status_code == 200
        for connection in idle:
            connection.close()
        wait_for(lambda: live.service.connections() == 0)
        assert live.chat(max_tokens=2).status_code == 200


def test_the_first_signal_lets_open_answers_end(live):
    live.runner.gate = threading.Semaphore(0)
    found = []
    asked = [
        threading.Thread(target=lambda: found.append(live.chat(max_tokens=20))) for _ in range(6)
    ]
    for thread in asked:
        thread.start()
    wait_for(lambda: live.service.engine.summary()["open"] == 6)
    live.server.stop()
    with live.client() as client:
        wait_for(lambda: client.get("/health").json() == {"status": "draining"})
        assert client.get("/health/live").status_code == 200
        late = live.chat()
        assert (late.status_code, late.json()["error"]["code"]) == (503, "draining")
        assert int(late.headers["Retry-After"]) >= 1
    assert found == []
    live.runner.gate.release(100_000)
    for thread in asked:
        thread.join(60)
    assert [answer.status_code for answer in found] == [200] * 6
    assert all(answer.json()["usage"]["completion_tokens"] == 20 for answer in found)


def test_the_second_signal_ends_them_with_an_error(live):
    live.runner.gate = SLOWLY
    found = []
    asked = threading.Thread(target=lambda: found.append(live.chat(max_tokens=4000)))
    asked.start()
    wait_for(lambda: live.runner.row)
    live.server.stop()
    live.server.stop()
    asked.join(60)
    assert [answer.status_code for answer in found] == [503]
    assert found[0].json()["error"]["code"] == "closing"
