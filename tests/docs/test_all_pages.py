"""Every block of code on every page is run by a test, or says visibly that it is not.

A page with a module of its own, `tests/docs/test_<name>.py`, is run there. All others are run here:
their Python from top to bottom, and then their commands, in one folder.
"""

import ast
import re

import pytest

from tests.docs.fixtures_pages import Page, without_settings
from tests.experiments.fixtures_programs import ROOT, call
from tools.program_flags import flags_of

DOCS = ROOT / "docs"
NAMES = sorted(path.relative_to(DOCS).with_suffix("").as_posix() for path in DOCS.rglob("*.md"))
OWN_TESTS = {path.stem.removeprefix("test_") for path in (ROOT / "tests/docs").glob("test_*.py")}
HERE = [name for name in NAMES if name not in OWN_TESTS]
# Blocks of these are read, not run.
SHOWN = {"json", "text", "console", "toml", "yaml", "ini"}
ALWAYS = {"help", "helpfull", "verbosity", "compilation_cache"}


@pytest.mark.parametrize("name", NAMES)
def test_every_block_has_a_language_that_is_dealt_with(name):
    page = Page(name)
    assert page.has_only("python", "bash", *SHOWN)
    # Indented code would be seen by nobody.
    outside = re.sub(r"^```.*?^```$", "", page.text, flags=re.DOTALL | re.MULTILINE)
    paragraphs = outside.split("\n\n")
    code = [p for p in paragraphs if re.match(r" {4}(python|make|\.venv|import|experiments)\b", p)]
    assert not code


@pytest.mark.parametrize(
    "name", [n for n in HERE if Page(n).blocks("python") or Page(n).commands()]
)
def test_the_code_runs(name, tmp_path):
    page = Page(name)
    page.run_python(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        for python, program, *flags in page.commands():
            assert (python, program[:12], program[-3:]) == ("python", "experiments/", ".py")
            flags = [re.sub(r"=(runs/|mine)", rf"={tmp_path}/\1", flag) for flag in flags]
            call(program[12:-3], *flags)


@pytest.mark.parametrize("name", [name for name in NAMES if Page(name).commands(run=False)])
def test_what_is_not_run_has_programs_and_flags_that_exist(name):
    """Of commands that take a server, hardware or hours."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for command, *words in map(without_settings, Page(name).commands(run=False)):
        if command == "make":
            assert re.search(rf"^{words[0]}:", makefile, re.MULTILINE), words[0]
        elif command.endswith("python") and words[0].startswith("experiments/"):
            tree = ast.parse((ROOT / words[0]).read_text(encoding="utf-8"))
            known = {flag.name for flag in flags_of(tree)} | ALWAYS
            for word in words[1:]:
                if word.startswith("--") and not word.startswith("--config."):
                    flag = word[2:].partition("=")[0]
                    assert flag in known or flag.removeprefix("no") in known, word


def test_the_lines_of_the_page_on_own_data_are_read(tmp_path):
    from mos_jax.data.jsonl import read_jsonl

    (lines,) = Page("own_data").blocks("json")
    (tmp_path / "lines.jsonl").write_text(lines)
    assert len(read_jsonl(tmp_path / "lines.jsonl")) == 2
