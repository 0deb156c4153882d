"""The code of docs/merging_and_converting.md, run from top to bottom, and its table."""

import re
import shlex

import pytest

from mos_jax.conversion.formats import FORMATS
from tests.docs.fixtures_pages import Page
from tests.experiments.fixtures_programs import call

PAGE = Page("merging_and_converting")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the page's Python ran, with what it wrote."""
    folder = tmp_path_factory.mktemp("page")
    PAGE.run_python(folder)
    return folder


def test_the_python_runs(folder):
    written = sorted(path.name for path in (folder / "runs/q").iterdir())
    assert written == ["adapter", "again.gguf", "model"]


def test_the_commands_run_after_it(folder):
    (text,) = PAGE.blocks("bash")
    outputs = []
    for line in text.splitlines():
        python, program, *flags = shlex.split(line)
        assert (python, program) == ("python", "experiments/convert.py")
        flags = [flag.replace("runs/", f"{folder}/runs/") for flag in flags]
        outputs.append(call("convert", *flags).stdout)
    assert [out.count("largest logit difference") for out in outputs] == [1, 1, 2, 1, 0]
    for out in (outputs[0], outputs[1], outputs[3]):
        assert re.search(r"largest logit difference +0 over 64 tokens", out)
    written = {path.name for path in (folder / "runs/q").iterdir()}
    assert written >= {"peft", "mos.gguf", "merged", "back"}
    assert "base" not in written


def test_the_table_has_every_format_and_its_options():
    rows = re.findall(r"^\| `(\w[\w-]*)` \|.*\|(.*)\|$", PAGE.text, re.MULTILINE)
    found = {name: re.findall(r"--(\w+)", options) for name, options in rows}
    assert found == {name: list(chosen.options) for name, chosen in FORMATS.items()}


def test_every_block_is_run():
    assert PAGE.has_only("python", "bash")
