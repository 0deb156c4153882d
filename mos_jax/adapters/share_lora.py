"""ShareLoRA (Song et al., 2024, arXiv 2406.10785).

One of LoRA's two matrices is shared by all blocks of a site type, the other is every block's own.

Axis legend: L blocks, r rank, h = d_in, o = d_out.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from mos_jax.adapters.adapter import (
    Adapter,
    AdapterConfig,
    choose_blocks,
    require_integer,
    require_positive,
    site_key,
    uniform_fan_in,
)
from mos_jax.adapters.low_rank import LowRank
from mos_jax.adapters.patterns import keep_ranks, missing_rows, zero_tails
from mos_jax.adapters.sites import Sites
from mos_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class ShareLoRAConfig(AdapterConfig):
    """Configuration of ShareLoRA (arXiv 2406.10785).

    A site type trains r (h + L o) parameters with A shared, r (L h + o) with B shared. A block
    whose rank is below the type's largest uses the first vectors of the shared matrix.

    Attributes:
      rank: r, rank vectors of every site that `rank_pattern` does not name.
      shared: which matrix the blocks share: "a" (the paper's choice) or "b".
      alpha: the scale is alpha / rank.
    """

    method: ClassVar[str] = "share_lora"

    rank: int = 8
    shared: Literal["a", "b"] = "a"
    alpha: float = 16.0

    def __post_init__(self) -> None:
        """Checks the fields. Raises InputError."""
        super().__post_init__()
        require_integer("share_lora", "rank", self.rank, 1)
        require_positive("share_lora", "alpha", self.alpha)
        if self.shared not in ("a", "b"):
            raise InputError(f"share_lora: shared must be 'a' or 'b', got {self.shared!r}")

    def site_scales(self, sites: Sites) -> dict[str, tuple[float, ...]]:
        """See base class: the scale s in y = x W + s (x A^T) B."""
        return self._alpha_over_rank(sites)

    def build(self, sites: Sites, key: jax.Array) -> ShareLoRA:
        """See base class."""
        return ShareLoRA(self, sites, key)


class ShareLoRA(Adapter):
    """A and B by site type, the shared one without the axis L; ShareLoRA (arXiv 2406.10785).

    Attributes:
      a: nnx.Param fp32 [r, h] if shared, else [L, r, h]; U(-1/sqrt(h), 1/sqrt(h)), and zero in
        the rows beyond a block's rank.
      b: nnx.Param fp32 [r, o] if shared, else [L, r, o]; zeros.
    """

    config: ShareLoRAConfig

    def __init__(self, config: ShareLoRAConfig, sites: Sites, key: jax.Array):
        super().__init__(config, sites)
        self.a: nnx.Dict = nnx.Dict()
        self.b: nnx.Dict = nnx.Dict()
        for name, site in self.sites.items():
            blocks_a, blocks_b = (
                () if config.shared == part else (site.num_layers,) for part in ("a", "b")
            )
            ranks = self.site_ranks[name]
            r = max(ranks)
            a = uniform_fan_in(site_key(key, name, "a"), (*blocks_a, r, site.d_in), site.d_in)
            self.a[name] = nnx.Param(zero_tails(a, ranks) if blocks_a else a)
            self.b[name] = nnx.Param(jnp.zeros((*blocks_b, r, site.d_out), jnp.float32))

    def site_factors(self, name: str, layer: jax.Array | int | None = None) -> LowRank:
        """See base class."""
        index, scale, layers = choose_blocks(self.sites[name], layer, self.site_scales[name])
        a, b = self.a[name][...], self.b[name][...]
        if self.config.shared == "a":
            b = b[index]
            a = jnp.broadcast_to(a, (*b.shape[:-2], *a.shape))
        else:
            a = a[index]
            b = jnp.broadcast_to(b, (*a.shape[:-2], *b.shape))
        return keep_ranks(LowRank(a, b, scale, layers), self.site_ranks[name], index)

    def padded_rows(self, part: str, name: str) -> int:
        """See base class."""
        own = {"a": "b", "b": "a"}[self.config.shared]
        return missing_rows(self.site_ranks[name]) if part == own else 0
