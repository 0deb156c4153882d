"""The model card of an exported adapter: what it is, and how it was trained."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mos_jax.interop.card import card_lines


def write_card(
    base_name: str,
    tag: str,
    introduction: Sequence[str],
    columns: Sequence[str],
    sites: Mapping[tuple[str, int], Sequence[Any]],
    card: Mapping[str, Any] | None,
) -> str:
    """Returns the text of README.md.

    Args:
      base_name: of the base, as PEFT loads it.
      tag: PEFT's name of the type of adapter, in small letters.
      introduction: title, and paragraphs of one line each.
      columns: what is told of every site, such as "rank".
      sites: by (site type, block), the values of these columns.
      card: how it was trained, JSON values by name; None if that is not known.

    Raises:
      InputError: if the card is not JSON.
    """
    lines = [
        "---",
        f"base_model: {json.dumps(base_name)}",
        "library_name: peft",
        "pipeline_tag: text-generation",
        "tags:",
        f"- {json.dumps('base_model:adapter:' + base_name)}",
        f"- {tag}",
        "- mos_jax",
        "---",
        "",
        f"# {introduction[0]}",
        "",
        *introduction[1:],
        "",
        "## How it was trained",
        "",
        *card_lines(card),
        "",
        "## Sites",
        "",
        *_table(columns, sites),
        "",
        "## Use",
        "",
        "```python",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        "",
        f"base = AutoModelForCausalLM.from_pretrained({json.dumps(base_name)})",
        'model = PeftModel.from_pretrained(base, "<this folder>")',
        "```",
    ]
    return "\n".join(lines) + "\n"


def _table(columns: Sequence[str], sites: Mapping[tuple[str, int], Sequence[Any]]) -> Iterable[str]:
    yield f"| {' | '.join(('site', 'blocks', *columns))} |"
    yield "| --- " * (2 + len(columns)) + "|"
    for name in dict.fromkeys(name for name, _ in sites):
        own = {layer: values for (n, layer), values in sites.items() if n == name}
        cells = [list(own), *(sorted(set(values)) for values in zip(*own.values(), strict=True))]
        yield f"| {name} | {' | '.join(', '.join(map(str, cell)) for cell in cells)} |"
