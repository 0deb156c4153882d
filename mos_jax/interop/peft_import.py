"""PEFT folders as adapters that can be trained on, saved and exported again.

A LoRA becomes a `LoRA`, and VeRA, VB-LoRA and Uni-LoRA become the methods of the same name, in the
form that PEFT defines: nothing is approximated, and what PEFT would compute from the folder is what
the adapter computes.

Axis legend: L adapted blocks, r rank, h = d_in, o = d_out, H vectors in VB-LoRA's bank, b length of
each, k picked, D trained parameters of Uni-LoRA.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from mos_jax.adapters.adapter import Adapter
from mos_jax.adapters.lora import LoRAConfig
from mos_jax.adapters.low_rank import LowRank
from mos_jax.adapters.sites import Sites
from mos_jax.adapters.vb_lora import VBLoRAConfig
from mos_jax.adapters.vera import SHARED, VeRAConfig
from mos_jax.errors import InputError, naming
from mos_jax.interop.as_lora import lora_from_factors
from mos_jax.interop.peft import adapted_sites, read_config, read_lora_factors
from mos_jax.interop.peft_arrays import filled_adapter, module_order, stack_tensors
from mos_jax.interop.peft_config import Site, site_tensor
from mos_jax.interop.peft_fields import PeftConfig
from mos_jax.interop.peft_folder import check_names, read_arrays, take, take_index
from mos_jax.interop.peft_uni_lora import import_uni_lora
from mos_jax.models.base import Base

BANK = "base_model.vblora_vector_bank"
PROJECTIONS = {"a": "base_model.vera_A", "b": "base_model.vera_B"}
AS_LORA = "as_lora=True makes a LoRA of its factors, which can be trained on"


def import_peft(
    path: str | os.PathLike[str], base: Base | Sites, *, as_lora: bool = False
) -> Adapter:
    """Makes an adapter of a PEFT folder.

    Args:
      path: the folder, with adapter_config.json and adapter_model.safetensors.
      base: the base it is for, or all its sites (`base.sites`).
      as_lora: whatever the type, make a LoRA of its factors; of a VB-LoRA that was saved with
        `save_only_topk_weights` nothing else can be made.

    Returns:
      The adapter, of the sites and blocks that the folder adapts; its arrays are those of the file,
      in fp32. `export_native` writes the same folder again.

    Raises:
      InputError: if a file is missing, malformed or a pickle; for another type than LoRA, VeRA,
        VB-LoRA and Uni-LoRA, or more than its plain form, by name; for a VeRA without its
        projections and a VB-LoRA without its logits, with what can be done; for targets that are
        none of the sites; for missing, extra or misshapen tensors.
    """
    sites = base.sites if isinstance(base, Base) else base
    with naming(path):
        return _import(Path(path), sites, as_lora)


def _import(folder: Path, sites: Sites, as_lora: bool) -> Adapter:
    config = read_config(folder, sites)
    adapted = adapted_sites(config, sites)
    if as_lora:
        return lora_from_factors(_factors(folder, config, adapted), sites)
    if config.kind == "VBLORA" and config.raw.get("save_only_topk_weights"):
        raise InputError(
            f"{config.file}: save_only_topk_weights = true; the folder has the weights of the "
            "picked vectors but not the logits that VB-LoRA trains, so that it is good for use and "
            f"merging only; {AS_LORA}"
        )
    return _BUILDERS[config.kind](folder, config, adapted)


def peft_facts(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a folder's configuration says, for the card of what is made of it. JSON values.

    Raises:
      InputError: if it is missing, malformed, or of what is not read here.
    """
    config = PeftConfig.read(Path(path))
    raw = config.raw
    facts = {"format": f"PEFT {config.kind}", "rank": raw["r"]}
    for field in (
        "lora_alpha",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "projection_prng_key",
        "num_vectors",
        "vector_length",
        "topk",
        "save_only_topk_weights",
        "theta_d_length",
        "proj_seed",
        "save_indices",
        "exclude_modules",
        "layers_to_transform",
        "base_model_name_or_path",
        "peft_version",
    ):
        value = raw.get(field)
        # Not `in`, for which a seed or a block 0 would be False.
        if value is not None and value is not False and value != {} and value != []:
            facts[field] = value
    targets = raw["target_modules"]
    facts["target_modules"] = targets if isinstance(targets, str) else sorted(targets)
    return facts


def _factors(folder: Path, config: PeftConfig, adapted: Sites) -> dict[str, LowRank]:
    if config.kind == "LORA":
        return read_lora_factors(folder, config, adapted)
    if config.kind == "VBLORA" and config.raw.get("save_only_topk_weights"):
        return _compact_vb_lora(folder, config, adapted)
    return _BUILDERS[config.kind](folder, config, adapted).factors()


def _import_lora(folder: Path, config: PeftConfig, sites: Sites) -> Adapter:
    factors = read_lora_factors(folder, config, sites)
    raw, every = config.raw, module_order(sites)
    if min(raw["lora_alpha"], *map(config.alpha, every)) <= 0:
        return lora_from_factors(factors, sites)
    ours = LoRAConfig(
        rank=raw["r"],
        alpha=raw["lora_alpha"],
        rslora=bool(raw.get("use_rslora")),
        rank_pattern=config.pattern("rank_pattern", every),
        alpha_pattern=config.pattern("alpha_pattern", every),
    )
    found = {f"a/{name}": np.asarray(f.a) for name, f in factors.items()}
    found |= {f"b/{name}": np.asarray(f.b) for name, f in factors.items()}
    return filled_adapter(ours, sites, found)


def _import_vera(folder: Path, config: PeftConfig, sites: Sites) -> Adapter:
    raw, rank = config.raw, config.raw["r"]
    arrays = read_arrays(folder)
    if not raw.get("save_projection", True) or not set(PROJECTIONS.values()) <= set(arrays):
        raise InputError(
            f"{folder}: a VeRA without its projections (save_projection = false): PEFT draws them "
            f"again from projection_prng_key = {raw['projection_prng_key']} with PyTorch's "
            "generator, whose stream is not reproduced here; load it with PEFT, set "
            "peft_config['default'].save_projection = True and save it again"
        )
    parts = ("vera_lambda_d", "vera_lambda_b")
    wanted = {site_tensor(site, part) for site in module_order(sites) for part in parts}
    check_names(folder, arrays, wanted | set(PROJECTIONS.values()))
    d_in, d_out = (
        max(widths) for widths in zip(*((s.d_in, s.d_out) for s in sites.values()), strict=True)
    )
    found = {
        f"projection_a/{SHARED}": take(arrays, PROJECTIONS["a"], (rank, d_in)),
        f"projection_b/{SHARED}": take(arrays, PROJECTIONS["b"], (d_out, rank)).T,
    }
    for name, site in sites.items():
        found[f"d/{name}"] = stack_tensors(arrays, name, site, "vera_lambda_d", (rank,))
        found[f"b/{name}"] = stack_tensors(arrays, name, site, "vera_lambda_b", (site.d_out,))
    ours = VeRAConfig(
        rank=rank,
        d_initial=float(raw["d_initial"]),
        projection_seed=raw["projection_prng_key"],
        projections="shared",
    )
    return filled_adapter(ours, sites, found)


def _vb_lora_config(config: PeftConfig, sites: Sites) -> VBLoRAConfig:
    raw = config.raw
    ours = VBLoRAConfig(
        rank=raw["r"],
        num_vectors=raw["num_vectors"],
        vector_length=raw["vector_length"],
        top_k=raw["topk"],
    )
    ours.check_widths(sites)
    return ours


def _import_vb_lora(folder: Path, config: PeftConfig, sites: Sites) -> Adapter:
    ours = _vb_lora_config(config, sites)
    r, b, count = ours.rank, ours.vector_length, ours.num_vectors
    arrays = read_arrays(folder)
    parts = ("vblora_logits_A", "vblora_logits_B")
    check_names(
        folder,
        arrays,
        {BANK} | {site_tensor(s, part) for s in module_order(sites) for part in parts},
    )
    found = {"bank": take(arrays, BANK, (count, b))}
    for name, site in sites.items():
        shape_a, shape_b = (r, site.d_in // b, count), (site.d_out // b, r, count)
        found[f"logits_a/{name}"] = stack_tensors(arrays, name, site, parts[0], shape_a)
        logits_b = stack_tensors(arrays, name, site, parts[1], shape_b)
        found[f"logits_b/{name}"] = logits_b.swapaxes(1, 2)
    return filled_adapter(ours, sites, found)


def _compact_vb_lora(folder: Path, config: PeftConfig, sites: Sites) -> dict[str, LowRank]:
    """Factors from the picked vectors and their weights, of which the last is 1 less the others."""
    ours = _vb_lora_config(config, sites)
    r, b, k = ours.rank, ours.vector_length, ours.top_k
    arrays = read_arrays(folder)
    parts = [
        f"vblora_logits_{side}_topk_{what}" for side in "AB" for what in ("indices", "weights")
    ]
    check_names(
        folder,
        arrays,
        {BANK} | {site_tensor(s, part) for s in module_order(sites) for part in parts},
    )
    bank = take(arrays, BANK, (ours.num_vectors, b))

    def mixed(site: Site, side: str, shape: tuple[int, int]) -> np.ndarray:
        stem = site_tensor(site, f"vblora_logits_{side}_topk_")
        index = take_index(arrays, stem + "indices", (*shape, k), ours.num_vectors)
        weights = take(arrays, stem + "weights", (*shape, k - 1))
        last = np.float32(1) - weights.sum(-1, keepdims=True, dtype=np.float32)
        return (np.concatenate([weights, last], -1)[..., None] * bank[index]).sum(-2)

    factors = {}
    for name, site in sites.items():
        own = [(name, layer) for layer in site.blocks]
        a = [mixed(s, "A", (r, site.d_in // b)).reshape(r, site.d_in) for s in own]
        rows = [mixed(s, "B", (site.d_out // b, r)) for s in own]
        factors[name] = LowRank(
            jnp.asarray(np.stack(a)),
            jnp.asarray(np.stack([x.swapaxes(0, 1).reshape(r, site.d_out) for x in rows])),
            jnp.ones(len(own), jnp.float32),
            site.layers,
        )
    return factors


_BUILDERS = {
    "LORA": _import_lora,
    "VERA": _import_vera,
    "VBLORA": _import_vb_lora,
    "UNILORA": import_uni_lora,
}
