"""Text of a README that says where an adapter or a model comes from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from mos_jax.adapters.storage import AdapterCard
from mos_jax.errors import InputError

# Sections of an adapter's metadata that say what it was made of, other than by training here.
ORIGINS = ("imported", "converted", "combined")


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


def describe_card(card: AdapterCard) -> dict[str, Any]:
    """What an adapter's card says of how it came about: JSON values by name, for people.

    What an adapter was imported from, made into a LoRA from or combined of stands in its metadata
    under one of `ORIGINS`, an object; its entries come first, as `"imported.format"` and so on.
    What is not known is left out.
    """
    config = card.metadata.get("config", {})
    base = config.get("base", {})
    origins = {
        f"{origin}.{name}": value
        for origin in ORIGINS
        for name, value in card.metadata.get(origin, {}).items()
    }
    known = {
        **origins,
        "method": card.method,
        **{f"{card.method}.{name}": value for name, value in card.config.items()},
        "routing_checksum": card.routing_checksum,
        "base": card.metadata.get("base"),
        "base_quantization": base.get("quantize") if isinstance(base, Mapping) else None,
        "base_fingerprint": card.base_fingerprint,
        "task": card.metadata.get("task"),
        "steps": card.metadata.get("steps"),
        **{f"training.{name}": value for name, value in config.get("training", {}).items()},
        "mos_jax": card.metadata.get("mos_jax_version"),
    }
    return {name: value for name, value in known.items() if value is not None and value != {}}
