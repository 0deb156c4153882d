"""The code of docs/many_adapters.md, run from top to bottom."""

import re
import shlex

import pytest

from tests.docs.fixtures_pages import Page
from tests.experiments.fixtures_programs import call

PAGE = Page("many_adapters")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the page's Python ran, with what it wrote."""
    folder = tmp_path_factory.mktemp("page")
    PAGE.run_python(folder)
    return folder


def test_the_python_runs(folder):
    assert sorted(path.name for path in (folder / "runs").iterdir()) == ["french", "law"]


def test_the_commands_run_after_it(folder):
    (text,) = PAGE.blocks("bash")
    commands = [shlex.split(line) for line in text.replace("\\\n", " ").splitlines()]
    outputs = []
    assert len(commands) == 2
    for python, program, *flags in commands:
        assert (python, program[:12], program[-3:]) == ("python", "experiments/", ".py")
        flags = [flag.replace("runs/", f"{folder}/runs/") for flag in flags]
        outputs.append(call(program[12:-3], *flags).stdout)
    assert "q_proj     rank   7  distance " in outputs[0]
    assert float(outputs[0].split("of the changes is ")[1].split()[0]) < 1e-6
    card = (folder / "runs/both/README.md").read_text()
    assert "**combination**: exact" in card
    # How each of its adapters came about.
    assert re.search(r'\*\*adapter french\*\*: `\{.*"method": "\w+"', card)
    assert "null" not in card
    assert re.findall(r"^\[(\w+)\] ", outputs[1], re.MULTILINE) == ["base", "french", "both"]


def test_every_block_is_run():
    assert PAGE.has_only("python", "bash")
