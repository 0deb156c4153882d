"""The code of docs/planner.md, its topologies, and its commands as far as they need no libtpu."""

import re

from mos_jax.planning.chips import CHIPS
from tests.docs.fixtures_pages import Page
from tests.experiments.fixtures_programs import ROOT, call

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


def test_flags_and_configs_of_the_commands_are_there():
    helped = call("plan", "--help", ok=False).stdout
    commands = re.findall(r"experiments/plan\.py ((?:.*\\\n)*.*)", PAGE.text)
    assert len(commands) == 3
    for command in commands:
        for flag, value in re.findall(r"--(\w+)=?(\S*)", command):
            assert f"--{flag}" in helped or f"--[no]{flag}" in helped
            assert flag != "config" or (ROOT / value).is_file()


def test_every_block_is_run():
    assert PAGE.has_only("python")
