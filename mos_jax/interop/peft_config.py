"""What is written into PEFT's `adapter_config.json`, and how PEFT names modules and tensors.

A *module* is the dotted name of one linear layer, `model.layers.3.self_attn.q_proj`; a *site* is
(site type, block index).
"""

from __future__ import annotations

import collections
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from mos_jax.adapters.sites import module_name

CONFIG_FILE = "adapter_config.json"

Site = tuple[str, int]
Number = int | float


def _short_name(site: Site) -> str:
    """The module as patterns and targets name it; PEFT looks at the end of a name only."""
    return module_name(*site).removeprefix("model.")


def site_tensor(site: Site, part: str) -> str:
    """Name of a site's tensor `part`, such as `"vera_lambda_d"`, in the file of weights."""
    return f"base_model.model.{module_name(*site)}.{part}"


def tensor_name(site: Site, part: str) -> str:
    """Name of a site's tensor of a LoRA in the file of weights; `part` is "A" or "B"."""
    return site_tensor(site, f"lora_{part}.weight")


def find_alpha(scale: float | np.floating, rank: int) -> Number:
    """Returns the shortest decimal alpha for which alpha / rank rounds to the fp32 `scale`.

    There always is one, and nothing ever has to be folded into B: the product of an fp32 number
    and a rank below 2^29 is exact in fp64, which is what JSON and PEFT hold alpha in. A whole
    alpha comes as an int.
    """
    wanted = np.float32(scale)
    exact = float(wanted) * rank
    for digits in range(1, 18):
        alpha = float(f"{exact:.{digits}g}")
        with np.errstate(over="ignore"):
            found = np.float32(alpha / rank)
        if found == wanted:
            break
    return int(alpha) if alpha.is_integer() and abs(alpha) < 2**53 else alpha


def make_config(
    ranks: Mapping[Site, int], alphas: Mapping[Site, Number], base_name: str, num_layers: int
) -> dict[str, Any]:
    """Returns the JSON object for a LoRA of these ranks and alphas.

    Only fields that every PEFT since 0.9 knows are in it; newer ones are left at their defaults.

    Args:
      ranks: rank of every adapted site.
      alphas: alpha of the same sites; their scale is alpha / rank.
      base_name: what PEFT shall load as the base.
      num_layers: blocks of the base.
    """
    rank, rank_pattern = default_and_pattern(ranks)
    alpha, alpha_pattern = default_and_pattern(alphas)
    fields = {
        "alpha_pattern": alpha_pattern,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "rank_pattern": rank_pattern,
        "use_dora": False,
        "use_rslora": False,
    }
    return common_config("LORA", rank, ranks, base_name, num_layers) | fields


def common_config(
    kind: str, rank: int, sites: Iterable[Site], base_name: str, num_layers: int
) -> dict[str, Any]:
    """Returns the fields that all types of PEFT have: what is adapted, and of which base.

    Args:
      kind: PEFT's name of the type, `"LORA"`.
      rank: r.
      sites: the adapted ones.
      base_name: what PEFT shall load as the base.
      num_layers: blocks of the base.
    """
    sites = list(sites)
    names = list(dict.fromkeys(name for name, _ in sites))
    blocks = {name: sorted(layer for n, layer in sites if n == name) for name in names}
    targets, layers = sorted(names), blocks[names[0]]
    if any(blocks[name] != layers for name in names):
        # `layers_to_transform` holds for all types alike, so each module is named instead.
        targets = [_short_name(site) for site in sites]
        layers = list(range(num_layers))
    return {
        "auto_mapping": None,
        "base_model_name_or_path": base_name,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "layers_pattern": None,
        "layers_to_transform": None if len(layers) == num_layers else layers,
        "modules_to_save": None,
        "peft_type": kind,
        "r": rank,
        "revision": None,
        "target_modules": targets,
        "task_type": "CAUSAL_LM",
    }


def default_and_pattern(values: Mapping[Site, Any]) -> tuple[Any, dict[str, Any]]:
    """The commonest value, and the others by site type or, where a type is mixed, by module.

    The second is a pattern as PEFT matches it; no key of it matches the module of another's site.
    """
    default = collections.Counter(values.values()).most_common(1)[0][0]
    pattern: dict[str, Any] = {}
    for name in dict.fromkeys(name for name, _ in values):
        own = {site: value for site, value in values.items() if site[0] == name}
        if len(set(own.values())) == 1:
            pattern[name] = next(iter(own.values()))
        else:
            pattern |= {_short_name(site): value for site, value in own.items()}
    pattern = {key: value for key, value in pattern.items() if value != default}
    return default, pattern
