"""How costs grow: what is found once, rounds, the table and the pictures."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from experiments.bench import scaling
from mos_jax.errors import InputError
from mos_jax.reporting.scaling_pictures import (
    devices_picture,
    points_of,
    scaling_picture,
    write_pictures,
)
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
    path = tmp_path / "deep" / "notes.json"
    notes = scaling.Notes(path)
    assert notes.get("a", lambda: costs(3), quiet) == costs(3)
    again = scaling.Notes(path)
    assert again.get("a", lambda: pytest.fail("found again"), quiet) == costs(3)
    assert json.loads(path.read_text()) == {"a": costs(3)}
    assert [file.name for file in path.parent.iterdir()] == ["notes.json"]


def test_a_step_that_two_axes_share_is_counted_once(tmp_path, monkeypatch):
    counted = []

    def step_costs(asked):
        counted.append(asked.name)
        return SimpleNamespace(to_dict=lambda: costs(1))

    monkeypatch.setattr(scaling, "step_costs", step_costs)
    notes = scaling.Notes(tmp_path / "notes.json")
    for key, name in (("x", "one"), ("y", "two"), ("z", "one")):
        asked = SimpleNamespace(name=name, digest=lambda name=name: name)
        notes.get(key, lambda asked=asked: scaling._costs(asked, notes), quiet)
    assert counted == ["one", "two"]
    assert notes.found["z"] == notes.found["x"] != notes.found["y"]


def test_rounds_are_interleaved_and_the_first_does_not_count():
    calls = []
    runs = {name: (lambda name=name: calls.append(name)) for name in ("a", "b")}
    found = scaling.interleave(runs, 3, quiet)
    assert calls == ["a", "b"] * 4
    assert len(found["b"]["seconds"]) == len(found["b"]["processor_seconds"]) == 3
    assert found["a"]["ratio"] == 1


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
    found |= {f"devices/{a}/{n}/before": costs(n) for a in ("data", "fsdp") for n in (1, 8, 2)}
    assert list(points_of(found, "counts")["rank"]["inside"]) == [8, 16, 64]
    figure = scaling_picture(found)
    lines = {(*map(tuple, line.get_data()),) for axes in figure.axes for line in axes.lines}
    assert ((8, 16, 64), (8.0, 16.0, 64.0)) in lines
    # Ratios within a round to the smallest value.
    assert ((8, 16, 64), (1.0, 2.0, 8.0)) in lines
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
