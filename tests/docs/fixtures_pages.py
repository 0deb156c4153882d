"""A page of docs/ and the code on it."""

import re
from pathlib import Path

import pytest

from tests.experiments.fixtures_programs import ROOT


class Page:
    """`docs/<name>.md`."""

    def __init__(self, name: str):
        self.path = f"docs/{name}.md"
        self.text = (ROOT / self.path).read_text(encoding="utf-8")

    def blocks(self, language: str) -> list[str]:
        return re.findall(rf"^```{language}\n(.*?)^```$", self.text, re.DOTALL | re.MULTILINE)

    def run_python(self, folder: Path) -> dict:
        """Runs all Python from top to bottom in `folder`; returns what its names then stand for."""
        names: dict = {}
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            exec(compile("".join(self.blocks("python")), self.path, "exec"), names)
        return names

    def has_only(self, *languages: str) -> bool:
        """Whether every block of the page is of one of these languages."""
        return self.text.count("```") == 2 * sum(len(self.blocks(name)) for name in languages)
