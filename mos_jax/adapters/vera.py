"""VeRA, vector-based random matrix adaptation (Kopiczko et al., ICLR 2024, arXiv 2310.11454).

A and B are random, frozen and shared by all blocks of a site type, or of the whole model; a block
trains one number for each rank vector and one for each output.

Axis legend: L blocks, r rank, h = d_in, o = d_out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from mos_jax.adapters.adapter import (
    Adapter,
    AdapterConfig,
    Frozen,
    choose_blocks,
    require_finite,
    require_integer,
    site_key,
)
from mos_jax.adapters.low_rank import LowRank
from mos_jax.adapters.patterns import keep_ranks, missing_rows, zero_tails
from mos_jax.adapters.sites import Sites
from mos_jax.adapters.strictness import strict
from mos_jax.errors import InputError, suggest

Projections = Literal["site_type", "shared"]
PROJECTIONS: tuple[Projections, ...] = ("site_type", "shared")
# Under which the one pair of projections="shared" stands.
SHARED = "shared"


@dataclasses.dataclass(frozen=True)
class VeRAConfig(AdapterConfig):
    """Configuration of VeRA (arXiv 2310.11454).

    A site trains r + o parameters. A site whose rank is below the largest uses the first vectors
    of the projections.

    Attributes:
      rank: r, rank vectors of every site that `rank_pattern` does not name; usually far above
        LoRA's, since none is trained.
      d_initial: at first, what every rank vector is multiplied by. Not 0: with b at 0 too, no
        gradient would reach either.
      projection_seed: seeds the frozen A and B, so that all adapters of one configuration share
        them; below 2^32.
      projections: whose the frozen A and B are. "site_type": every type has a pair of its own
        widths. "shared", as in PEFT: one pair for the whole model, A as wide as the widest input
        and B as the widest output, of which a narrower site has the first columns. What trains is
        the same.
    """

    method: ClassVar[str] = "vera"
    no_pattern: ClassVar[Mapping[str, str]] = {
        "alpha_pattern": "VeRA has no alpha; its trained b and d set the size of a change"
    }

    rank: int = 256
    d_initial: float = 0.1
    projection_seed: int = 0
    projections: Projections = "site_type"

    def __post_init__(self) -> None:
        """Checks the fields. Raises InputError."""
        super().__post_init__()
        require_integer("vera", "rank", self.rank, 1)
        require_finite("vera", "d_initial", self.d_initial)
        if self.d_initial == 0:
            raise InputError("vera: d_initial must not be 0, or nothing ever gets a gradient")
        require_integer("vera", "projection_seed", self.projection_seed, 0)
        if self.projection_seed >= 2**32:
            raise InputError(
                f"vera: projection_seed must be below 2^32, got {self.projection_seed}"
            )
        if self.projections not in PROJECTIONS:
            raise InputError(
                f"vera: unknown projections {self.projections!r}; "
                f"{suggest(str(self.projections), PROJECTIONS)}"
            )

    def build(self, sites: Sites, key: jax.Array) -> VeRA:
        """See base class."""
        return VeRA(self, sites, key)


@strict
def scale_pair(
    a: jax.Array, b: jax.Array, vectors: jax.Array, outputs: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """A pair that blocks share, scaled by each block's own numbers.

    Args:
      a: fp32 [r, h].
      b: fp32 [r, o].
      vectors: fp32 [L, r] or [r], one number for each rank vector.
      outputs: fp32 [L, o] or [o], one number for each output.

    Returns:
      fp32 [L, r, h] and [L, r, o], or [r, h] and [r, o].
    """
    if vectors.ndim == 2:
        a, b = a[None], b[None]
    return vectors[..., None] * a, b * outputs[..., None, :]


def _draw(key: jax.Array, shape: tuple[int, int], fan_in: int) -> Frozen:
    bound = (6 / fan_in) ** 0.5
    return Frozen(jax.random.uniform(key, shape, jnp.float32, -bound, bound))


class VeRA(Adapter):
    """Frozen projections and trained scalings by site type; VeRA (arXiv 2310.11454).

    The projections are drawn as PEFT draws them, Kaiming-uniform with the gain of a ReLU. With
    `projections="shared"` there is one entry, "shared", of the largest h and o.

    r is the largest rank of the sites that a pair serves.

    Attributes:
      projection_a: Frozen fp32 [r, h], U(-sqrt(6 / h), sqrt(6 / h)).
      projection_b: Frozen fp32 [r, o], U(-sqrt(6 / r), sqrt(6 / r)).
      d: nnx.Param fp32 [L, r], `d_initial` up to the block's rank; scales the rank vectors.
      b: nnx.Param fp32 [L, o], zeros: step 0 is the base; scales the outputs.
    """

    config: VeRAConfig

    def __init__(self, config: VeRAConfig, sites: Sites, key: jax.Array):
        del key  # Nothing that trains starts at random.
        super().__init__(config, sites)
        seed, ranks = jax.random.key(config.projection_seed), self.site_ranks
        self.projection_a: nnx.Dict = nnx.Dict()
        self.projection_b: nnx.Dict = nnx.Dict()
        self.d: nnx.Dict = nnx.Dict()
        self.b: nnx.Dict = nnx.Dict()
        widths = {name: (site.d_in, site.d_out) for name, site in self.sites.items()}
        if config.projections == "shared":
            pairs = {SHARED: tuple(map(max, zip(*widths.values(), strict=True)))}
            pair_ranks = {SHARED: max(map(max, ranks.values()))}
        else:
            pairs, pair_ranks = widths, {name: max(own) for name, own in ranks.items()}
        for name, (d_in, d_out) in pairs.items():
            r = pair_ranks[name]
            self.projection_a[name] = _draw(site_key(seed, name, "a"), (r, d_in), d_in)
            self.projection_b[name] = _draw(site_key(seed, name, "b"), (r, d_out), r)
        for name, site in self.sites.items():
            shape = (site.num_layers, max(ranks[name]))
            d = jnp.full(shape, config.d_initial, jnp.float32)
            self.d[name] = nnx.Param(zero_tails(d, ranks[name]))
            self.b[name] = nnx.Param(jnp.zeros((site.num_layers, site.d_out), jnp.float32))

    def site_factors(self, name: str, layer: jax.Array | int | None = None) -> LowRank:
        """See base class."""
        site = self.sites[name]
        index, scale, layers = choose_blocks(site, layer, self.site_scales[name])
        ranks = self.site_ranks[name]
        r = max(ranks)
        pair = SHARED if self.config.projections == "shared" else name
        a, b = scale_pair(
            self.projection_a[pair][:r, : site.d_in],
            self.projection_b[pair][:r, : site.d_out],
            self.d[name][index],
            self.b[name][index],
        )
        return keep_ranks(LowRank(a, b, scale, layers), ranks, index)

    def padded_rows(self, part: str, name: str) -> int:
        """See base class."""
        return missing_rows(self.site_ranks[name]) if part == "d" else 0
