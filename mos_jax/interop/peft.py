"""Adapters as PEFT LoRA folders, written and read without PEFT.

Any method's factors are a LoRA: they are written as they stand, with no SVD and no rounding, so
that the export computes what the adapter computes. Sharing is lost on the way: a pool that all
blocks draw from becomes one pair of matrices for each site.

Axis legend: L adapted blocks, r rank, h = d_in, o = d_out.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from mos_jax.adapters.low_rank import LowRank
from mos_jax.adapters.patterns import differ
from mos_jax.adapters.sites import SITE_TYPES, SiteShape, check_sites
from mos_jax.errors import InputError, naming, suggest
from mos_jax.interop.peft_card import write_card
from mos_jax.interop.peft_config import Number, Site, find_alpha, make_config, tensor_name
from mos_jax.interop.peft_fields import PeftConfig
from mos_jax.interop.peft_folder import (
    ARRAYS_FILE,
    check_destination,
    check_names,
    read_arrays,
    take,
    write_folder,
)
from mos_jax.interop.vllm import SiteFactors, pad_to_rank
from mos_jax.reading import refuse_pickle


def export_peft(
    path: str | os.PathLike[str],
    factors: Mapping[str, LowRank],
    *,
    base_name: str,
    num_layers: int,
    card: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    pad_rank: int | None = None,
    allow_rounding: bool = False,
) -> Path:
    """Writes factors as a LoRA folder that `peft.PeftModel.from_pretrained` loads.

    The factors are written exactly: A and B in fp32 as they are, and of every site an alpha for
    which alpha / r is its scale in fp32 (there always is one, see `find_alpha`). Where ranks or
    scales differ between sites, `rank_pattern` and `alpha_pattern` say so. The folder is written
    beside its place and then renamed, so that an interruption leaves what stood there whole.

    Args:
      path: the folder.
      factors: `adapter.factors()`: by site type, a fp32 [L, r, h], b fp32 [L, r, o], scale fp32
        [L], the blocks they stand for and, where they differ, their ranks; only so many rows of
        each are written.
      base_name: name on the Hugging Face Hub, or folder, of the base for PEFT to load.
      num_layers: blocks of the base.
      card: how the adapter was trained, JSON values by name, for the README.
      overwrite: replace an earlier PEFT adapter at `path`, with all that is in its folder.
      pad_rank: one rank and one alpha for all sites, for servers that know no patterns (vLLM): rows
        of zeros are added, and each site's own scale goes into its B. One of `VLLM_RANKS`.
      allow_rounding: with `pad_rank`, also where a scale is no power of two times the common one,
        so that it cannot go into B without rounding its entries (by at most 6e-8 of each).

    Returns:
      The folder, with adapter_config.json, adapter_model.safetensors and README.md.

    Raises:
      InputError: for no factors, an unknown site type, rank 0, shapes, blocks or ranks that
        disagree, values that are not finite, a card that is not JSON; if the folder holds something
        and `overwrite` is not set, or what it holds is not a PEFT adapter; for a `pad_rank` that is
        not known, too small, or that would round.
    """
    path = Path(path)
    check_target(path, base_name, num_layers, overwrite)
    if not isinstance(factors, Mapping) or not factors:
        raise InputError(
            "factors must be a mapping from site type to LowRank with at least one entry "
            f"(adapter.factors()), got {factors!r}"
        )
    sites: dict[Site, SiteFactors] = {}
    for name, low_rank in factors.items():
        a, b, scale, layers = check_factors(name, low_rank, num_layers)
        for position, layer in enumerate(layers):
            r = low_rank.rank if low_rank.ranks is None else low_rank.ranks[position]
            sites[name, layer] = SiteFactors(a[position, :r], b[position, :r], scale[position])
    notes = [
        "The low-rank factors of an adapter that mos_jax exported, as they stand: they were not "
        "approximated.",
    ]
    if pad_rank is not None:
        sites, rounded = pad_to_rank(sites, pad_rank, allow_rounding)
        notes.append(
            f"Rows of zeros bring every site to rank {pad_rank}, and the sites' own scales are in B"
            + (", which that rounded by at most 6e-8 of each entry." if rounded else ", exactly.")
        )
    arrays: dict[str, np.ndarray] = {}
    site_ranks: dict[Site, int] = {}
    alphas: dict[Site, Number] = {}
    for site, one in sites.items():
        site_ranks[site] = len(one.a)
        alphas[site] = find_alpha(one.scale, len(one.a))
        arrays[tensor_name(site, "A")] = np.ascontiguousarray(one.a)
        arrays[tensor_name(site, "B")] = np.ascontiguousarray(one.b.T)
    config = make_config(site_ranks, alphas, base_name, num_layers)
    notes += [
        f"Each site has matrices of its own here, {sum(x.size for x in arrays.values())} numbers "
        "together; a method that shares parameters between sites trained fewer.",
        "The scale of a site is alpha / rank.",
    ]
    readme = write_card(
        base_name,
        "lora",
        ["LoRA adapter", *notes],
        ["rank", "alpha"],
        {site: (site_ranks[site], alphas[site]) for site in sites},
        card,
    )
    write_folder(path, config, arrays, readme)
    return path


def read_peft_factors(
    path: str | os.PathLike[str], sites: Mapping[str, SiteShape]
) -> dict[str, LowRank]:
    """Reads a LoRA folder that PEFT or `export_peft` wrote.

    Args:
      path: the folder, with adapter_config.json and adapter_model.safetensors.
      sites: all sites of the base, `base.sites`.

    Returns:
      By site type that the LoRA changes: a fp32 [L, r, h], b fp32 [L, r, o], scale fp32 [L] and
      `layers`, None for all blocks. Where blocks differ in rank, r is the largest, the others
      end in rows of zeros, which change nothing, and `ranks` says how many are real.

    Raises:
      InputError: if a file is missing, malformed or a pickle; for anything but a plain LoRA (DoRA,
        modules_to_save, biases, another peft_type, an initialisation that changes the base), by
        name; for targets that are none of the sites; for missing, extra or misshapen tensors.
    """
    folder = Path(path)
    config = read_config(folder, sites)
    if config.kind != "LORA":
        raise InputError(
            f"{config.file}: peft_type = {config.kind!r} is not supported here, only 'LORA' is; "
            "import_peft reads it"
        )
    return read_lora_factors(folder, config, adapted_sites(config, sites))


def read_lora_factors(
    folder: Path, config: PeftConfig, adapted: Mapping[str, SiteShape]
) -> dict[str, LowRank]:
    """`read_peft_factors` of a folder whose configuration was read, for the sites it adapts."""
    arrays = read_arrays(folder)
    chosen = [(name, layer) for name, site in adapted.items() for layer in site.blocks]
    check_names(folder, arrays, (tensor_name(site, part) for site in chosen for part in "AB"))
    factors = {}
    for name, shape in adapted.items():
        own = [(name, layer) for layer in shape.blocks]
        ranks = tuple(map(config.rank, own))
        # Taken before anything is allocated: only now is it known that the ranks are those of the
        # tensors.
        with naming(folder / ARRAYS_FILE):
            pairs = [
                (
                    take(arrays, tensor_name(site, "A"), (r, shape.d_in)),
                    take(arrays, tensor_name(site, "B"), (shape.d_out, r)),
                )
                for site, r in zip(own, ranks, strict=True)
            ]
        a = np.zeros((len(own), max(ranks), shape.d_in), np.float32)
        b = np.zeros((len(own), max(ranks), shape.d_out), np.float32)
        for position, (r, pair) in enumerate(zip(ranks, pairs, strict=True)):
            a[position, :r], b[position, :r] = pair[0], pair[1].T
        factors[name] = LowRank(
            jnp.asarray(a),
            jnp.asarray(b),
            jnp.asarray(np.array([config.scale(site) for site in own], np.float32)),
            shape.layers,
            ranks if differ(ranks) else None,
        )
    return factors


def read_config(folder: Path, sites: Mapping[str, SiteShape]) -> PeftConfig:
    """The checked configuration of a folder that is to be read onto `sites`.

    Raises:
      InputError: for sites that no model has, a pickle, or whatever `PeftConfig` refuses.
    """
    for name in check_sites(sites):
        _check_site_type(name)
    if not folder.is_dir():
        refuse_pickle(folder)
    return PeftConfig.read(folder)


def adapted_sites(config: PeftConfig, sites: Mapping[str, SiteShape]) -> dict[str, SiteShape]:
    """Those of `sites`, all of the base, that the file adapts, with their blocks.

    Raises:
      InputError: for targets that are none of the sites.
    """
    every = [(name, layer) for name, site in sites.items() for layer in site.blocks]
    chosen = config.targets(every)
    adapted = {}
    for name in dict.fromkeys(name for name, _ in chosen):
        own, shape = tuple(layer for n, layer in chosen if n == name), sites[name]
        whole = shape.layers is None and len(own) == shape.num_layers
        adapted[name] = dataclasses.replace(
            shape, num_layers=len(own), layers=None if whole else own
        )
    return adapted


def check_target(path: Path, base_name: str, num_layers: int, overwrite: bool) -> None:
    """Checks what every export is told. Raises InputError."""
    if not isinstance(base_name, str) or not base_name:
        raise InputError(f"base_name must be the name of a model, got {base_name!r}")
    if not isinstance(num_layers, int) or isinstance(num_layers, bool) or num_layers < 1:
        raise InputError(f"num_layers must be an integer >= 1, got {num_layers!r}")
    check_destination(path, overwrite)


def _check_site_type(name: str) -> None:
    if name not in SITE_TYPES:
        raise InputError(f"unknown site type {name!r}; {suggest(name, SITE_TYPES)}")


def check_factors(
    name: str, low_rank: LowRank, num_layers: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, tuple[int, ...]]:
    """The factors of one site type on the host, checked: a, b, scale and the blocks.

    Raises:
      InputError: for shapes, blocks or dtypes that no factors have, or values that are not finite.
    """
    _check_site_type(name)
    a, b, scale = (np.asarray(x) for x in (low_rank.a, low_rank.b, low_rank.scale))
    if (a.ndim, b.ndim, scale.ndim) != (3, 3, 1) or not (
        a.shape[:2] == b.shape[:2] and a.shape[:1] == scale.shape
    ):
        raise InputError(
            f"factors of {name!r} must be a [L, r, h], b [L, r, o] and scale [L], got "
            f"{list(a.shape)}, {list(b.shape)} and {list(scale.shape)}"
        )
    if 0 in a.shape or 0 in b.shape:
        raise InputError(
            f"factors of {name!r} have rank {a.shape[1]}, {a.shape[0]} blocks and widths "
            f"{a.shape[2]} -> {b.shape[2]}; a LoRA needs at least 1 of each"
        )
    for part, array in (("a", a), ("b", b), ("scale", scale)):
        if array.dtype != np.float32:
            raise InputError(f"factors of {name!r}: {part} must be float32, got {array.dtype}")
        if not np.all(np.isfinite(array)):
            raise InputError(f"factors of {name!r}: {part} holds values that are not finite")
    layers = tuple(range(num_layers)) if low_rank.layers is None else low_rank.layers
    if (
        len(layers) != a.shape[0]
        or list(layers) != sorted(set(layers))
        or not 0 <= layers[0] <= layers[-1] < num_layers
    ):
        raise InputError(
            f"factors of {name!r} are {a.shape[0]} entries for the blocks "
            f"{'(all)' if low_rank.layers is None else list(layers)} of a base of {num_layers}"
        )
    if low_rank.ranks is not None:
        _check_ranks(name, low_rank.ranks, a, b)
    return a, b, scale, layers


def _check_ranks(name: str, ranks: tuple[int, ...], a: np.ndarray, b: np.ndarray) -> None:
    blocks, rank = a.shape[:2]
    if len(ranks) != blocks or not all(1 <= r <= rank for r in ranks):
        raise InputError(
            f"factors of {name!r} have the ranks {list(ranks)}; {blocks} blocks of rank 1 to "
            f"{rank} are there"
        )
    for position, r in enumerate(ranks):
        if np.any(a[position, r:]) or np.any(b[position, r:]):
            raise InputError(
                f"factors of {name!r}: entry {position} has rank {r}, but a row beyond it is not 0"
            )
