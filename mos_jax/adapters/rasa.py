"""RaSA, rank-sharing adaptation (He et al., ICLR 2025, arXiv 2503.12576).

Every block gives k of its r rank vectors to a pool of its site type and uses the pools of all
blocks: it has r - k vectors of its own and k L shared ones, weighed by a trained diagonal.

Axis legend: L blocks, r rank, k shared rank, h = d_in, o = d_out, R = r - k + k L assembled rank.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
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
from mos_jax.adapters.patterns import differ, keep_ranks, missing_rows, zero_tails
from mos_jax.adapters.sites import Sites
from mos_jax.adapters.strictness import strict
from mos_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class RaSAConfig(AdapterConfig):
    """Configuration of RaSA (arXiv 2503.12576). The scale is 1; the diagonal stands in for it.

    Each site type trains r L (h + o), as LoRA of rank r does, and L (r - k + k L) more. Where ranks
    differ, blocks differ in the vectors of their own; all give k to the pool, and use all of it.

    Attributes:
      rank: r, rank vectors that a site pays for unless `rank_pattern` names it; the assembled rank
        is r - k + k L.
      shared_rank: k, how many of them it gives to the pool of its type. The authors use 1; with
        k = r nothing is a block's own.
      alpha: the diagonal starts at alpha / 2, spread over the own vectors, and alpha / 2, spread
        over the shared ones, by a site's own alpha and rank.
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
        named = {f"rank_pattern[{key!r}]": r for key, r in self.rank_pattern.items()}
        for field, rank in {"rank": self.rank, **named}.items():
            if self.shared_rank > rank:
                raise InputError(
                    f"rasa: shared_rank={self.shared_rank} must be at most {field}={rank}"
                )

    @property
    def own_rank(self) -> int:
        """Vectors that a site keeps for itself, r - k, unless `rank_pattern` names it."""
        return self.rank - self.shared_rank

    def initial_diagonal(self, ranks: Sequence[int], alphas: Sequence[float]) -> np.ndarray:
        """The diagonals of a site type's blocks at the start: fp32 [L, R], own vectors first."""
        pool = self.shared_rank * len(ranks)
        diagonal = np.zeros((len(ranks), max(ranks) - self.shared_rank + pool), np.float32)
        for row, rank, alpha in zip(diagonal, ranks, alphas, strict=True):
            own = rank - self.shared_rank
            # With no own vectors the quotient is used 0 times; max only keeps it from failing.
            row[:own] = 0.5 * alpha / max(own, 1)
            row[own : own + pool] = 0.5 * alpha / pool
        return diagonal

    def build(self, sites: Sites, key: jax.Array) -> RaSA:
        """See base class."""
        return RaSA(self, sites, key)


class RaSA(Adapter):
    """Own vectors, pools and diagonals, each a mapping by site type; RaSA (arXiv 2503.12576).

    The diagonal is folded into A: row j of the assembled A is vector j times entry j. The own
    vectors come first; with k = r they are left out. r is the largest rank of the type; the rows of
    own vectors and of the diagonal beyond a block's rank are zeros.

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
        alphas = config.site_alphas(sites)
        for name, site in self.sites.items():
            ranks, blocks, pool = self.site_ranks[name], site.num_layers, config.shared_rank
            own = max(ranks) - pool
            for part, part_a, part_b, vectors in (
                ("own_a", self.own_a, self.own_b, (blocks, own)),
                ("shared_a", self.shared_a, self.shared_b, (blocks * pool,)),
            ):
                if vectors[-1] == 0:
                    continue
                own_key = site_key(key, name, part)
                a = uniform_fan_in(own_key, (*vectors, site.d_in), site.d_in)
                if part == "own_a":
                    a = zero_tails(a, [r - pool for r in ranks])
                part_a[name] = nnx.Param(a)
                part_b[name] = nnx.Param(jnp.zeros((*vectors, site.d_out), jnp.float32))
            diagonal = config.initial_diagonal(ranks, alphas[name])
            self.diagonal[name] = nnx.Param(jnp.asarray(diagonal))

    @strict
    def site_factors(self, name: str, layer: jax.Array | int | None = None) -> LowRank:
        """See base class."""
        site = self.sites[name]
        index, scale, layers = choose_blocks(site, layer, self.site_scales[name])
        diagonal = self.diagonal[name][index]
        a, b = self.shared_a[name][...], self.shared_b[name][...]
        if layer is None:
            a, b = (jnp.broadcast_to(part, (site.num_layers, *part.shape)) for part in (a, b))
        if name in self.own_a:
            a = jnp.concatenate([self.own_a[name][index], a], axis=-2)
            b = jnp.concatenate([self.own_b[name][index], b], axis=-2)
        ranks = self.site_ranks[name]
        if differ(ranks):
            # The pool follows upon a block's last own vector, and its missing ones go to the end.
            order = jnp.asarray(self._order(name))[index][..., None]
            a, b = (jnp.take_along_axis(part, order, axis=-2, mode="clip") for part in (a, b))
        beyond = self.config.shared_rank * (site.num_layers - 1)
        factors = LowRank(a * diagonal[..., None], b, scale, layers)
        return keep_ranks(factors, [r + beyond for r in ranks], index)

    def _order(self, name: str) -> np.ndarray:
        """Which row of own vectors and pool stands where in a block's factors: int32 [L, R]."""
        own = max(self.site_ranks[name]) - self.config.shared_rank
        rows = np.arange(own + self.config.shared_rank * self.sites[name].num_layers)
        missing = [
            (rows >= r - self.config.shared_rank) & (rows < own) for r in self.site_ranks[name]
        ]
        return np.argsort(missing, axis=1, kind="stable").astype(np.int32)

    def padded_rows(self, part: str, name: str) -> int:
        """See base class."""
        own = part in ("own_a", "own_b", "diagonal")
        return missing_rows(self.site_ranks[name]) if own else 0
