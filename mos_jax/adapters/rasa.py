"""RaSA, rank-sharing adaptation (He et al., ICLR 2025, arXiv 2503.12576).

Every block gives k of its r rank vectors to a pool of its site type and uses the pools of all
blocks: it has r - k vectors of its own and k L shared ones, weighed by a trained diagonal.

Axis legend: L blocks, r rank, k shared rank, h = d_in, o = d_out, R = r - k + k L assembled rank.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
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
from mos_jax.adapters.sites import Sites, SiteShape
from mos_jax.adapters.strictness import strict
from mos_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class RaSAConfig(AdapterConfig):
    """Configuration of RaSA (arXiv 2503.12576). The scale is 1; the diagonal stands in for it.

    Each site type trains r L (h + o), as LoRA of rank r does, and L (r - k + k L) more.

    Attributes:
      rank: r, rank vectors that a site pays for; the assembled rank is r - k + k L.
      shared_rank: k, how many of them it gives to the pool of its type. The authors use 1; with
        k = r nothing is a block's own.
      alpha: the diagonal starts at alpha / 2, spread over the own vectors, and alpha / 2, spread
        over the shared ones.
    """

    method: ClassVar[str] = "rasa"

    rank: int = 8
    shared_rank: int = 1
    alpha: float = 16.0

    def __post_init__(self) -> None:
        """Checks the fields. Raises InputError."""
        super().__post_init__()
        require_integer("rasa", "rank", self.rank, 1)
        require_integer("rasa", "shared_rank", self.shared_rank, 1)
        require_positive("rasa", "alpha", self.alpha)
        if self.shared_rank > self.rank:
            raise InputError(
                f"rasa: shared_rank={self.shared_rank} must be at most rank={self.rank}"
            )

    @property
    def own_rank(self) -> int:
        """Vectors that a site keeps for itself, r - k."""
        return self.rank - self.shared_rank

    def initial_diagonal(self, site: SiteShape) -> np.ndarray:
        """The diagonal of every block at the start: fp32 [R], own vectors first."""
        pool = self.shared_rank * site.num_layers
        # With no own vectors the division by 0 is repeated 0 times; max only keeps it quiet.
        values = [0.5 * self.alpha / max(self.own_rank, 1), 0.5 * self.alpha / pool]
        return np.repeat(np.asarray(values, np.float32), [self.own_rank, pool])

    def build(self, sites: Sites, key: jax.Array) -> RaSA:
        """See base class."""
        return RaSA(self, sites, key)


class RaSA(Adapter):
    """Own vectors, pools and diagonals, each a mapping by site type; RaSA (arXiv 2503.12576).

    The diagonal is folded into A: row j of the assembled A is vector j times entry j. The own
    vectors come first; with k = r they are left out.

    Attributes:
      own_a: nnx.Param fp32 [L, r - k, h], U(-1/sqrt(h), 1/sqrt(h)).
      own_b: nnx.Param fp32 [L, r - k, o], zeros: step 0 is the base.
      shared_a: nnx.Param fp32 [k L, h], as own_a.
      shared_b: nnx.Param fp32 [k L, o], zeros.
      diagonal: nnx.Param fp32 [L, R]; see `RaSAConfig.initial_diagonal`.
    """

    config: RaSAConfig

    def __init__(self, config: RaSAConfig, sites: Sites, key: jax.Array):
        super().__init__(config, sites)
        self.own_a: nnx.Dict = nnx.Dict()
        self.own_b: nnx.Dict = nnx.Dict()
        self.shared_a: nnx.Dict = nnx.Dict()
        self.shared_b: nnx.Dict = nnx.Dict()
        self.diagonal: nnx.Dict = nnx.Dict()
        for name, site in self.sites.items():
            blocks, own, pool = site.num_layers, config.own_rank, config.shared_rank
            for part, part_a, part_b, vectors in (
                ("own_a", self.own_a, self.own_b, (blocks, own)),
                ("shared_a", self.shared_a, self.shared_b, (blocks * pool,)),
            ):
                if vectors[-1] == 0:
                    continue
                own_key = site_key(key, name, part)
                part_a[name] = nnx.Param(uniform_fan_in(own_key, (*vectors, site.d_in), site.d_in))
                part_b[name] = nnx.Param(jnp.zeros((*vectors, site.d_out), jnp.float32))
            diagonal = jnp.asarray(config.initial_diagonal(site))
            self.diagonal[name] = nnx.Param(jnp.tile(diagonal, (blocks, 1)))

    @strict
    def site_factors(self, name: str, layer: jax.Array | int | None = None) -> LowRank:
        """See base class."""
        site = self.sites[name]
        index, scale, layers = choose_blocks(site, layer, 1.0)
        diagonal = self.diagonal[name][index]
        a, b = self.shared_a[name][...], self.shared_b[name][...]
        if layer is None:
            a, b = (jnp.broadcast_to(part, (site.num_layers, *part.shape)) for part in (a, b))
        if name in self.own_a:
            a = jnp.concatenate([self.own_a[name][index], a], axis=-2)
            b = jnp.concatenate([self.own_b[name][index], b], axis=-2)
        return LowRank(a * diagonal[..., None], b, scale, layers)
