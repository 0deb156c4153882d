"""Adapters as PEFT folders of the method's own type, for methods that PEFT has.

A LoRA folder (`export_peft`) serves everywhere but has lost what sites share. In its own type an
adapter keeps its size, and PEFT can train on. LoRA, VeRA, VB-LoRA and Uni-LoRA are written, where
their configuration is one that PEFT has.

Axis legend: L adapted blocks, r rank, h = d_in, o = d_out, H vectors in VB-LoRA's bank, b length of
each, D entries of Uni-LoRA's theta.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mos_jax.adapters.adapter import Adapter
from mos_jax.adapters.lora import LoRA
from mos_jax.adapters.storage import adapter_arrays
from mos_jax.adapters.uni_lora import THETA_BOUND, UniLoRA
from mos_jax.adapters.vb_lora import BANK_BOUND, LOGITS_STD, VBLoRA
from mos_jax.adapters.vera import SHARED, VeRA
from mos_jax.errors import InputError
from mos_jax.interop.peft import check_target
from mos_jax.interop.peft_arrays import Arrays, module_order
from mos_jax.interop.peft_card import write_card
from mos_jax.interop.peft_config import Site, common_config, site_tensor, tensor_name
from mos_jax.interop.peft_folder import write_folder
from mos_jax.interop.peft_import import BANK, PROJECTIONS
from mos_jax.interop.peft_uni_lora import THETA, Places, drawn_places, scales_for

NATIVE = {"lora": "LORA", "vera": "VERA", "vb_lora": "VBLORA", "uni_lora": "UNILORA"}
_AS_LORA = "export_peft writes its factors as a LoRA"

_Written = tuple[dict[str, Any], Arrays]


def export_native(
    path: str | os.PathLike[str],
    adapter: Adapter,
    *,
    base_name: str,
    num_layers: int,
    card: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    save_indices: bool = True,
) -> Path:
    """Writes an adapter as the type that PEFT has for its method; what `import_peft` reads.

    Args:
      path: the folder.
      adapter: a LoRA, VB-LoRA or Uni-LoRA, or a VeRA with one pair of projections: with
        `projections="shared"` or of one site type.
      base_name: name on the Hugging Face Hub, or folder, of the base for PEFT to load.
      num_layers: blocks of the base.
      card: how the adapter was trained, JSON values by name, for the README.
      overwrite: replace an earlier PEFT adapter at `path`, with all that is in its folder.
      save_indices: of a Uni-LoRA: write the index too. Without, PEFT draws it from the seed, so
        that only an index that is the drawn one can be left out.

    Returns:
      The folder, with adapter_config.json, adapter_model.safetensors and README.md.

    Raises:
      InputError: for a method that PEFT does not have, or a configuration of one that it cannot
        hold, with what can be done instead; for values that are not finite, a destination or a card
        that `export_peft` would refuse.
    """
    path = Path(path)
    check_target(path, base_name, num_layers, overwrite)
    method = adapter.config.method
    if method not in NATIVE:
        raise InputError(
            f"PEFT has no type for {method!r} (it has {', '.join(NATIVE)}); {_AS_LORA}"
        )
    last = max(site.blocks[-1] for site in adapter.sites.values())
    if last >= num_layers:
        raise InputError(f"the adapter has block {last}, a base of {num_layers} has not")
    for name, array in adapter_arrays(adapter).items():
        if not np.all(np.isfinite(array)):
            raise InputError(f"array {name!r} holds values that are not finite")
    every, kind = module_order(adapter.sites), NATIVE[method]
    if isinstance(adapter, UniLoRA):
        fields, arrays = _write_uni_lora(adapter, save_indices)
    else:
        fields, arrays = _WRITERS[method](adapter)
    config = common_config(kind, fields["r"], every, base_name, num_layers) | fields
    introduction = [
        f"{kind} adapter",
        f"An adapter of the method {method}, with the parameters that it trained and no others.",
    ]
    ranks = {site: (rank,) for site, rank in _ranks(adapter).items()}
    readme = write_card(base_name, kind.lower(), introduction, ["rank"], ranks, card)
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    write_folder(path, config, contiguous, readme)
    return path


def _ranks(adapter: Adapter) -> dict[Site, int]:
    return {
        (name, layer): rank
        for name, site in adapter.sites.items()
        for layer, rank in zip(site.blocks, adapter.site_ranks[name], strict=True)
    }


def _by_site(
    adapter: Adapter, parts: Mapping[str, str], turn: Callable[[str, np.ndarray], np.ndarray]
) -> Arrays:
    """Tensors of every module from arrays [L, ...]: `parts` maps our part to the tensor's name."""
    arrays = adapter_arrays(adapter)
    return {
        site_tensor((name, layer), tensor): turn(part, arrays[f"{part}/{name}"][position])
        for name, site in adapter.sites.items()
        for position, layer in enumerate(site.blocks)
        for part, tensor in parts.items()
    }


def _write_lora(adapter: Adapter) -> _Written:
    assert isinstance(adapter, LoRA)
    config, arrays, written = adapter.config, adapter_arrays(adapter), {}
    for (name, layer), rank in _ranks(adapter).items():
        position = adapter.sites[name].blocks.index(layer)
        written[tensor_name((name, layer), "A")] = arrays[f"a/{name}"][position, :rank]
        written[tensor_name((name, layer), "B")] = arrays[f"b/{name}"][position, :rank].T
    fields = {
        "alpha_pattern": {key: _number(value) for key, value in config.alpha_pattern.items()},
        "init_lora_weights": True,
        "lora_alpha": _number(config.alpha),
        "lora_dropout": 0.0,
        "r": config.rank,
        "rank_pattern": dict(config.rank_pattern),
        "use_dora": False,
        "use_rslora": config.rslora,
    }
    return fields, written


def _number(value: float) -> int | float:
    """As people write it, and as every PEFT reads it: a whole number is an int."""
    return int(value) if float(value).is_integer() else value


def _write_vera(adapter: Adapter) -> _Written:
    assert isinstance(adapter, VeRA)
    config, arrays = adapter.config, adapter_arrays(adapter)
    _refuse_patterns(adapter)
    if config.projections == "shared":
        pair = SHARED
    elif len(adapter.sites) == 1:
        (pair,) = adapter.sites
    else:
        raise InputError(
            'a VeRA with projections="site_type" has a pair of projections for each of its '
            f"{len(adapter.sites)} site types, PEFT's has one for all; {_AS_LORA}; "
            'projections="shared" trains what PEFT can hold'
        )
    written = _by_site(
        adapter, {"d": "vera_lambda_d", "b": "vera_lambda_b"}, lambda _, array: array
    )
    written[PROJECTIONS["a"]] = arrays[f"projection_a/{pair}"]
    written[PROJECTIONS["b"]] = arrays[f"projection_b/{pair}"].T
    fields = {
        "d_initial": config.d_initial,
        "init_weights": True,
        "projection_prng_key": config.projection_seed,
        "r": config.rank,
        "save_projection": True,
        "vera_dropout": 0.0,
    }
    return fields, written


def _write_vb_lora(adapter: Adapter) -> _Written:
    assert isinstance(adapter, VBLoRA)
    config = adapter.config
    _refuse_patterns(adapter)
    written = _by_site(
        adapter,
        {"logits_a": "vblora_logits_A", "logits_b": "vblora_logits_B"},
        # PEFT has the pieces of B before its rank vectors.
        lambda part, array: array if part == "logits_a" else array.swapaxes(0, 1),
    )
    written[BANK] = adapter_arrays(adapter)["bank"]
    fields = {
        "init_logits_std": LOGITS_STD,
        "init_vector_bank_bound": BANK_BOUND,
        "num_vectors": config.num_vectors,
        "r": config.rank,
        "save_only_topk_weights": False,
        "topk": config.top_k,
        "vblora_dropout": 0.0,
        "vector_length": config.vector_length,
    }
    return fields, written


def _write_uni_lora(adapter: UniLoRA, save_indices: bool) -> _Written:
    config = adapter.config
    _refuse_patterns(adapter)
    theta, index = adapter_arrays(adapter)["theta"], _places(adapter)
    if adapter.scales is None:
        every = np.concatenate([side.ravel() for pair in index.values() for side in pair])
        # As such an adapter rounds them.
        scales = (np.bincount(every) ** -0.5).astype(np.float32)
    else:
        scales = np.asarray(adapter.scales[...])
    written = {THETA: theta}
    if save_indices:
        for (name, layer), pair in index.items():
            for side, places in zip("AB", pair, strict=True):
                stem = site_tensor((name, layer), "unilora_")
                written[f"{stem}indices_{side}"] = places.astype(np.int64)
                written[f"{stem}scales_{side}"] = scales[places]
    else:
        drawn = drawn_places(adapter.sites, config, config.count_entries(adapter.sites))
        same = all(
            np.array_equal(ours, theirs)
            for site, pair in index.items()
            for ours, theirs in zip(pair, drawn[site], strict=True)
        )
        if not same or np.any(scales != scales_for(index, config.theta_length)):
            raise InputError(
                "save_indices=False: the index of this adapter is not the one that PEFT would draw "
                f"from proj_seed = {config.routing_seed}; write it with save_indices=True"
            )
    fields = {
        "init_theta_d_bound": THETA_BOUND,
        "init_weights": True,
        "proj_seed": config.routing_seed,
        "r": config.rank,
        "save_indices": save_indices,
        "theta_d_length": config.theta_length,
        "unilora_dropout": 0.0,
    }
    return fields, written


def _places(adapter: UniLoRA) -> Places:
    tables = adapter.tables()
    return {
        (name, layer): [tables[f"index_a/{name}"][k], tables[f"index_b/{name}"][k].T]
        for name, site in adapter.sites.items()
        for k, layer in enumerate(site.blocks)
    }


def _refuse_patterns(adapter: Adapter) -> None:
    for field in ("rank_pattern", "alpha_pattern"):
        if getattr(adapter.config, field):
            raise InputError(
                f"{adapter.config.method}: PEFT's type has no {field}, this adapter has "
                f"{dict(getattr(adapter.config, field))}; {_AS_LORA}"
            )


_WRITERS: dict[str, Callable[[Adapter], _Written]] = {
    "lora": _write_lora,
    "vera": _write_vera,
    "vb_lora": _write_vb_lora,
}
