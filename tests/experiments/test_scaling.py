"""How costs grow: what is found once, rounds, the table and the pictures."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from experiments.bench import scaling
from experiments.bench.notes import Notes, maker
from experiments.bench.rounds import Rounds
from mos_jax.errors import InputError
from mos_jax.models.tiny import tiny_config
from mos_jax.planning.costs import make_request
from mos_jax.reporting.scaling_pictures import (
    devices_picture,
    points_of,
    scaling_picture,
    write_pictures,
)
from mos_jax.training.config import RunConfig
from tests.docs.fixtures_pages import Page
from tests.experiments.fixtures_programs import ROOT


def costs(number):
    return {
        "flops": number * 1e9,
        "bytes": 2e9 * number,
        "temporaries": number * 2**20,
        "arguments": 2**20,
        "received": number * 2**20,
        "collectives": {"all-gather": number},
    }


def quiet(text):
    del text


def test_what_is_in_the_file_is_not_found_again(tmp_path):
    path, made_by = tmp_path / "deep" / "notes.json", maker({"rank": 8}, 1)
    notes = Notes(path, made_by)
    first = notes.get("a", lambda: costs(3), quiet)
    assert costs(3).items() <= first.items()
    again = Notes(path, made_by)
    assert again.get("a", lambda: pytest.fail("found again"), quiet) == first
    held = json.loads(path.read_text())
    assert held == {"a": first, "makers": {first["maker"]: made_by}}
    assert [file.name for file in path.parent.iterdir()] == ["notes.json"]


@pytest.mark.parametrize("name", ["config", "code", "versions", "processor"])
def test_what_was_made_otherwise_is_found_again_and_says_so(tmp_path, name):
    path, made_by = tmp_path / "notes.json", maker({"logits_mib": 64}, 1)
    old = Notes(path, made_by)
    old.get("a", lambda: costs(1), quiet)
    old.get("b", lambda: costs(2), quiet)
    other = {**made_by, name: "another"}
    new = Notes(path, other)
    assert not new.known("a")
    assert new.get("a", lambda: costs(5), quiet)["flops"] == costs(5)["flops"]
    held = json.loads(path.read_text())
    # What was not asked for keeps its maker, and each maker stays as long as it has facts.
    assert held["b"] == old.found["b"]
    assert {key: held["makers"][held[key]["maker"]] for key in "ab"} == {"a": other, "b": made_by}
    new.get("b", lambda: costs(6), quiet)
    assert list(json.loads(path.read_text())["makers"].values()) == [other]


def test_numbers_that_do_not_say_what_made_them_are_not_used(tmp_path):
    path = tmp_path / "notes.json"
    path.write_text(json.dumps({"a": costs(1), "config": {}, "machine": {"date": "today"}}))
    notes = Notes(path, maker({}, 1))
    assert notes.found == {}
    notes.get("a", lambda: costs(2), quiet)
    assert set(json.loads(path.read_text())) == {"a", "makers"}


def test_a_maker_is_of_the_code_as_it_is(monkeypatch):
    before = maker({"rank": 8}, 1)
    assert before == maker({"rank": 8}, 1) != maker({"rank": 9}, 1)
    monkeypatch.setattr("experiments.bench.notes.code_digest", lambda package: "of other code")
    assert maker({"rank": 8}, 1)["code"] != before["code"]


def test_a_step_that_two_axes_share_is_counted_once(tmp_path, monkeypatch):
    counted = []

    def step_costs(asked):
        counted.append(asked.name)
        return SimpleNamespace(to_dict=lambda: costs(1))

    monkeypatch.setattr(scaling, "step_costs", step_costs)
    notes = Notes(tmp_path / "notes.json", maker({}, 1))
    for key, name in (("x", "one"), ("y", "two"), ("z", "one")):
        asked = SimpleNamespace(name=name, digest=lambda name=name: name)
        notes.get(key, lambda asked=asked: scaling._costs(asked, notes), quiet)
    assert counted == ["one", "two"]
    programs = {key: notes.found[key]["program"] for key in "xyz"}
    assert programs == {"x": "one", "y": "two", "z": "one"}


def test_real_steps_are_timed_for_places_and_sizes(tmp_path, monkeypatch):
    adapter = {"method": "mos", "equivalent_rank": 4, "rank": 2}
    config = RunConfig.from_mapping({"base": {"name": "tiny-random"}, "adapter": adapter})
    request = make_request(config, tiny_config(), 1, 8)
    notes, how = Notes(tmp_path / "notes.json", maker({}, 1)), Rounds(1, 2, 1)
    (setting,) = (one for one in scaling.TIMED_QUICKLY if not one.subset_selection)
    compared = ("before", "unassembled")
    scaling.time_places(request, {setting: compared}, how, notes, quiet)
    places = notes.found["seconds_of_places/1 x 8/e=2 pure sharing"]
    for where in compared:
        assert len(places[where]["processor_seconds"]) == len(places[where]["others"]) == 1
    assert places["before"]["ratio"]["median"] == 1
    *_, last = scaling.seconds_table(notes.found).splitlines()
    assert last.startswith("| 1 x 8 | e=2 pure sharing | not at all | ")
    # On the whole base and on its first block.
    axes = [axis for axis in scaling.scaling_axes(request) if axis.name == "num_layers"]
    monkeypatch.setattr(scaling, "scaling_axes", lambda request: axes)
    scaling.time_scaling(request, how, notes, quiet)
    assert set(notes.found["seconds/num_layers"]) == {"1", "2", "maker", "date"}


def test_the_table_leaves_out_what_was_not_counted():
    setting = next(iter(scaling.SETTINGS))
    name = scaling.setting_name(setting)
    found = {f"places/llama2-7b/{name}/unassembled": costs(1234)}
    *_, row = scaling.places_table(found).splitlines()
    assert row == f"| llama2-7b, 4 x 512 | {name} | not at all | 1,234 | 2,468 | 1,234 |"


def test_pictures_show_every_point(tmp_path):
    found = {f"counts/rank/{r}/{w}": costs(r) for r in (16, 8, 64) for w in ("before", "inside")}
    found |= {f"counts/rows/{rows}/before": costs(rows) for rows in (1, 2)}
    found |= {"seconds/rank": {str(r): {"processor_seconds": [r, 2.0 * r]} for r in (8, 16, 64)}}
    found["seconds/rank"]["date"] = "today"
    found |= {f"devices/{a}/{n}/before": costs(n) for a in ("data", "fsdp") for n in (1, 8, 2)}
    assert list(points_of(found, "counts")["rank"]["inside"]) == [8, 16, 64]
    figure = scaling_picture(found)
    lines = {(*map(tuple, line.get_data()),) for axes in figure.axes for line in axes.lines}
    assert ((8, 16, 64), (8.0, 16.0, 64.0)) in lines
    # Ratios within a round to the smallest value.
    assert ((8, 16, 64), (1.0, 2.0, 8.0)) in lines
    assert all(8 in axes.get_xticks() for axes in figure.axes if "rank" in axes.get_xlabel())
    received = devices_picture(found).axes[1].lines[0].get_ydata()
    np.testing.assert_array_equal(received, [1, 2, 8])
    written = write_pictures(found, tmp_path / "pictures")
    assert [path.name for path in written] == ["scaling_counts.png", "scaling_devices.png"]
    assert min(path.stat().st_size for path in written) > 5000
    assert write_pictures({"machine": {}}, tmp_path) == []
    with pytest.raises(InputError, match="--parts=counts"):
        scaling_picture({})


def test_the_page_has_the_table_of_the_committed_numbers():
    found = json.loads((ROOT / "results/scaling.json").read_text(encoding="utf-8"))
    assert scaling.places_table(found) in Page("costs").text
