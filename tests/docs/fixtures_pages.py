"""A page of docs/ and the code on it."""

import itertools
import re
import shlex
from pathlib import Path

import pytest

from tests.experiments.fixtures_programs import ROOT

# What stands, as a paragraph of its own, before a block that the tests do not run.
_BLOCK = re.compile(
    r"(?P<mark>\*\*Not run by the tests\*\* \([^*`]*?\):\n\n)?"
    r"^```(?P<language>\w*)\n(?P<text>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)


# What a command of the shell sets for itself alone.
_SETTING = re.compile(r"[A-Za-z_]\w*=")


def without_settings(words: list[str]) -> list[str]:
    """A command without the NAME=value in front of it."""
    return list(itertools.dropwhile(_SETTING.match, words))


class Page:
    """`docs/<name>.md`."""

    def __init__(self, name: str):
        self.path = f"docs/{name}.md"
        self.text = (ROOT / self.path).read_text(encoding="utf-8")

    def blocks(self, language: str, run: bool = True) -> list[str]:
        """The fenced blocks of a language: those that run, or those marked as not run."""
        return [
            match["text"]
            for match in _BLOCK.finditer(self.text)
            if match["language"] == language and (match["mark"] is None) == run
        ]

    def commands(self, run: bool = True) -> list[list[str]]:
        """The lines of its shell blocks, split into words and without comments."""
        lines = "".join(self.blocks("bash", run)).replace("\\\n", " ").splitlines()
        return [words for words in (shlex.split(line, comments=True) for line in lines) if words]

    def run_python(self, folder: Path) -> dict:
        """Runs all Python from top to bottom in `folder`; returns what its names then stand for."""
        names: dict = {}
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            exec(compile("".join(self.blocks("python")), self.path, "exec"), names)
        return names

    def has_only(self, *languages: str) -> bool:
        """Whether every block of the page is of one of these languages."""
        return self.text.count("```") == 2 * sum(
            len(self.blocks(name, run)) for name in languages for run in (True, False)
        )
