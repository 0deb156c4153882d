"""Hooks of mkdocs: pages and pictures that are made when the site is built.

- `results/` is shown as it is committed; pages of docs/ link to it as they do on a forge.
- `decisions.md` is the section of WORKSPACE.md, `changelog.md` is CHANGELOG.md.
- `figures/` are the pictures of `tools/site_figures.py`.
- `reference/programs.md` lists the flags of every program.
- Formulas become MathML, which browsers show without a script.
- Links to files of the repository that are no pages lead to its address, which stands in
  pyproject.toml.
"""

from __future__ import annotations

import html
import os
import posixpath
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import latex2mathml.converter
from mkdocs.structure.files import File, Files

from tools.program_flags import program_page
from tools.site_figures import FIGURES, draw

ROOT = Path(__file__).resolve().parent.parent
SHOWN_RESULTS = (".md", ".png", ".svg")
_LINK = re.compile(r"(?<=\]\()(?!https?:|#|mailto:)([^)\s#]+)(#[^)\s]*)?(?=\))")


def repository() -> str:
    """The repository's address."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return project["tool"]["mos_jax"]["repository"].rstrip("/")


def on_config(config: Any) -> Any:
    """Sets what pyproject.toml knows."""
    config["repo_url"] = repository()
    config["repo_name"] = "/".join(repository().split("/")[-2:])
    return config


def decisions() -> str:
    """The section of WORKSPACE.md, as a page."""
    text = (ROOT / "WORKSPACE.md").read_text(encoding="utf-8")
    (section,) = re.findall(r"^## Decisions and their reasons\n(.*?)(?=^## )", text, re.S | re.M)
    return f"# Decisions and their reasons\n{section}"


def generated() -> Iterator[tuple[str, str | bytes]]:
    """Every page and picture that is made here, by its place on the site."""
    yield "decisions.md", decisions()
    yield "changelog.md", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    yield "reference/programs.md", program_page()
    for name in FIGURES:
        yield f"figures/{name}.png", draw(name)
    for path in sorted((ROOT / "results").rglob("*")):
        if path.suffix in SHOWN_RESULTS:
            yield path.relative_to(ROOT).as_posix(), path.read_bytes()


def on_files(files: Files, config: Any) -> Files:
    """Adds what is generated."""
    for place, content in generated():
        files.append(File.generated(config, place, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Leads links from where a file lies in the repository to where it lies on the site."""
    place = page.file.src_uri
    if place.startswith("results/") or place == "reference/programs.md":
        # Commands of studies take hours; those of programs are examples.
        title, _, rest = markdown.partition("\n")
        markdown = f"{title}\n\n*Commands on this page are not run by the tests.*\n{rest}"
    lies = {"decisions.md": "WORKSPACE.md", "changelog.md": "CHANGELOG.md"}.get(place)
    lies = lies or (place if place.startswith("results/") else f"docs/{place}")
    here, on_site = posixpath.dirname(lies), posixpath.dirname(place)

    def moved(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(here, match[1]))
        inside = target.removeprefix("docs/")
        if files.get_file_from_path(inside) is not None:
            return posixpath.relpath(inside, on_site or ".") + (match[2] or "")
        if (ROOT / target).exists():
            kind = "tree" if (ROOT / target).is_dir() else "blob"
            return f"{repository()}/{kind}/main/{target}{match[2] or ''}"
        return match[0]

    return _LINK.sub(moved, markdown)


def on_page_content(content: str, **_: Any) -> str:
    r"""Turns \(...\) and \[...\] of arithmatex into MathML."""

    def formula(match: re.Match[str]) -> str:
        display = "block" if match[1] == "div" else "inline"
        source = html.unescape(match[2]).strip().removeprefix("\\(").removesuffix("\\)")
        source = source.removeprefix("\\[").removesuffix("\\]").strip()
        return latex2mathml.converter.convert(source, display=display)

    return re.sub(r'<(div|span) class="arithmatex">(.*?)</\1>', formula, content, flags=re.DOTALL)


# The pictures are drawn with no window system.
os.environ.setdefault("MPLBACKEND", "agg")
