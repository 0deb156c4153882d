"""Folders of many tenants with random weights: what a step costs does not depend on them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from safetensors.numpy import save as format_safetensors

from mos_jax.adapters.adapter import AdapterConfig
from mos_jax.adapters.methods import create_adapter
from mos_jax.adapters.storage import (
    ARRAYS_FILE,
    CARD_FILE,
    FORMAT,
    FORMAT_VERSION,
    adapter_arrays,
    make_card,
)
from mos_jax.files import fresh_folder
from mos_jax.models.base import Base


def write_tenants(
    folder: Path,
    base: Base,
    config: AdapterConfig,
    count: int,
    *,
    distinct: int | None = None,
    size: float = 0.02,
    prefix: str = "t",
) -> list[str]:
    """Makes the folders of `count` tenants that differ in their trained arrays alone.

    Those that are there already stay, so that an interrupted call can be made again. They are the
    folders that `save_adapter` writes, without waiting for the disk after each.

    Args:
      folder: holds a folder for each.
      base: what they belong to.
      config: of all.
      count: how many.
      distinct: of them have arrays of their own; the others are links to these. Default: all.
      size: standard deviation of the trained arrays.
      prefix: of their names, which are numbered.

    Returns:
      Their names.
    """
    names = [f"{prefix}{number:04d}" for number in range(count)]
    missing = [name for name in names if not (folder / name).exists()]
    if not missing:
        return names
    folder.mkdir(parents=True, exist_ok=True)
    adapter = create_adapter(config, base.sites, jax.random.key(0))
    arrays = adapter_arrays(adapter)
    trained = {
        "/".join(map(str, path))
        for path, variable in nnx.to_flat_state(nnx.state(adapter))
        if isinstance(variable, nnx.Param)
    }
    card = dataclasses.asdict(make_card(adapter, "", base_fingerprint=base.fingerprint))
    own = count if distinct is None else min(distinct, count)
    for number, name in enumerate(names):
        if name not in missing:
            continue
        if number >= own:
            (folder / name).symlink_to(names[number % own], target_is_directory=True)
            continue
        rng = np.random.default_rng([7, number])
        drawn = {
            path: rng.standard_normal(array.shape, np.float32) * np.float32(size)
            if path in trained
            else array
            for path, array in arrays.items()
        }
        payload = format_safetensors(drawn, metadata={"format": FORMAT})
        card["arrays_sha256"] = hashlib.sha256(payload).hexdigest()
        text = json.dumps({"format": FORMAT, "format_version": FORMAT_VERSION, **card})
        with fresh_folder(folder / name) as fresh:
            (fresh / ARRAYS_FILE).write_bytes(payload)
            (fresh / CARD_FILE).write_text(text, encoding="utf-8")
    return names
