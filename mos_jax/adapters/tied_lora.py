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
    train r (h + sum of o) + L (r + sum of o).

    Attributes:
      rank: r, rank vectors of every site.
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

    @property
    def scale(self) -> float:
        """The scale s in y = x W + s (x A^T) B."""
        return self.alpha / self.rank

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

    Mappings by site type; with `tie_qkv`, `a` and `u` hold one entry, "qkv".

    Attributes:
      a: nnx.Param fp32 [r, h], U(-1/sqrt(h), 1/sqrt(h)).
      b: nnx.Param fp32 [r, o], zeros: step 0 is the base.
      u: nnx.Param fp32 [L, r], ones; scales A's vectors.
      v: nnx.Param fp32 [L, o], ones; scales the outputs.
    """

    config: TiedLoRAConfig

    def __init__(self, config: TiedLoRAConfig, sites: Sites, key: jax.Array):
        config.check_tied(sites)
        super().__init__(config, sites)
        r = config.rank
        self.a: nnx.Dict = nnx.Dict()
        self.b: nnx.Dict = nnx.Dict()
        self.u: nnx.Dict = nnx.Dict()
        self.v: nnx.Dict = nnx.Dict()
        for name, site in self.sites.items():
            owner = config.owner(name)
            if owner not in self.a:
                self.a[owner] = nnx.Param(
                    uniform_fan_in(site_key(key, owner, "a"), (r, site.d_in), site.d_in)
                )
                self.u[owner] = nnx.Param(jnp.ones((site.num_layers, r), jnp.float32))
            self.b[name] = nnx.Param(jnp.zeros((r, site.d_out), jnp.float32))
            self.v[name] = nnx.Param(jnp.ones((site.num_layers, site.d_out), jnp.float32))

    def site_factors(self, name: str, layer: jax.Array | int | None = None) -> LowRank:
        """See base class."""
        index, scale, layers = choose_blocks(self.sites[name], layer, self.config.scale)
        owner = self.config.owner(name)
        a, b = scale_pair(
            self.a[owner][...], self.b[name][...], self.u[owner][index], self.v[name][index]
        )
        return LowRank(a, b, scale, layers)
