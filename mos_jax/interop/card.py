"""Text of a README that says where an adapter or a model comes from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from mos_jax.errors import InputError


def card_lines(card: Mapping[str, Any] | None) -> list[str]:
    """Returns a Markdown list of JSON values by name, or a sentence where there are none.

    Raises:
      InputError: for a value that is not JSON.
    """
    if not card:
        return ["Not recorded."]
    lines = []
    for key, value in card.items():
        try:
            text = json.dumps(value, allow_nan=False, ensure_ascii=False)
        except (TypeError, ValueError) as error:
            raise InputError(
                f"card: {key!r} is not a JSON value ({error}), got {value!r}"
            ) from None
        if isinstance(value, str):
            text = " ".join(value.split())  # one line, so that it cannot open a heading
        elif isinstance(value, (dict, list)):
            text = f"`{text}`"
        lines.append(f"- **{' '.join(str(key).split())}**: {text}")
    return lines
