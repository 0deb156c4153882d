"""LoRA (arXiv 2106.09685), rsLoRA (arXiv 2312.03732) and LoRA+ (arXiv 2402.12354).

The identity among sharing methods: every site trains its own A and B.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from mos_jax.adapters.adapter import (
    Adapter,
    AdapterConfig,
    choose_blocks,
    require_bool,
    require_integer,
    require_positive,
    site_key,
    uniform_fan_in,
)
from mos_jax.adapters.low_rank import LowRank
from mos_jax.adapters.patterns import keep_ranks, missing_rows, zero_tails
from mos_jax.adapters.sites import Sites


@dataclasses.dataclass(frozen=True)
class LoRAConfig(AdapterConfig):
    """Configuration of LoRA.

    Attributes:
      rank: r, rank vectors of every site that `rank_pattern` does not name.
      alpha: the scale is alpha / rank, or alpha / sqrt(rank) with `rslora`, of the rank and the
        alpha that a site has.
      rslora: rank-stabilised scale.
      b_rate_ratio: B learns at this multiple of the learning rate (LoRA+, Hayou et al., ICML 2024,
        arXiv 2402.12354).
    """

    method: ClassVar[str] = "lora"

    rank: int = 8
    alpha: float = 16.0
    rslora: bool = False
    b_rate_ratio: float = 1.0

    def __post_init__(self) -> None:
        """Checks the fields. Raises InputError."""
        super().__post_init__()
        require_integer("lora", "rank", self.rank, 1)
        require_positive("lora", "alpha", self.alpha)
        require_bool("lora", "rslora", self.rslora)
        require_positive("lora", "b_rate_ratio", self.b_rate_ratio)

    def site_scales(self, sites: Sites) -> dict[str, tuple[float, ...]]:
        """See base class: the scale s in y = x W + s (x A^T) B."""
        ranks, alphas = self.site_ranks(sites), self.site_alphas(sites)

        def scale(alpha: float, rank: int) -> float:
            return alpha / (math.sqrt(rank) if self.rslora else rank)

        return {name: tuple(map(scale, alphas[name], ranks[name])) for name in ranks}

    def rate_ratios(self) -> Mapping[str, float]:
        """See base class."""
        return {} if self.b_rate_ratio == 1 else {"b": self.b_rate_ratio}

    def build(self, sites: Sites, key: jax.Array) -> LoRA:
        """See base class."""
        return LoRA(self, sites, key)


class LoRA(Adapter):
    """A [L, r, h] ~ U(-1/sqrt(h), 1/sqrt(h)) and B [L, r, o] = 0 for every site type.

    r is the largest rank of the type; the rows beyond a block's rank are zeros.
    """

    config: LoRAConfig

    def __init__(self, config: LoRAConfig, sites: Sites, key: jax.Array):
        super().__init__(config, sites)
        self.a: nnx.Dict = nnx.Dict()
        self.b: nnx.Dict = nnx.Dict()
        for name, site in self.sites.items():
            ranks = self.site_ranks[name]
            r = max(ranks)
            shape = (site.num_layers, r, site.d_in)
            a = uniform_fan_in(site_key(key, name, "a"), shape, site.d_in)
            self.a[name] = nnx.Param(zero_tails(a, ranks))
            self.b[name] = nnx.Param(jnp.zeros((site.num_layers, r, site.d_out), jnp.float32))

    def site_factors(self, name: str, layer: jax.Array | int | None = None) -> LowRank:
        """See base class."""
        index, scale, layers = choose_blocks(self.sites[name], layer, self.site_scales[name])
        factors = LowRank(self.a[name][index], self.b[name][index], scale, layers)
        return keep_ranks(factors, self.site_ranks[name], index)

    def padded_rows(self, part: str, name: str) -> int:
        """See base class."""
        return missing_rows(self.site_ranks[name]) if part in ("a", "b") else 0
