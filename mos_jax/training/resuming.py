"""Whether a run may go on in a folder that holds one already."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mos_jax.errors import InputError

# Fields that may differ when a run is resumed: none changes what was computed so far.
MAY_CHANGE = (
    "training.steps",
    "training.assembly",
    "evaluation",
    "logging",
    "checkpoint",
    "mesh",
    "base.remat",
    "base.attention",
    "base.logits_mib",
)


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Fields that differ between two resolved configurations: dotted name -> (old, new)."""
    found: dict[str, Any] = {}
    for key in sorted(set(old) | set(new)):
        name, a, b = f"{prefix}{key}", old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found |= differences(a, b, f"{name}.")
        elif a != b:
            found[name] = (a, b)
    return found


def check_resumable(old: Mapping[str, Any], new: Mapping[str, Any], workdir: str) -> list[str]:
    """Checks that a run with configuration `new` may go on in the folder of a run with `old`.

    Returns:
      The changes, in words.

    Raises:
      InputError: naming every field that may not change.
    """
    changes = differences(old, new)
    refused = {
        name: pair
        for name, pair in changes.items()
        if not any(name == free or name.startswith(f"{free}.") for free in MAY_CHANGE)
    }
    if refused:
        listed = "; ".join(f"{name} was {a!r}, now {b!r}" for name, (a, b) in refused.items())
        raise InputError(
            f"{workdir} holds a run with another config: {listed}. Choose another --workdir, or "
            f"restore these fields (only {', '.join(MAY_CHANGE)} may change on resuming)"
        )
    return [f"{name}: {a!r} -> {b!r}" for name, (a, b) in changes.items()]
