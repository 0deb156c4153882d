import base64
import html
import re
import sys
from html.parser import HTMLParser

import pytest

from mos_jax import InputError
from mos_jax.reporting.page import markdown_to_html

PNG = b"\x89PNG not really"
MARKDOWN = """# Title

![what it shows](a.png)

| arm | value |
| --- | ---: |
| -ss | 1 \\| 2 |

An error: `<script>alert(1)</script>` and <b>this</b>.
"""


class Collector(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.links = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "srcset")]


def collected(page):
    collector = Collector()
    collector.feed(page)
    return collector


def test_the_page_holds_its_pictures_and_points_nowhere_else():
    page = markdown_to_html(MARKDOWN, "A <title>", {"a.png": PNG})
    found = collected(page)
    assert found.links == [f"data:image/png;base64,{base64.b64encode(PNG).decode()}"]
    assert not re.search(r"https?:|url\(|@import", page)
    assert "<title>A &lt;title&gt;</title>" in page
    assert {"h1", "table", "img", "style"} <= set(found.tags)
    assert "prefers-color-scheme: dark" in page


def test_html_in_the_markdown_is_shown_not_obeyed():
    page = markdown_to_html(MARKDOWN, "t", {})
    assert not {"script", "b"} & set(collected(page).tags)
    assert html.escape("<script>alert(1)</script>") in page


def test_without_markdown_it_the_line_that_installs_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "markdown_it", None)
    with pytest.raises(InputError, match=r"pip install 'mos_jax\[report\]'"):
        markdown_to_html("", "", {})
