"""The README's Python runs; its commands have programs, flags, fields and targets that exist."""

import ast
import importlib
import re
import shlex

import pytest

from tests.docs.fixtures_pages import without_settings
from tests.experiments.fixtures_programs import ROOT
from tools.program_flags import flags_of

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
CODE = "\n".join(line[4:] for line in TEXT.splitlines() if line.startswith("    "))
COMMANDS = [
    without_settings(words)
    for line in CODE.replace("\\\n", " ").splitlines()
    if (words := shlex.split(line, comments=True))
]
PROGRAMS = [words for words in COMMANDS if words[0] == ".venv/bin/python"]


def test_every_line_is_of_a_kind_that_is_checked():
    assert {words[0] for words in COMMANDS} == {".venv/bin/python", "make", "pip"}
    assert len(PROGRAMS) > 12


def test_the_python_runs():
    (code,) = re.findall(r"^```python\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert (names["logits"] == names["base"].model(names["tokens"])).all()


@pytest.mark.parametrize("place", range(len(PROGRAMS)))
def test_a_command_has_a_program_and_flags_that_exist(place):
    _, program, *words = PROGRAMS[place]
    flags = {flag.name for flag in flags_of(ast.parse((ROOT / program).read_text("utf-8")))}
    config = None
    for word in words:
        assert word.startswith("--"), word
        name, _, value = word[2:].partition("=")
        if name == "config":
            path, _, argument = value.partition(":")
            module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
            config = module.get_config(*([argument] if argument else []))
        elif name.startswith("config."):
            assert config is not None, "--config comes first"
            section, field = name.split(".")[1:]
            assert field in config[section], word
        assert name.partition(".")[0] in flags or name.removeprefix("no") in flags, word


def test_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = {words[1] for words in COMMANDS if words[0] == "make"}
    named |= set(re.findall(r"`make ([a-z-]+)", TEXT))
    assert named
    for target in named:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_extras_exist():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for extra in ("cuda", "cuda13", "tpu", "report", "serve", "slurm", "tasks", "wandb"):
        assert extra in TEXT
        assert re.search(rf"^{extra} = \[", text, re.MULTILINE), extra
