"""The OpenAPI document, and what schemathesis makes of it, on the real engine."""

import subprocess
import sys
from pathlib import Path

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error

from tests.serving.http.fixtures_http import keyring, real_folder, real_server

BOTH = "key-of-one-who-may-do-all"
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
)


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tenants")
    base, _ = real_folder(folder)
    keys = {"keys": [{"name": "both", "key": BOTH, "models": ["*"], "admin": True}]}
    with real_server(folder, base, keyring(tmp_path_factory.mktemp("keys"), keys)) as live:
        yield live


def test_it_says_what_may_be_asked(live):
    with live.client(None) as client:
        document = client.get("/openapi.json").json()
    fields = document["components"]["schemas"]["ChatBody"]["properties"]
    assert {"model", "messages", "max_tokens", "stream", "logprobs", "seed", "stop"} <= set(fields)
    assert set(document["paths"]) == {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/models",
        "/v1/models/{model}",
        "/v1/adapters",
        "/v1/adapters/{name}",
        "/health",
        "/health/live",
        "/load",
        "/metrics",
    }
    assert "HTTPValidationError" not in str(document)
    assert document["paths"]["/v1/models"]["get"]["security"] == [{"key": []}]


def test_nothing_that_it_allows_or_forbids_breaks_the_server(live, tmp_path):
    done = subprocess.run(
        [
            Path(sys.executable).with_name("st"),
            *("run", f"{live.url}/openapi.json", "--header", f"Authorization: Bearer {BOTH}"),
            *("--checks", ",".join(CHECKS), "--phases", "coverage,fuzzing"),
            *("--max-examples", "10", "--seed", "1", "--no-color"),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr
    assert "Tested: 11" in done.stdout
    with live.client(BOTH) as client:
        assert client.get("/health").status_code == 200


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_nor_do_answers_of_a_model_that_exists(live, path):
    schema = schemathesis.openapi.from_url(f"{live.url}/openapi.json")
    headers, taken = {"Authorization": f"Bearer {BOTH}"}, []

    @given(case=schema[path]["POST"].as_strategy())
    @settings(max_examples=25, suppress_health_check=list(HealthCheck))
    def check(case):
        case.body |= {"model": "anna", "max_tokens": 4}
        case.body.pop("max_completion_tokens", None)
        answer = case.call_and_validate(headers=headers, checks=[not_a_server_error])
        taken.append(answer.status_code == 200)

    check()
    assert any(taken)
