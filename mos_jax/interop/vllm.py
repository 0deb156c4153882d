"""What vLLM can serve of a LoRA: one rank and one alpha for all sites.

vLLM reads `r` and `lora_alpha` of an adapter and none of the patterns, so that an adapter with
patterns would load and compute something else without a word. As of its version 0.27 it refuses
DoRA, biases and `modules_to_save`, knows rsLoRA, and reserves room for a `--max-lora-rank` that is
one of `VLLM_RANKS`.

Axis legend: r rank, h = d_in, o = d_out.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from mos_jax.errors import InputError
from mos_jax.interop.peft_config import Site

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# What of a configuration vLLM does not serve; how, for a word after the field's value.
_REFUSED = {
    "use_dora": "vLLM does not serve DoRA",
    "modules_to_save": "vLLM serves no whole modules",
    "lora_bias": "vLLM serves no biases",
    "trainable_token_indices": "vLLM serves no trained tokens",
    "target_parameters": "vLLM serves linear layers only",
    "layer_replication": "vLLM does not replicate blocks",
    "alora_invocation_tokens": "vLLM would act on all tokens",
}


@dataclasses.dataclass(frozen=True)
class SiteFactors:
    """The factors of one site, on the host.

    Attributes:
      a: fp32 [r, h].
      b: fp32 [r, o].
      scale: fp32.
    """

    a: np.ndarray
    b: np.ndarray
    scale: np.float32


def check_vllm(config: Mapping[str, Any]) -> list[str]:
    """Says what vLLM would refuse of an adapter, or serve wrongly.

    Args:
      config: the object in its `adapter_config.json`.

    Returns:
      A sentence for each; none if vLLM serves the adapter as PEFT computes it. Which
      `--max-lora-rank` it needs is `max_lora_rank`'s to say.
    """
    if config.get("peft_type") != "LORA":
        return [
            f"peft_type = {config.get('peft_type')!r}: vLLM serves LoRA only; export the factors "
            "as a LoRA"
        ]
    found = [
        f"{field} = {config[field]!r}: {reason}"
        for field, reason in _REFUSED.items()
        if config.get(field) not in (None, False, [], {})
    ]
    if config.get("bias", "none") != "none":
        found.append(f"bias = {config['bias']!r}: vLLM serves no biases")
    for field, read in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
        if config.get(field):
            found.append(
                f"{field} has {len(config[field])} entries: vLLM reads {read} = "
                f"{config.get(read)!r} alone, so that these sites would have another scale; export "
                "with pad_rank"
            )
    rank = config.get("r")
    if not isinstance(rank, int) or not 1 <= rank <= VLLM_RANKS[-1]:
        found.append(f"r = {rank!r}: vLLM serves ranks from 1 to {VLLM_RANKS[-1]}")
    return found


def max_lora_rank(rank: int) -> int:
    """The least `--max-lora-rank` with which vLLM serves an adapter of this rank.

    Raises:
      InputError: if there is none.
    """
    for known in VLLM_RANKS:
        if rank <= known:
            return known
    raise InputError(f"vLLM serves ranks up to {VLLM_RANKS[-1]}, this adapter has {rank}")


def pad_to_rank(
    sites: Mapping[Site, SiteFactors], rank: int, allow_rounding: bool = False
) -> tuple[dict[Site, SiteFactors], bool]:
    """Gives all sites one rank and one scale, by rows of zeros and by scaling B.

    The common scale is the commonest one without its sign. A site's B is multiplied by its own
    scale over the common one; where that is a power of two, not a bit of B is lost.

    Args:
      sites: the factors by site.
      rank: the rank they shall have, one of `VLLM_RANKS`.
      allow_rounding: multiply B also by what is no power of two, rounding each entry to the nearest
        fp32 number.

    Returns:
      The padded factors, and whether an entry was rounded.

    Raises:
      InputError: for a rank that vLLM does not know or that is below a site's; for scales that
        cannot go into B exactly, unless rounding is allowed; if B would overflow.
    """
    if isinstance(rank, bool) or rank not in VLLM_RANKS:
        raise InputError(
            f"pad_rank must be one of {', '.join(map(str, VLLM_RANKS))} (what vLLM allows), got "
            f"{rank!r}"
        )
    largest = max(sites, key=lambda site: len(sites[site].a))
    if len(sites[largest].a) > rank:
        raise InputError(
            f"pad_rank={rank} is below the rank {len(sites[largest].a)} of {_name(largest)}; "
            "padding cannot take rows away"
        )
    sizes = collections.Counter(abs(float(one.scale)) for one in sites.values() if one.scale)
    common = np.float32(sizes.most_common(1)[0][0] if sizes else 1.0)
    padded, rounded = {}, False
    for site, one in sites.items():
        ratio = float(one.scale) / float(common)
        # A product of two fp32 numbers is exact in fp64; with a ratio that is no power of two the
        # ratio itself is rounded too, to fp64, which is far below what B's rounding costs.
        exact = one.b.astype(np.float64) * ratio
        with np.errstate(over="ignore"):
            b = exact.astype(np.float32)
        if not np.all(np.isfinite(b)):
            raise InputError(
                f"pad_rank: B of {_name(site)} would overflow when its scale {one.scale} becomes "
                f"the common {common}"
            )
        lossless = ratio == 0 or (abs(math.frexp(ratio)[0]) == 0.5 and np.array_equal(b, exact))
        if not lossless and not allow_rounding:
            raise InputError(
                f"pad_rank: {_name(site)} has scale {one.scale}, the others {common}; their ratio "
                f"{ratio:.6g} cannot go into B without rounding its entries (by at most 6e-8 of "
                "each); set allow_rounding to accept that"
            )
        rounded |= not lossless
        room = ((0, rank - len(one.a)), (0, 0))
        padded[site] = SiteFactors(np.pad(one.a, room), np.pad(b, room), common)
    return padded, rounded


def _name(site: Site) -> str:
    return f"{site[0]} of block {site[1]}"
