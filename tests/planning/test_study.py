"""Tables of plans: written after every cell, and what they say."""

import json
from pathlib import Path

import pytest

from mos_jax.errors import InputError
from mos_jax.planning.study import Cell, page, run_study
from tests.planning.fixtures_planning import GIB, RuleCompiler, tiny_request

RESULTS = Path(__file__).parents[2] / "results"


class Remembering(RuleCompiler):
    """Knows what it was asked before, and fails at a request called `fails`."""

    fails = None
    code = "0123456789abcdef" * 4

    @property
    def versions(self):
        return {"jax": "1"}

    def known(self, request):
        return request in self.asked

    def program(self, request):
        if request is self.fails:
            raise RuntimeError("cut short")
        return super().program(request)


def study(tmp_path, compiler, cells, **options):
    out, report, told = tmp_path / "plans.json", tmp_path / "plans.md", []
    try:
        run_study(cells, compiler, out, report, "make plans", told=told.append, **options)
    except RuntimeError:
        told.append("cut short")
    return json.loads(out.read_text()), report.read_text(), told


def test_a_table_grows_by_cells_and_says_what_is_missing(tmp_path):
    def rule(request):
        return (1 if request.config.adapter.method == "mos" else 2) * GIB * request.rows

    cells = [
        Cell("MoS e=2 r=4", tiny_request(), ("nothing is here",)),
        Cell("LoRA r=8", tiny_request(method="lora"), ()),
        Cell("LoRA r=8, 16 rows", tiny_request(method="lora", rows=16), ()),
    ]
    compiler = Remembering(rule)
    compiler.fails = cells[2].request
    values, page, told = study(tmp_path, compiler, cells, remarks=("A remark.",))
    assert told[-1] == "cut short"
    assert list(values["cells"]) == [cell.name for cell in cells[:2]]
    assert values["missing"] == [cells[2].name]
    assert "Not compiled yet: " in page
    assert "- A remark." in page
    assert "- Assumed: nothing is here." in page
    # Beside each other: the same model, slice and mesh.
    assert page.count("| tiny") == 4

    compiler.fails = None
    values, page, told = study(tmp_path, compiler, cells, known_only=True)
    assert told[-1].endswith("not compiled")
    assert values["missing"] == [cells[2].name]

    values, page, _ = study(tmp_path, compiler, cells)
    assert values["missing"] == []
    rows = [line for line in page.splitlines() if line.startswith("| tiny")]
    assert "| 4.00 | 16.00 | fits |" in rows[0]
    assert "| 32.00 | 16.00 | 16.00 GiB too much |" in rows[2]
    # What was refused has no program to be compared by.
    assert len(rows) == 5


def test_the_committed_page_is_what_the_committed_values_print():
    values = json.loads((RESULTS / "plans.json").read_text())
    assert page(values) == (RESULTS / "plans.md").read_text()
    tables = [part for part in page(values).split("\n\n") if part.startswith("| model |")]
    assert len(tables) == 2
    assert tables[0].count("\n") == 1 + len(values["cells"])


def test_the_plan_that_the_page_quotes_is_recorded():
    """LLaMA2-7B on one v5e chip: its verdict, and the knob that makes it fit."""
    found = json.loads((RESULTS / "plan_llama2_7b_v5e1.json").read_text())
    assert found["verdict"].startswith("does not fit: 17.03 GiB of 15.75 GiB")
    last = found["knobs"][-1]
    assert last["flags"] == "--config.data.batch_size=8 --config.training.accumulation=2"
    assert last["verdict"].startswith("fits: 14.84 GiB of 15.75 GiB")


def test_only_what_is_missing_or_was_made_by_other_code_is_planned(tmp_path):
    cells = [Cell("MoS", tiny_request(), ()), Cell("LoRA", tiny_request(method="lora"), ())]
    compiler = Remembering(lambda request: GIB)
    study(tmp_path, compiler, cells[:1])
    study(tmp_path, compiler, cells, which="missing")
    assert compiler.asked == [cell.request for cell in cells]
    study(tmp_path, compiler, cells, which="missing")
    study(tmp_path, compiler, cells, which="outdated")
    assert len(compiler.asked) == 2
    other = Remembering(lambda request: 2 * GIB)
    other.code = "f" * 64
    study(tmp_path, other, cells[1:], which="outdated")
    more = Cell("VeRA", tiny_request(method="lora", rows=8), ())
    values, _, _ = study(tmp_path, other, [*cells, more], which="outdated")
    assert other.asked == [cells[1].request, cells[0].request]
    assert {cell["made"]["code"] for cell in values["cells"].values()} == {"f" * 16}


def test_cells_of_earlier_calls_stay_whatever_is_known(tmp_path):
    committed = json.loads((RESULTS / "plans.json").read_text())
    out, report = tmp_path / "plans.json", tmp_path / "plans.md"
    out.write_text(json.dumps(committed))
    cell = Cell("MoS e=2 r=4", tiny_request(), ("nothing is here",))
    compiler = Remembering(lambda request: GIB)

    # It knows none: nothing is lost, and the page has all of them.
    values, text, told = study(tmp_path, compiler, [cell], known_only=True)
    assert told == [f"{cell.name}: not compiled"]
    assert values["cells"] == committed["cells"]
    assert values["missing"] == [*committed["missing"], cell.name]
    rows = len([line for line in text.splitlines() if line.startswith("| llama2")])
    before = (RESULTS / "plans.md").read_text().splitlines()
    assert rows == len([line for line in before if line.startswith("| llama2")])

    # Cut short at the first cell: as it was.
    compiler.fails = cell.request
    kept = out.read_bytes(), report.read_bytes()
    assert study(tmp_path, compiler, [cell])[2] == ["cut short"]
    assert (out.read_bytes(), report.read_bytes()) == kept

    # Compiled: one more, which says what it was made with.
    compiler.fails = None
    values, text, _ = study(tmp_path, compiler, [cell])
    made = values["cells"].pop(cell.name)["made"]
    assert (made["versions"], made["code"]) == ({"jax": "1"}, "0123456789abcdef")
    assert values["cells"] == committed["cells"]
    assert values["missing"] == committed["missing"]
    assert f"from the code of digest 0123456789abcdef: {cell.name}." in text


def test_a_cell_is_replaced_in_its_place_when_it_is_planned_anew(tmp_path):
    cells = [Cell("MoS", tiny_request(), ()), Cell("LoRA", tiny_request(method="lora"), ())]
    study(tmp_path, Remembering(lambda request: GIB), cells)
    other = Remembering(lambda request: 2 * GIB)
    other.code = "f" * 64
    values, text, _ = study(tmp_path, other, cells[:1])
    assert list(values["cells"]) == [cell.name for cell in cells]
    codes = [found["made"]["code"] for found in values["cells"].values()]
    assert codes == ["f" * 16, "0123456789abcdef"]
    assert text.count("- Made on ") == 2


@pytest.mark.parametrize("words", ["{", "[]", '{"cells": {"a": {}}, "missing": []}', "\\xff"])
def test_what_is_no_study_is_refused_and_stays(tmp_path, words):
    out = tmp_path / "plans.json"
    out.write_text(words)
    compiler = Remembering(lambda request: GIB)
    with pytest.raises(InputError, match="holds no plans that can be added to"):
        run_study([Cell("a", tiny_request(), ())], compiler, out, tmp_path / "a.md", "a")
    assert out.read_text() == words
    assert not compiler.asked
