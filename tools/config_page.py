"""Writes docs/reference/config.md: every field of a config, from the typed sections' docstrings.

Usage: `make fields`. A test fails while the page is not what the sections say.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mos_jax.adapters.methods import METHODS
from mos_jax.data.config import DataConfig
from mos_jax.sweeps.definition import SweepSection
from mos_jax.training.config import PATTERNS, SECTIONS

PAGE = Path(__file__).resolve().parent.parent / "docs" / "reference" / "config.md"
HEAD = """# Fields of a config

*Made by `make fields` from the code; change the docstrings there.*

A program with `--config` takes a Python file whose `get_config()` returns these sections, and every
field of them as a flag, under the name that stands here.

**Not run by the tests** (an example; it needs your file):

```bash
python experiments/train.py --config=configs/own_data.py --config.training.steps=500 \\
    --config.adapter.rank=16
```

The defaults below are those of the sections. A file in `configs/` may set others; what a run used
is in the `config.json` of its folder. A field whose default is None is unset until it is
named. A name that is no field is answered with the nearest one, a value of another type with what
would be right.

A word after a colon goes to `get_config()`: in `configs/quickstart.py:lora` it is the method of the
adapter, in `configs/methods/equal_budget.py:2` the budget's rank.
"""


def fields_of(section: type) -> dict[str, tuple[str, str, str]]:
    """Type, default and meaning of each field of a dataclass, by name.

    The meanings are those of its docstring's `Attributes:`, and of the classes it comes from.
    """
    meanings: dict[str, str] = {}
    for owner in reversed(section.__mro__):
        if dataclasses.is_dataclass(owner):
            meanings |= _attributes(inspect.cleandoc(vars(owner).get("__doc__") or ""))
    hints = typing.get_type_hints(section)
    return {
        field.name: (_kind(field.name, hints[field.name]), _default(field), meanings[field.name])
        for field in dataclasses.fields(section)
    }


def _attributes(doc: str) -> dict[str, str]:
    """The entries of a docstring's last section `Attributes:`, each on one line."""
    _, _, block = doc.partition("\nAttributes:\n")
    found: dict[str, str] = {}
    margin = len(block) - len(block.lstrip(" "))
    name = ""
    for line in block.split("\n\n")[0].splitlines():
        if entry := re.match(rf" {{{margin}}}(\w+): (.*)", line):
            name = entry[1]
            found[name] = entry[2]
        else:
            found[name] += f" {line.strip()}"
    return found


def _kind(name: str, hint: Any) -> str:
    """A type in the words of the page."""
    if name in PATTERNS:
        return "JSON object as text"
    origin = typing.get_origin(hint)
    if origin is typing.Literal:
        return " or ".join(f'"{value}"' for value in typing.get_args(hint))
    if origin in (typing.Union, types.UnionType):
        parts = [p for p in typing.get_args(hint) if p is not type(None)]
        return " or ".join(_kind(name, part) for part in parts)
    if origin is not None and issubclass(origin, Mapping):
        return "mapping"
    return {int: "integer", float: "number", bool: "True or False", str: "text"}[hint]


def _default(field: dataclasses.Field[Any]) -> str:
    value = field.default
    if field.name in PATTERNS:
        return ""
    if value is dataclasses.MISSING:
        assert field.default_factory is not dataclasses.MISSING, field.name
        value = field.default_factory()
    return value if isinstance(value, str) else repr(value)


def _table(prefix: str, section: type) -> Iterator[str]:
    yield "| field | default | type | |"
    yield "|---|---|---|---|"
    for name, (kind, default, meaning) in fields_of(section).items():
        shown = f"`{default}`" if default else "empty"
        yield f"| `{prefix}.{name}` | {shown} | {kind} | {_cell(meaning)} |"


def _cell(text: str) -> str:
    text = text[0].upper() + text[1:]
    text = re.sub(r"docs/(\w+)\.md", r"[docs/\1.md](../\1.md)", text)
    return text.replace("|", r"\|")


def _first_words(section: type) -> str:
    """The first paragraph of a docstring, on one line."""
    return " ".join(inspect.cleandoc(section.__doc__ or "").partition("\n\n")[0].split())


def config_page() -> str:
    """The page, in Markdown."""
    lines = [HEAD]
    for name, section in {**SECTIONS, "data": DataConfig, "sweep": SweepSection}.items():
        lines += [f"## {name}", "", _cell(_first_words(section)), "", *_table(name, section), ""]
    lines += ["## adapter", "", "`adapter.method` names the method, and its fields are these.", ""]
    for method, section in METHODS.items():
        words = f"{_first_words(section)} [Its page](../methods/{method}.md) has the equation."
        lines += [f"### {method}", "", words, "", *_table("adapter", section), ""]
    return "\n".join(lines).rstrip("\n") + "\n"


if __name__ == "__main__":
    PAGE.write_text(config_page(), encoding="utf-8")
