"""Tables of plans: written after every cell, and what they say."""

import json

from mos_jax.planning.study import Cell, run_study
from tests.planning.fixtures_planning import GIB, RuleCompiler, tiny_request


class Remembering(RuleCompiler):
    """Knows what it was asked before, and fails at a request called `fails`."""

    fails = None

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
