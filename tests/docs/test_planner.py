"""The code of docs/planner.md, and its topologies."""

from mos_jax.planning.chips import CHIPS
from tests.docs.fixtures_pages import Page

PAGE = Page("planner")


def test_the_python_runs(tmp_path, capsys):
    names = PAGE.run_python(tmp_path)
    said = capsys.readouterr().out
    assert "{'data': 1, 'fsdp': 16, 'tensor': 1}" in said
    assert "GiB of each chip between steps" in said
    assert len(names["assumed"]) == 3


def test_the_page_names_every_topology():
    row = next(line for line in PAGE.text.splitlines() if line.startswith("| `--topology`"))
    for chip in CHIPS.values():
        assert all(shape in row for shape in chip.topologies)


def test_every_block_is_run_or_says_that_it_is_not():
    assert PAGE.has_only("python", "bash")
