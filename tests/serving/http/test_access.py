"""Who may ask what, and what those who may not learn."""

import hashlib
import json

import pytest

from mos_jax import InputError
from mos_jax.serving.http.keys import Keyring, read_keys
from mos_jax.serving.http.launch import Launch, called_by
from tests.serving.fixtures_tenants import LORA, tenants_in
from tests.serving.http.fixtures_http import ADMIN, ALL, ANNA, TEAM, fake_server, keyring, raw

HIDDEN = ("ben", "carl")


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tenants")
    tenants_in(folder, anna=LORA, ben=LORA, carl=LORA)
    keys = keyring(tmp_path_factory.mktemp("keys"))
    with fake_server(folder, keys) as live:
        yield live


# Every route that is about models, as asked for one of them.
def routes(model):
    body = {"model": model, "max_tokens": 2}
    return [
        ("POST", "/v1/chat/completions", {**body, "messages": [{"role": "user", "content": "a"}]}),
        ("POST", "/v1/completions", {**body, "prompt": "a"}),
        ("GET", f"/v1/models/{model}", None),
    ]


ADMIN_ROUTES = [
    ("GET", "/v1/adapters", None),
    ("POST", "/v1/adapters", {"name": "ben"}),
    ("POST", "/v1/adapters", "nonsense"),
    ("DELETE", "/v1/adapters/ben", None),
    ("GET", "/metrics", None),
]


class TestRights:
    def test_a_key_without_the_right_gets_403_everywhere_and_no_name(self, live):
        with live.client(ANNA) as client:
            for method, path, body in routes("ben") + ADMIN_ROUTES:
                answer = client.request(method, path, json=body)
                assert answer.status_code == 403, path
                # One echo of what was asked for tells nothing; any other name does.
                shown = (
                    answer.text.replace("'ben'", "", 1)
                    if "ben" in str(body or path)
                    else answer.text
                )
                assert not any(name in shown for name in HIDDEN), path

    def test_what_exists_and_what_does_not_are_refused_alike(self, live):
        with live.client(ANNA) as client:
            for there, not_there in zip(routes("ben"), routes("bon"), strict=True):
                one, other = (client.request(m, p, json=b) for m, p, b in (there, not_there))
                assert one.status_code == other.status_code == 403
                assert one.text.replace("ben", "bon") == other.text

    def test_a_key_with_the_right_is_answered(self, live):
        with live.client(ANNA) as client:
            for method, path, body in routes("anna"):
                assert client.request(method, path, json=body).status_code == 200, path

    def test_a_list_shows_what_the_key_may_use(self, live):
        def shown(key):
            with live.client(key) as client:
                return [model["id"] for model in client.get("/v1/models").json()["data"]]

        assert shown(ALL) == ["tiny", "anna", "ben", "carl"]
        assert shown(ANNA) == ["anna"]
        assert shown(TEAM) == ["tiny", "anna"]
        assert shown(ADMIN) == []

    def test_a_pattern_gives_a_right_to_names_that_are_not_there(self, live):
        answer = live.chat("alina", key=TEAM)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
        assert not any(name in answer.text for name in HIDDEN)

    def test_an_administrator_may_use_no_model(self, live):
        assert live.chat("anna", key=ADMIN).status_code == 403

    def test_figures_name_no_tenant(self, live):
        live.chat("anna")
        with live.client(ADMIN) as client:
            figures = client.get("/metrics").text
            assert "mos_accepted_total" in figures
            assert not any(name in figures for name in ("anna", *HIDDEN))
        for key in (ALL, ANNA):
            with live.client(key) as client:
                assert set(client.get("/load").json()) == {
                    "state",
                    "seconds",
                    "tokens_per_second",
                    "rows",
                    "running",
                    "waiting",
                }

    @pytest.mark.parametrize("path", ["/", "/health", "/health/live", "/openapi.json"])
    def test_what_is_open_to_all_names_no_tenant(self, live, path):
        with live.client(None) as client:
            answer = client.get(path)
        assert answer.status_code == 200
        assert not any(name in answer.text for name in ("anna", *HIDDEN))


class TestAuthentication:
    @pytest.mark.parametrize(
        "header",
        [
            None,
            "",
            "Bearer",
            f"Basic {ALL}",
            ALL,
            f"Bearer {ALL}x",
            f"Bearer {ALL[:-1]}",
            f"Bearer {ALL.upper()}",
            "Bearer \xe9\xff",
            "Bearer " + "x" * 10_000,
        ],
    )
    @pytest.mark.parametrize("path", ["/v1/models", "/v1/nothing", "/metrics", "/v1/adapters"])
    def test_no_key_is_401(self, live, header, path):
        headers = {} if header is None else {"Authorization": header.encode("latin-1")}
        with live.client(None) as client:
            answer = client.get(path, headers=headers)
        assert answer.status_code == 401
        assert answer.headers["WWW-Authenticate"] == "Bearer"
        assert answer.json()["error"]["type"] == "authentication_error"

    def test_it_comes_before_the_body(self, live):
        with raw(live) as connection:
            connection.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 500000\r\n\r\n"
            )
            assert connection.recv(100).startswith(b"HTTP/1.1 401 ")

    def test_the_scheme_may_be_written_in_any_case(self, live):
        with live.client(None) as client:
            answer = client.get("/v1/models", headers={"Authorization": f"bearer {ANNA}"})
        assert answer.status_code == 200


class TestNames:
    @pytest.mark.parametrize(
        "name",
        [
            *("../anna", "/etc/passwd", "a/b", "..", ".", ".hidden", "a" * 65, "a b", "é", "a\n"),
            *("__base__", "a\0b", "%2e%2e", "*"),
        ],
    )
    def test_odd_ones_are_refused(self, live, name):
        answer = live.chat(name)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "model"
        with live.client(ADMIN) as client:
            answer = client.post("/v1/adapters", json={"name": name, "folder": "anna"})
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "name")

    @pytest.mark.parametrize("path", ["..%2F..", "%2e%2e%2fanna", "a%00b", "a" * 5000, "%ff%fe"])
    @pytest.mark.parametrize("route", ["/v1/models/", "/v1/adapters/"])
    def test_odd_paths_are_refused(self, live, route, path):
        method, key = ("GET", ALL) if route == "/v1/models/" else ("DELETE", ADMIN)
        with live.client(key) as client:
            assert client.request(method, route + path).status_code in (400, 404)


@pytest.fixture(scope="module")
def open_(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tenants")
    tenants_in(folder, anna=LORA)
    with fake_server(folder, Keyring(), hosts=frozenset({"127.0.0.1", "localhost"})) as live:
        yield live


class TestOpenServers:
    def test_anybody_may_ask_but_nobody_may_load(self, open_):
        assert open_.chat(key=None).status_code == 200
        with open_.client(None) as client:
            assert client.get("/metrics").status_code == 200
            assert client.get("/v1/adapters").status_code == 403
            assert client.post("/v1/adapters", json={"name": "b"}).status_code == 403

    @pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example:80", "", "[::2]"])
    def test_not_by_a_name_of_the_web(self, open_, host):
        with open_.client(None) as client:
            answer = client.get("/v1/models", headers={"Host": host})
        assert answer.status_code == 403

    @pytest.mark.parametrize(
        ("host", "open_", "checked"),
        [
            ("127.0.0.1", False, True),
            ("localhost", True, True),
            ("127.0.0.1", True, True),
            ("::1", True, True),
            ("0.0.0.0", True, False),
            ("::", True, False),
            ("192.168.0.1", True, False),
            ("box.example", True, False),
        ],
    )
    def test_names_are_checked_where_only_this_machine_should_reach_it(self, host, open_, checked):
        hosts = called_by(Launch("x", host=host, open=open_), Keyring())
        assert (hosts is not None) == checked
        if checked:
            assert {"localhost", "127.0.0.1", "::1"} <= hosts
            assert "evil.example" not in hosts
        assert called_by(Launch("x", host=host), read_keys(None, {"MOS_JAX_API_KEYS": ALL})) is None

    @pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
    def test_not_by_a_form_of_the_web(self, open_, kind):
        with open_.client(None) as client:
            body = b'{"model": "anna", "prompt": "a"}'
            answer = client.post("/v1/completions", content=body, headers={"Content-Type": kind})
        assert answer.status_code == 415


class TestKeyFiles:
    def read(self, tmp_path, content, **environment):
        file = tmp_path / "keys.json"
        file.write_text(content if isinstance(content, str) else json.dumps(content))
        return read_keys(file, environment)

    def test_plain_and_hashed(self, tmp_path):
        hashed = {"sha256": hashlib.sha256(b"k" * 20).hexdigest().upper(), "models": ["a", "b-*"]}
        ring = self.read(tmp_path, {"keys": [{"key": "j" * 20, "models": ["*"]}, hashed]})
        assert ring.find("j" * 20).may_use("anything")
        found = ring.find("k" * 20)
        assert [found.may_use(m) for m in ("a", "b-1", "b-", "b", "ab", "a\n")] == [
            True, True, True, False, False, False,
        ]  # fmt: skip
        assert ring.find("k" * 19) is None
        assert "kkkk" not in repr(ring.keys)

    def test_from_the_environment(self):
        environment = {
            "MOS_JAX_API_KEYS": f"{ALL}  {ANNA}:anna,team-*\n",
            "MOS_JAX_ADMIN_KEYS": ADMIN,
        }
        ring = read_keys(None, environment)
        assert ring.find(ALL).may_use("x")
        assert not ring.find(ANNA).may_use("x")
        assert ring.find(ANNA).may_use("team-x")
        assert ring.find(ADMIN).admin
        assert not ring.find(ALL).admin

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            ("{", "not valid JSON"),
            ({}, "must be"),
            ({"keys": []}, "at least one key"),
            ({"keys": [{}]}, "either key or sha256"),
            ({"keys": [{"key": "s3cret", "models": ["*"]}]}, "16 to 256"),
            ({"keys": [{"key": "s3cret with spaces in it", "models": ["*"]}]}, "16 to 256"),
            ({"keys": [{"key": 12345678901234567890, "models": ["*"]}]}, "16 to 256"),
            ({"keys": [{"sha256": "s3cret" * 11, "models": ["*"]}]}, "64 hexadecimal"),
            ({"keys": [{"key": "s3cret" * 4}]}, "needs models"),
            ({"keys": [{"key": "s3cret" * 4, "models": "*"}]}, "a list of names"),
            ({"keys": [{"key": "s3cret" * 4, "models": ["a/b"]}]}, "a model is a name"),
            ({"keys": [{"key": "s3cret" * 4, "models": [], "admin": 1}]}, "true or false"),
            ({"keys": [{"key": "s3cret" * 4, "models": [], "name": "a b"}]}, "name must be"),
            ({"keys": [{"s3cret" * 4: "key", "models": []}]}, "unknown field"),
            ({"keys": [{"key": "s3cret" * 4, "models": []}] * 2}, "twice"),
        ],
        ids=range(15),
    )
    def test_what_cannot_be_read_is_refused_without_showing_a_key(self, tmp_path, content, words):
        with pytest.raises(InputError, match=words) as refused:
            self.read(tmp_path, content)
        assert "s3cret" not in str(refused.value)
