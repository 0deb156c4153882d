"""Tied-LoRA (Renduchintala et al., NAACL 2024, arXiv 2311.09578), with all four parts trained.

A and B are trained and shared by all blocks of a site type; every block scales A's vectors by its
own u and the outputs by its own v. In the form of the paper q, k and v are adapted, and share A
and u as well.

Axis legend: L blocks, r rank, h = d_in, o = d_out.
"""

from __future__ import annotations

import dataclasses
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
from mos_jax.adapters.sites import Sites, SiteShape, check_sites
from mos_jax.adapters.vera import scale_pair
from mos_jax.errors import InputError

QKV = ("q_proj", "k_proj", "v_proj")
# Where the arrays stand that q, k and v share.
TIED = "qkv"


@dataclasses.dataclass(frozen=True)
class TiedLoRAConfig(AdapterConfig):
    """Configuration of Tied-LoRA (arXiv 2311.09578).

    A site type trains r (h + o) + L (r + o) parameters; with `tie_qkv` the adapted types together
    train r (h + sum of o) + L (r + sum of o). A site whose rank is below the largest uses the
    first vectors of A and B, and has a u as short.

    Attributes:
      rank: r, rank vectors of every site that `rank_pattern` does not name.
      tie_qkv: the form of the paper's tables: only q_proj, k_proj and v_proj are adapted, and
        share one A and one u.
      alpha: the scale is alpha / rank.
    """

    method: ClassVar[str] = "tied_lora"

    rank: int = 8
    tie_qkv: bool = False
    alpha: float = 16.0

    def __post_init__(self) -> None:
        """Checks the fields. Raises InputError."""
        super().__post_init__()
        require_integer("tied_lora", "rank", self.rank, 1)
        require_bool("tied_lora", "tie_qkv", self.tie_qkv)
        require_positive("tied_lora", "alpha", self.alpha)

    def site_scales(self, sites: Sites) -> dict[str, tuple[float, ...]]:
        """See base class: the scale s in y = x W + s (x A^T) B."""
        return self._alpha_over_rank(sites)

    def owner(self, name: str) -> str:
        """Under which name A and u of site type `name` stand."""
        return TIED if self.tie_qkv else name

    def check_tied(self, sites: Sites) -> None:
        """Raises InputError unless `sites` can share A and u, if they have to."""
        if not self.tie_qkv:
            return
        sites = check_sites(sites)
        others = [name for name in sites if name not in QKV]
        if others:
            raise InputError(
                f"tied_lora: tie_qkv=True adapts {', '.join(QKV)} only, got {', '.join(others)} "
                "too; select those three, or set tie_qkv=False"
            )
        first, *rest = sites
        for name in rest:
            if _tied_part(sites[name]) != _tied_part(sites[first]):
                raise InputError(
                    "tied_lora: tie_qkv=True needs one d_in and the same blocks for all types, "
                    f"but {first!r} has {_describe(sites[first])} and {name!r} has "
                    f"{_describe(sites[name])}"
                )

    def build(self, sites: Sites, key: jax.Array) -> TiedLoRA:
        """See base class."""
        return TiedLoRA(self, sites, key)


def _tied_part(site: SiteShape) -> tuple[int, int, tuple[int, ...] | None]:
    return site.d_in, site.num_layers, site.layers


def _describe(site: SiteShape) -> str:
    blocks = f"{site.num_layers}" if site.layers is None else f"{list(site.layers)}"
    return f"d_in={site.d_in} and blocks {blocks}"


class TiedLoRA(Adapter):
    """Shared pairs and each block's scalings; Tied-LoRA (arXiv 2311.09578).

    Mappings by site type; with `tie_qkv`, `a` and `u` hold one entry, "qkv", of the largest rank
    of the three.

    Attributes:
      a: nnx.Param fp32 [r, h], U(-1/sqrt(h), 1/sqrt(h)).
      b: nnx.Param fp32 [r, o], zeros: step 0 is the base.
      u: nnx.Param fp32 [L, r], ones up to the block's rank; scales A's vectors.
      v: nnx.Param fp32 [L, o], ones; scales the outputs.
    """

    config: TiedLoRAConfig

    def __init__(self, config: TiedLoRAConfig, sites: Sites, key: jax.Array):
        config.check_tied(sites)
        super().__init__(config, sites)
        self.a: nnx.Dict = nnx.Dict()
        self.b: nnx.Dict = nnx.Dict()
        self.u: nnx.Dict = nnx.Dict()
        self.v: nnx.Dict = nnx.Dict()
        for name, site in self.sites.items():
            owner = config.owner(name)
            if owner not in self.a:
                tied = self._tied_ranks(owner)
                shape = (max(tied), site.d_in)
                self.a[owner] = nnx.Param(
                    uniform_fan_in(site_key(key, owner, "a"), shape, site.d_in)
                )
                ones = jnp.ones((site.num_layers, max(tied)), jnp.float32)
                self.u[owner] = nnx.Param(zero_tails(ones, tied))
            r = max(self.site_ranks[name])
            self.b[name] = nnx.Param(jnp.zeros((r, site.d_out), jnp.float32))
            self.v[name] = nnx.Param(jnp.ones((site.num_layers, site.d_out), jnp.float32))

    def site_factors(self, name: str, layer: jax.Array | int | None = None) -> LowRank:
        """See base class."""
        index, scale, layers = choose_blocks(self.sites[name], layer, self.site_scales[name])
        owner, ranks = self.config.owner(name), self.site_ranks[name]
        r = max(ranks)
        a, b = scale_pair(
            self.a[owner][:r], self.b[name][...], self.u[owner][index][..., :r], self.v[name][index]
        )
        return keep_ranks(LowRank(a, b, scale, layers), ranks, index)

    def _tied_ranks(self, owner: str) -> tuple[int, ...]:
        """How many entries of `u/owner` each block uses, be it for one type alone."""
        ranks = (own for name, own in self._ranks if self.config.owner(name) == owner)
        return tuple(map(max, zip(*ranks, strict=True)))

    def padded_rows(self, part: str, name: str) -> int:
        """See base class."""
        return missing_rows(self._tied_ranks(name)) if part == "u" else 0
