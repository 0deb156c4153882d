"""Any method's factors as a LoRA that can be trained on.

Axis legend: L adapted blocks, r rank, h = d_in, o = d_out.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from mos_jax.adapters.adapter import Adapter
from mos_jax.adapters.lora import LoRAConfig
from mos_jax.adapters.low_rank import LowRank
from mos_jax.adapters.sites import Sites, SiteShape
from mos_jax.errors import InputError, suggest
from mos_jax.interop.peft import check_factors
from mos_jax.interop.peft_arrays import Arrays, filled_adapter
from mos_jax.interop.peft_config import Number, Site, default_and_pattern, find_alpha


def lora_from_factors(factors: Mapping[str, LowRank], sites: Sites) -> Adapter:
    """A LoRA that starts as any method's factors and can be trained on.

    Args:
      factors: `adapter.factors()`: by site type, a fp32 [L, r, h], b fp32 [L, r, o], scale fp32
        [L] and the blocks they stand for.
      sites: all sites of the base, `base.sites`.

    Returns:
      A `LoRA` of the same blocks whose factors are these: the same A, and the same scale, as an
      alpha for which alpha / rank is it in fp32. A negative scale becomes its amount and a B of the
      other sign, and of a site with scale 0 the B becomes 0, which is exact.

    Raises:
      InputError: for factors that do not fit the sites, or values that are not finite.
    """
    if not factors:
        raise InputError("factors must hold at least one site type (adapter.factors())")
    ranks: dict[Site, int] = {}
    alphas: dict[Site, Number] = {}
    found: Arrays = {}
    adapted: dict[str, SiteShape] = {}
    for name, low_rank in factors.items():
        if name not in sites:
            raise InputError(f"factors of {name!r}: no such site; {suggest(name, sites)}")
        depth = sites[name].blocks[-1] + 1
        a, b, scale, layers = check_factors(name, low_rank, depth)
        own = low_rank.ranks or (low_rank.rank,) * len(layers)
        # Not np.sign's fp64; exact, since it only moves a sign or makes a zero.
        found[f"a/{name}"] = a[:, : max(own)]
        found[f"b/{name}"] = (b * np.sign(scale)[:, None, None])[:, : max(own)]
        whole = low_rank.layers is None
        adapted[name] = SiteShape(len(layers), a.shape[2], b.shape[2], None if whole else layers)
        for layer, rank, size in zip(layers, own, np.abs(scale), strict=True):
            ranks[name, layer] = rank
            if size:
                alphas[name, layer] = find_alpha(size, rank)
    # Of a site that changes nothing, any will do.
    common = default_and_pattern(alphas)[0] if alphas else 1
    rank, rank_pattern = default_and_pattern(ranks)
    alpha, alpha_pattern = default_and_pattern({site: alphas.get(site, common) for site in ranks})
    config = LoRAConfig(
        rank=rank, alpha=alpha, rank_pattern=rank_pattern, alpha_pattern=alpha_pattern
    )
    _check_widths(adapted, sites)
    return filled_adapter(config, adapted, found)


def _check_widths(adapted: Sites, sites: Sites) -> None:
    for name, site in adapted.items():
        have, want = (site.d_in, site.d_out), (sites[name].d_in, sites[name].d_out)
        if have != want:
            raise InputError(
                f"factors of {name!r} are for {have[0]} -> {have[1]}, the base has {want[0]} -> "
                f"{want[1]}"
            )
