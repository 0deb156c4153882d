"""Adapters on disk: of which kind they are, and their arrays ready for a slot.

Tenants of one *kind* have method, configuration, sites, scales and routing tables in common. The
first of a kind is loaded and checked whole; of those after it the card tells the kind, and what it
says of their arrays is checked when they are read.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from mos_jax.adapters.adapter import Adapter
from mos_jax.adapters.bank import BASE_NAME
from mos_jax.adapters.belonging import check_base
from mos_jax.adapters.low_rank import LowRank
from mos_jax.adapters.mos import MoS
from mos_jax.adapters.sites import Sites
from mos_jax.adapters.storage import CARD_FILE, AdapterCard, load_adapter, read_arrays, read_card
from mos_jax.errors import InputError
from mos_jax.interop.peft import read_peft_factors
from mos_jax.interop.peft_config import CONFIG_FILE as PEFT_CONFIG
from mos_jax.interop.peft_folder import ARRAYS_FILE as PEFT_ARRAYS

MAX_NAME = 64
_NAME = re.compile(rf"[A-Za-z0-9](?:[A-Za-z0-9._-]{{0,{MAX_NAME - 1}}})")
PEFT = "peft"


@dataclasses.dataclass(frozen=True)
class Kind:
    """What some tenants have in common.

    Attributes:
      key: tells kinds apart.
      template: MoS: configuration and routing tables, trained arrays are abstract. Else None.
      ranks: by site type, the largest rank of a tenant's factors.
      stored: bytes of one tenant's arrays on disk.
    """

    key: str
    template: MoS | None
    ranks: Mapping[str, int]
    stored: int


def check_tenant_name(name: str) -> None:
    """Raises InputError unless `name` can be that of a tenant; paths cannot."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        shown = name[:MAX_NAME] + "..." if isinstance(name, str) and len(name) > MAX_NAME else name
        raise InputError(
            f"the name of a tenant has 1 to {MAX_NAME} letters, digits, '.', '_' and '-', and "
            f"starts with a letter or digit; got {shown!r} ({BASE_NAME!r} is the base)"
        )


def is_peft(folder: Path) -> bool:
    """Whether a folder holds an adapter of PEFT and none of this library."""
    return (folder / PEFT_CONFIG).is_file() and not (folder / CARD_FILE).is_file()


def read_key(folder: Path, sites: Sites, base_fingerprint: str | None) -> tuple[str, str]:
    """The key of an adapter's kind, and a digest of all that its factors depend on.

    Both come from the card alone, which has the digest of its file; of PEFT, whose configuration
    has none, the digest is that of both files.

    Raises:
      InputError: for no adapter, a malformed card, or one for another base.
    """
    if is_peft(folder):
        return PEFT, _digest_of_peft(folder)
    card = read_card(folder)
    check_base(folder, card, sites, base_fingerprint)
    return _key(card), _digest(card)


def _key(card: AdapterCard) -> str:
    shapes = {name: dataclasses.astuple(site) for name, site in card.sites.items()}
    common = [card.method, card.config, shapes, card.scale, card.routing_checksum]
    return json.dumps(common, sort_keys=True)


def _digest(card: AdapterCard) -> str:
    return hashlib.sha256(f"{_key(card)} {card.arrays_sha256}".encode()).hexdigest()


def _digest_of_peft(folder: Path) -> str:
    files = [folder / PEFT_CONFIG, folder / PEFT_ARRAYS]
    # What is missing or no file is refused by whoever reads it.
    parts = [hashlib.sha256(f.read_bytes()).hexdigest() for f in files if f.is_file()]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()


def make_kind(key: str, folder: Path, sites: Sites, base_fingerprint: str | None) -> Kind:
    """The kind of which the adapter in `folder` is the first.

    Raises:
      InputError: if the adapter is damaged or for another base.
    """
    if key == PEFT:
        factors = read_peft_factors(folder, sites)
        ranks = _ranks(factors)  # the card does not tell them, so it is no kind by itself
        return Kind(f"{PEFT} {sorted(ranks.items())}", None, ranks, 0)
    adapter = load_adapter(folder, sites=sites, base_fingerprint=base_fingerprint)
    shapes = jax.eval_shape(lambda: adapter.factors())
    template = _without_values(adapter) if isinstance(adapter, MoS) else None
    stored = sum(leaf.nbytes for leaf in jax.tree.leaves(adapter))
    return Kind(key, template, _ranks(shapes), stored)


def read_tenant_arrays(
    kind: Kind, digest: str, folder: Path, sites: Sites, base_fingerprint: str | None
) -> dict[str, np.ndarray]:
    """The arrays of a MoS tenant, whose file is what its card says and whose card is of the kind.

    Raises:
      InputError: for another base, another kind or other arrays than when it was registered, or a
        file that is not the one that the card describes.
    """
    card = read_card(folder)
    check_base(folder, card, sites, base_fingerprint)
    if _key(card) != kind.key:
        raise InputError(
            f"{folder} has another configuration or routing table than when it was registered; "
            "remove the tenant and register it again"
        )
    arrays = read_arrays(folder, card, kind.stored)
    _check_unchanged(folder, digest, _digest(card))
    return arrays


def read_factors(
    digest: str, folder: Path, sites: Sites, base_fingerprint: str | None
) -> Mapping[str, LowRank]:
    """The factors of a tenant of any other kind.

    Raises:
      InputError: if the adapter is damaged, for another base, or another than when it was
        registered.
    """
    factors: Mapping[str, LowRank]
    if is_peft(folder):
        factors = read_peft_factors(folder, sites)
    else:
        adapter: Adapter = load_adapter(folder, sites=sites, base_fingerprint=base_fingerprint)
        factors = adapter.factors()
    # Afterwards, so that a folder that is replaced meanwhile is seen, too.
    _check_unchanged(folder, digest, read_key(folder, sites, base_fingerprint)[1])
    return factors


def _check_unchanged(folder: Path, known: str, found: str) -> None:
    if found != known:
        raise InputError(
            f"{folder} has changed on disk since it was registered; unload the tenant and load it "
            "again"
        )


def adapter_folders(folder: str | os.PathLike[str]) -> list[Path]:
    """The folders in a folder, by name, without hidden ones. Raises InputError if it is none."""
    path = Path(folder)
    if not path.is_dir():
        raise InputError(f"{path} is not a folder; give one that holds a folder for each adapter")
    return sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))


def _without_values(adapter: MoS) -> MoS:
    """The adapter with its routing tables, and of its trained arrays the shapes alone."""
    graphdef, *states = nnx.split(adapter, nnx.Param, ...)
    trained, frozen = states
    return nnx.merge(graphdef, jax.eval_shape(lambda: trained), frozen)


def _ranks(factors: Mapping[str, Any]) -> dict[str, int]:
    return {name: f.a.shape[-2] for name, f in factors.items()}
