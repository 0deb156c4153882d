"""Parts of a report on disk, for a notebook that shows some of them."""

from __future__ import annotations

import re
from pathlib import Path

from mos_jax.errors import InputError, suggest
from mos_jax.reporting.notebook import Shown
from mos_jax.reporting.write import MARKDOWN


class SavedReport:
    """What `write_report` wrote: its sections, its pictures and their captions."""

    def __init__(self, folder: Path) -> None:
        """Reads the report in `folder`. Raises InputError if there is none."""
        path = folder / MARKDOWN
        if not path.is_file():
            raise InputError(f"{path}: there is no report; write_report makes one")
        self._folder = folder
        _, *parts = path.read_text(encoding="utf-8").split("\n## ")
        self._sections = dict(part.split("\n", 1) for part in parts)
        # A picture's caption is the paragraph in italics below it.
        found = re.findall(r"^!\[.*\]\((.*)\.png\)\n\n\*(.*)\*$", "\n".join(parts), re.MULTILINE)
        self._captions: dict[str, str] = dict(found)

    def section(self, heading: str) -> str:
        """Markdown of the section whose heading begins with `heading`, up to its first picture.

        Raises:
          InputError: if there is none.
        """
        for title, text in self._sections.items():
            if title.startswith(heading):
                return text.partition("\n![")[0].strip()
        raise InputError(f"no section {heading!r}; {suggest(heading, self._sections)}")

    def caption(self, name: str) -> str:
        """What a picture shows and how to read it. Raises InputError for an unknown name."""
        if name not in self._captions:
            raise InputError(f"no picture {name!r}; {suggest(name, self._captions)}")
        return self._captions[name]

    def picture(self, name: str) -> Shown:
        """A picture, by its name without ".png". Raises InputError for an unknown name."""
        self.caption(name)
        return Shown((self._folder / f"{name}.png").read_bytes())
