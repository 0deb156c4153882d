"""The report as one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from typing import Any

from mos_jax.errors import InputError

STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --paper: #ffffff; --line: #d0d7de;
  --band: #f6f8fa; --link: #0550ae; }
@media (prefers-color-scheme: dark) { :root { --ink: #d8dee4; --paper: #16191d; --line: #3a4149;
  --band: #20252b; --link: #79b8ff; } }
body { margin: 0 auto; max-width: 62rem; padding: 1.5rem 1.25rem 4rem; color: var(--ink);
  background: var(--paper); font: 16px/1.55 system-ui, sans-serif; }
h1, h2, h3 { line-height: 1.25; margin: 2em 0 0.6em; }
h1 { margin-top: 0.5em; }
h2 { border-bottom: 1px solid var(--line); padding-bottom: 0.25em; }
a { color: var(--link); }
table { display: block; overflow-x: auto; border-collapse: collapse; margin: 1em 0;
  font-size: 0.86rem; font-variant-numeric: tabular-nums; }
th, td { border: 1px solid var(--line); padding: 0.3em 0.6em; vertical-align: top; }
th { background: var(--band); text-align: left; }
td:first-child { white-space: nowrap; }
code, pre { font-family: ui-monospace, monospace; font-size: 0.88em; background: var(--band); }
code { padding: 0.1em 0.3em; border-radius: 3px; }
pre { padding: 0.8em 1em; overflow-x: auto; }
pre code { padding: 0; background: none; }
img { display: block; max-width: 100%; height: auto; margin: 1em auto; background: #ffffff;
  border-radius: 4px; }
"""


def markdown_to_html(markdown: str, title: str, pictures: Mapping[str, bytes]) -> str:
    """Turns the report into a page whose pictures are part of it.

    Args:
      markdown: the report; raw HTML in it is shown, not obeyed.
      title: of the page.
      pictures: PNGs by the file name with which the Markdown refers to them.

    Raises:
      InputError: if markdown-it-py is not installed, with the line that installs it.
    """
    try:
        from markdown_it import MarkdownIt
    except ImportError:
        raise InputError(
            "the page of a report needs markdown-it-py; install it with pip install "
            "'mos_jax[report]'"
        ) from None
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = parser.parse(markdown)
    _embed(tokens, pictures)
    body = parser.renderer.render(tokens, parser.options, {})
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"{body}</body>\n</html>\n"
    )


def _embed(tokens: Sequence[Any], pictures: Mapping[str, bytes]) -> None:
    for token in tokens:
        if token.type == "image" and token.attrs["src"] in pictures:
            encoded = base64.b64encode(pictures[token.attrs["src"]]).decode("ascii")
            token.attrs["src"] = f"data:image/png;base64,{encoded}"
        _embed(token.children or (), pictures)
