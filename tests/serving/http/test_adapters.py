"""Adapters that come and go while the server runs, hostile ones among them; on the fake runner."""

import json
import os
import shutil
import threading

import pytest

from mos_jax.adapters import storage
from tests.serving.fixtures_tenants import LORA, MOS, tenants_in
from tests.serving.http.fixtures_http import ADMIN, fake_server, keyring, wait_for


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tenants")
    tenants_in(folder, anna=LORA, ben=MOS)
    with fake_server(folder, keyring(tmp_path_factory.mktemp("keys"))) as live:
        yield live


@pytest.fixture
def root(live):
    return live.service.roots[0]


@pytest.fixture
def admin(live):
    with live.client(ADMIN) as client:
        yield client


def load(admin, name, folder=None):
    body = {"name": name} if folder is None else {"name": name, "folder": str(folder)}
    return admin.post("/v1/adapters", json=body)


def names(admin):
    return [entry["name"] for entry in admin.get("/v1/adapters").json()["data"]]


def test_one_comes_answers_and_goes(live, admin, root):
    shutil.copytree(root / "anna", root / "late")
    assert live.chat("late").status_code == 404
    assert load(admin, "late").status_code == 201
    assert "late" in names(admin)
    assert live.chat("late").status_code == 200
    assert load(admin, "late").status_code == 409
    assert admin.delete("/v1/adapters/late").json() == {
        "name": "late",
        "object": "adapter",
        "deleted": True,
    }
    assert live.chat("late").status_code == 404
    assert admin.delete("/v1/adapters/late").status_code == 404


def test_its_arrays_are_read_once(live, admin, root, monkeypatch):
    read, whole = [], storage.read_bytes

    def counted(path, *limits):
        read.append(path.parent.name)
        return whole(path, *limits)

    monkeypatch.setattr(storage, "read_bytes", counted)
    for like in ("anna", "ben"):
        name = f"once-{like}"
        shutil.copytree(root / like, root / name)
        assert load(admin, name).status_code == 201
        assert live.chat(name).status_code == 200
        assert read.count(name) == 1
        assert admin.delete(f"/v1/adapters/{name}").status_code == 200


def test_one_in_use_goes_when_its_requests_have_ended(live, admin, root):
    shutil.copytree(root / "anna", root / "busy")
    assert load(admin, "busy").status_code == 201
    live.runner.gate = threading.Semaphore(0)
    answers = []
    asked = threading.Thread(target=lambda: answers.append(live.chat("busy", max_tokens=3)))
    asked.start()
    wait_for(lambda: live.runner.row)
    going = admin.delete("/v1/adapters/busy")
    assert (going.status_code, going.json()["deleted"]) == (202, False)
    assert live.chat("busy").status_code == 404
    live.runner.gate.release(100_000)
    asked.join(60)
    assert answers[0].status_code == 200
    wait_for(lambda: "busy" not in names(admin))


def test_a_name_need_not_be_that_of_its_folder(live, admin, root):
    (root / "deep").mkdir()
    shutil.copytree(root / "ben", root / "deep" / "v2")
    for name, folder in (("one", "deep/v2"), ("two", root / "deep" / "v2"), ("three", "./ben/.")):
        assert load(admin, name, folder).status_code == 201, name
        assert live.chat(name).status_code == 200
        assert admin.delete(f"/v1/adapters/{name}").status_code == 200


def test_the_base_keeps_its_name(admin):
    assert load(admin, "tiny", "anna").status_code == 409


ELSEWHERE = ("..", "../..", ".", "", "/", "/etc", "anna/../..", "nowhere", "a\0b", "x" * 1025)


@pytest.mark.parametrize("folder", [*ELSEWHERE, "anna/adapter.json"])
def test_folders_elsewhere_are_refused(admin, folder):
    assert load(admin, "new", folder).status_code == 400
    assert "new" not in names(admin)


def test_links_out_of_the_root_are_refused(admin, root, tmp_path):
    shutil.copytree(root / "anna", tmp_path / "outside")
    (root / "link").symlink_to(tmp_path / "outside")
    shutil.copytree(root / "anna", root / "inner")
    (card,) = (root / "inner").glob("*.json")
    card.unlink()
    card.symlink_to(tmp_path / "outside" / card.name)
    for name in ("link", "inner"):
        answer = load(admin, name)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "outside")
    # A link that stays inside is one more name.
    (root / "alias").symlink_to(root / "anna")
    assert load(admin, "alias").status_code == 201
    assert admin.delete("/v1/adapters/alias").status_code == 200


def spoil(folder, how):
    (card,) = folder.glob("*.json")
    (arrays,) = folder.glob("*.safetensors")
    if how == "no card":
        card.unlink()
    elif how == "no JSON":
        card.write_bytes(b"{" * 100_000)
    elif how == "a pipe":
        card.unlink()
        os.mkfifo(card)
    elif how == "a pipe of arrays":
        arrays.unlink()
        os.mkfifo(arrays)
    elif how == "short":
        arrays.write_bytes(arrays.read_bytes()[:-7])
    elif how == "a byte":
        content = bytearray(arrays.read_bytes())
        content[-3] ^= 1
        arrays.write_bytes(content)
    elif how == "a huge header":
        arrays.write_bytes(b"\xff" * 7 + b"\x7f" + arrays.read_bytes()[8:])
    elif how == "a pickle":
        arrays.unlink()
        arrays.with_suffix(".bin").write_bytes(b"\x80\x04cos\nsystem\n(S'true'\ntR.")
    elif how == "another base":
        text = json.loads(card.read_text())
        assert "f" * 64 in card.read_text()
        card.write_text(json.dumps(text).replace("f" * 64, "0" * 64))
    elif how == "a huge rank":
        text = json.loads(card.read_text())
        text["config"]["rank"] = 1 << 40
        card.write_text(json.dumps(text))


@pytest.mark.parametrize(
    "how",
    [
        "no card",
        "no JSON",
        "a pipe",
        "a pipe of arrays",
        "short",
        "a byte",
        "a huge header",
        "a pickle",
        "another base",
        "a huge rank",
    ],
)
@pytest.mark.parametrize("like", ["anna", "ben"])
def test_a_damaged_or_foreign_adapter_is_refused_and_the_server_goes_on(
    live, admin, root, how, like
):
    before, name = names(admin), f"bad-{how}-{like}".replace(" ", "-")
    shutil.copytree(root / like, root / name)
    spoil(root / name, how)
    answer = load(admin, name)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "invalid_adapter"
    assert names(admin) == before
    assert live.chat(like).status_code == 200


def test_one_that_is_damaged_later_fails_alone(live, admin, root):
    shutil.copytree(root / "ben", root / "later")
    assert load(admin, "later").status_code == 201
    spoil(root / "later", "a byte")
    live.service.engine.bank.host.drop("later")
    answer = live.chat("later")
    assert answer.status_code == 500
    assert str(root) not in answer.text
    assert live.chat("ben").status_code == 200
    with live.client() as client:
        assert client.get("/health").status_code == 200
    assert admin.delete("/v1/adapters/later").status_code == 200


def test_a_folder_that_goes_while_serving(live, admin, root):
    shutil.copytree(root / "anna", root / "gone")
    assert load(admin, "gone").status_code == 201
    shutil.rmtree(root / "gone")
    assert live.chat("gone").status_code == 200  # from host memory, until others take its place
    live.service.engine.bank.host.drop("gone")
    for name in ("anna", "late2", "late3", "late4", "late5"):
        if name != "anna":
            shutil.copytree(root / "anna", root / name)
            assert load(admin, name).status_code == 201
        assert live.chat(name).status_code == 200  # four slots: the one used longest ago goes
    assert live.chat("gone").status_code == 500
    assert live.chat("anna").status_code == 200
    assert admin.delete("/v1/adapters/gone").status_code == 200
