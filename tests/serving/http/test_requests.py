"""Bodies of all kinds, limits, and an engine that refuses; on the fake runner."""

import json
import re
import threading
import time
import types

import openai
import pytest
from pydantic import ValidationError

from mos_jax import EngineOptions
from mos_jax.serving.http.guard import PUBLIC
from mos_jax.serving.http.options import Limits
from mos_jax.serving.http.schemas import AdapterBody, ChatBody, CompletionBody
from tests.serving.fixtures_tenants import LORA, tenants_in
from tests.serving.http.fixtures_http import ADMIN, ALL, fake_server, keyring, raw, wait_for

LIMITS = Limits(body_bytes=4096, output_tokens=40, body_seconds=1.0)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tenants")
    tenants_in(folder, anna=LORA, ben=LORA)
    return folder, keyring(tmp_path_factory.mktemp("keys"))


@pytest.fixture(scope="module")
def live(made):
    with fake_server(*made, limits=LIMITS) as live:
        yield live


CHAT = {"model": "anna", "messages": [{"role": "user", "content": "Hello"}]}
TEXT = {"model": "anna", "prompt": "Hello"}


MANY = 10_000
UNKNOWN = {f"field{i}": 1 for i in range(MANY)}


def post(live, body, path=None, key=ALL):
    path = path or ("/v1/completions" if "prompt" in body else "/v1/chat/completions")
    with live.client(key) as client:
        return client.post(path, json=body)


class TestBodies:
    @pytest.mark.parametrize(
        "fields",
        [
            {"user": "someone", "metadata": {"a": "b"}, "service_tier": "auto"},
            {"tools": [], "tool_choice": "none", "parallel_tool_calls": True, "store": False},
            {"frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}},
            {"response_format": {"type": "text"}, "modalities": ["text"]},
            {"tools": None, "stop": None, "n": None, "audio": None, "seed": None, "stream": None},
            {"max_tokens": 3, "max_completion_tokens": 3},
            {"messages": [{"role": "developer", "content": [{"type": "text", "text": "x"}]}]},
            {"messages": [{"role": "assistant", "content": "x", "tool_calls": None}]},
        ],
        ids=range(8),
    )
    def test_what_changes_nothing_is_taken(self, live, fields):
        assert post(live, {**CHAT, **fields}).status_code == 200

    @pytest.mark.parametrize(
        ("fields", "words"),
        [
            ({"tools": [{"type": "function"}]}, "tools: .* not supported"),
            ({"response_format": {"type": "json_object"}}, "response_format: .* not supported"),
            ({"presence_penalty": 0.5}, "presence_penalty: .* not supported"),
            ({"frequency_penalty": -1}, "frequency_penalty: .* not supported"),
            ({"logit_bias": {"5": 1}}, "logit_bias: .* not supported"),
            ({"functions": []}, "'functions' is not supported"),
            ({"reasoning_effort": "low"}, "'reasoning_effort' is not supported"),
            ({"top_logprob": 3}, "there is no field 'top_logprob'; did you mean 'top_logprobs'"),
            ({"messages": []}, "messages: "),
            ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role: "),
            ({"messages": [{"role": "user"}]}, "content is missing"),
            ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0"),
            ({"messages": [{"role": "user", "content": "\ud800"}]}, "surrogate"),
            ({"model": ""}, "model: "),
            ({"model": "x" * 300}, "model: "),
            ({"model": "\ud800"}, "model: "),
            ({"max_tokens": 0}, "max_tokens: "),
            ({"max_tokens": "5"}, "max_tokens: "),
            ({"max_tokens": True}, "max_tokens: "),
            ({"max_tokens": 41}, "max_tokens: 41 is over this server's 40"),
            ({"max_tokens": 10**30}, "max_tokens: "),
            ({"max_tokens": 3, "max_completion_tokens": 4}, "differ"),
            ({"temperature": float("nan")}, "temperature: "),
            ({"temperature": float("inf")}, "temperature: "),
            ({"temperature": -0.1}, "temperature: "),
            ({"top_p": 0}, "top_p: "),
            ({"n": 17}, "n: "),
            ({"stop": [""]}, "stop"),
            ({"stop": ["a"] * 17}, "stop"),
            ({"seed": 1 << 70}, "seed: "),
            ({"top_logprobs": 3}, "needs logprobs"),
            ({"logprobs": True, "top_logprobs": 21}, "top_logprobs: "),
            ({"stream_options": {"x": 1}}, "no field 'x'"),
        ],
        ids=range(33),
    )
    def test_what_cannot_be_done_is_refused_by_name(self, live, fields, words):
        with live.client() as client:
            # Not httpx' own JSON, which knows neither NaN nor halves of surrogate pairs.
            answer = client.post(
                "/v1/chat/completions",
                content=json.dumps({**CHAT, **fields}),
                headers={"Content-Type": "application/json"},
            )
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert error["type"] == "invalid_request_error"
        assert re.search(words, error["message"]), error["message"]

    @pytest.mark.parametrize(
        "fields",
        [
            {"prompt": ""},
            {"prompt": []},
            {"prompt": [[]]},
            {"prompt": ["a", 1]},
            {"prompt": [-1]},
            {"prompt": [259]},
            {"prompt": [1 << 40]},
            {"prompt": {"a": 1}},
            {"prompt": ["a"] * 17},
            {"prompt": ["a"] * 9, "n": 2},
            {"best_of": 2},
            {"echo": True},
            {"suffix": "x"},
            {"logprobs": 21},
            {"messages": []},
        ],
        ids=range(15),
    )
    def test_of_completions_too(self, live, fields):
        answer = post(live, {**TEXT, **fields})
        assert (answer.status_code, answer.json()["error"]["type"]) == (
            400,
            "invalid_request_error",
        )

    @pytest.mark.parametrize(
        "content",
        [
            b"",
            b"null",
            b"[]",
            b'"x"',
            b"{",
            b"\xff\xfe",
            b"[" * 4000,
            b'{"model":' * 400,
            b'{"model": "anna", "prompt": "\\ud83d"}',
            b"1" * 4000,
        ],
        ids=range(10),
    )
    @pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/adapters"])
    def test_of_no_meaning(self, live, path, content):
        with live.client(ADMIN if "adapters" in path else ALL) as client:
            answer = client.post(
                path, content=content, headers={"Content-Type": "application/json"}
            )
        assert answer.status_code == 400
        assert answer.json()["error"]["message"]

    @pytest.mark.parametrize(
        ("model", "fields"),
        [
            (CompletionBody, {"prompt": [{}] * MANY}),
            (CompletionBody, {"prompt": [[]] * MANY}),
            (CompletionBody, {"prompt": [[{}] * MANY]}),
            (CompletionBody, {"prompt": [1, *[-1] * MANY]}),
            (CompletionBody, {"prompt": [1] * MANY + ["a"]}),
            (CompletionBody, {"stop": [1] * MANY}),
            (CompletionBody, {"logit_bias": {str(i): "x" for i in range(MANY)}}),
            (ChatBody, {"messages": [{}] * 4000}),
            (ChatBody, {"messages": [{"role": "user", "content": [{}] * MANY}]}),
            (ChatBody, {"messages": [{"role": "user", "content": [{}] * 9}] * 4000}),
            (ChatBody, {"messages": [{"role": "user", "content": "x", **UNKNOWN}]}),
            (ChatBody, {"modalities": ["x"] * MANY}),
            (ChatBody, {"tools": [1] * MANY}),
            (ChatBody, {"stream_options": UNKNOWN}),
            (ChatBody, {"response_format": UNKNOWN}),
            (ChatBody, UNKNOWN),
            (AdapterBody, UNKNOWN),
        ],
        ids=range(17),
    )
    def test_what_is_wrong_many_times_is_told_a_few_times(self, model, fields):
        sound = {CompletionBody: TEXT, ChatBody: CHAT, AdapterBody: {"name": "a"}}[model]
        model.model_validate(sound)
        with pytest.raises(ValidationError) as error:
            model.model_validate({**sound, **fields})
        assert error.value.error_count() <= 4


class TestLimits:
    def test_a_large_body(self, live):
        answer = post(live, {**TEXT, "prompt": "x" * 5000})
        assert answer.status_code == 413
        assert answer.json()["error"]["code"] == "body_too_large"

    def test_a_large_body_of_unknown_length(self, live):
        def parts():
            for _ in range(5):
                yield b"x" * 1000

        with live.client() as client:
            answer = client.post(
                "/v1/completions", content=parts(), headers={"Content-Type": "application/json"}
            )
        assert answer.status_code == 413

    @pytest.mark.parametrize(
        ("method", "path"),
        [
            *(("POST", path) for path in PUBLIC),
            *(("GET", path) for path in (*PUBLIC, "/v1/models", "/metrics")),
            ("DELETE", "/v1/adapters/anna"),
            ("HEAD", "/health"),
            ("PUT", "/v1/completions"),
        ],
    )
    def test_no_body_where_none_is_taken(self, live, method, path):
        key = ADMIN if path.startswith(("/v1/adapters", "/metrics")) else ALL
        head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n"
        for rest in ("Content-Length: 1\r\n\r\n", "Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\n"):
            with raw(live) as connection:
                connection.sendall((head + rest).encode())  # and the body goes on
                answer = b"".join(iter(lambda: connection.recv(4096), b""))
            assert answer.startswith(b"HTTP/1.1 413 "), answer
            if method != "HEAD":
                assert b'"code":"body_too_large"' in answer

    def test_all_bodies_together(self, made):
        with fake_server(*made, limits=Limits(body_bytes=4096, bodies=1)) as live:
            assert post(live, {**TEXT, "user": "x" * 3000}).status_code == 200
            with raw(live) as connection:
                connection.sendall(
                    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 4096\r\n"
                    + f"Authorization: Bearer {ALL}\r\n\r\n".encode()
                    + b" " * 3000
                )
                wait_for(lambda: post(live, {**TEXT, "user": "x" * 3000}).status_code == 503)
                answer = post(live, {**TEXT, "user": "x" * 3000})
                assert answer.json()["error"]["code"] == "busy"
                assert int(answer.headers["Retry-After"]) >= 1
                assert post(live, {**TEXT, "max_tokens": 2}).status_code == 200
            # What has been held is free again, by all that ended in some way.
            wait_for(lambda: post(live, {**TEXT, "user": "x" * 3000}).status_code == 200)
            for _ in range(3):
                assert post(live, {"x": "x" * 3000, "prompt": 1}).status_code == 400
            assert post(live, {**TEXT, "user": "x" * 3900}).status_code == 200

    def test_a_body_that_does_not_come(self, live):
        with raw(live) as connection:
            connection.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n"
                + f"Authorization: Bearer {ALL}\r\n\r\n".encode()
            )
            assert connection.recv(100).startswith(b"HTTP/1.1 408 ")

    def test_half_a_request_loses_its_connection(self, live):
        with raw(live) as connection:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: x")
            assert connection.recv(100) == b""

    @pytest.mark.parametrize(
        "head",
        [
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1e9\r\n\r\n",
        ],
        ids=range(2),
    )
    def test_what_is_no_http(self, live, head):
        with raw(live) as connection:
            connection.sendall(head)
            assert connection.recv(100).startswith(b"HTTP/1.1 400 ")

    def test_a_long_prompt(self, live):
        answer = post(live, {**TEXT, "prompt": "x" * 64})
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "context_length_exceeded"
        assert post(live, {**TEXT, "prompt": "x" * 63}).json()["usage"]["completion_tokens"] == 1

    def test_the_default_length_is_what_fits(self, live):
        counts = post(live, CHAT).json()["usage"]
        assert counts["prompt_tokens"] < 64
        assert counts["completion_tokens"] == min(40, 64 - counts["prompt_tokens"])


class TestRefusals:
    @pytest.fixture
    def slow(self, made):
        with fake_server(*made, options=SMALL) as live:
            live.runner.gate = threading.Semaphore(0)
            yield live
            live.runner.gate.release(100_000)

    def test_a_full_queue_is_429_and_says_when_to_come_again(self, slow):
        streams = [threading.Thread(target=slow.chat, kwargs={"max_tokens": 2}) for _ in range(5)]
        for count, stream in enumerate(streams, 1):
            stream.start()
            # The first has its row and waits for the gate; the others fill the queue.
            wait_for(lambda: ("decode",) in slow.runner.log)
            wait_for(lambda count=count: slow.service.engine.summary()["open"] == count)
        with openai.OpenAI(base_url=f"{slow.url}/v1", api_key=ALL, max_retries=0) as client:
            with pytest.raises(openai.RateLimitError) as error:
                client.completions.create(model="anna", prompt="a", max_tokens=2)
        assert error.value.code == "queue_full"
        assert int(error.value.response.headers["Retry-After"]) >= 1
        slow.runner.gate.release(100_000)
        for stream in streams:
            stream.join(60)

    def test_several_choices_are_taken_all_or_none(self, slow):
        answer = post(slow, {**TEXT, "n": 16})
        assert answer.status_code == 429
        slow.runner.gate.release(100_000)
        wait_for(lambda: slow.service.engine.summary()["open"] == 0)

    def test_an_answer_that_takes_too_long(self, made):
        with fake_server(*made, limits=Limits(timeout=0.3)) as live:
            live.runner.gate = SLOWLY
            answer = live.chat(max_tokens=30)
            assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")

    def test_an_engine_that_fails_says_so_in_health(self, made):
        with fake_server(*made) as live, live.client() as client:
            assert client.get("/health").json() == {"status": "ready"}
            live.runner.fails["decode"] = RuntimeError("the device is gone: /secret/path")
            answer = live.chat()
            assert answer.status_code in (500, 503)
            assert "/secret" not in answer.text
            for path in ("/health", "/health/live"):
                found = client.get(path)
                assert (found.status_code, found.json()["status"]) == (503, "failed")
            again = live.chat()
            assert (again.status_code, again.json()["error"]["code"]) == (503, "failed")

    def test_a_stream_that_fails_ends_in_an_error(self, made):
        with (
            fake_server(*made) as live,
            openai.OpenAI(base_url=f"{live.url}/v1", api_key=ALL, max_retries=0) as client,
        ):
            live.runner.gate = threading.Semaphore(3)
            stream = client.completions.create(model="anna", prompt="a", stream=True)
            assert next(stream).choices[0].text
            live.runner.fails["fetch"] = RuntimeError("gone")
            live.runner.gate.release(100_000)
            with pytest.raises(openai.APIError, match="engine"):
                list(stream)


# A gate that opens by itself, a step at a time.
SLOWLY = types.SimpleNamespace(acquire=lambda: time.sleep(0.05))
SMALL = EngineOptions(rows=2, length=64, pieces=(4, 8), queue=4, tenant_queue=4)
