"""MoS, Mixture of Shards (Wang et al., ICLR 2025, arXiv 2410.00938).

Per site type there is one pool of A-shards [e L l, h / l] and one of B-shards [e L l, o / l], owned
by the adapter and shared by all blocks. A rank vector is the concatenation of l shards that a
frozen routing table picks. Four strategies keep the blocks apart, each with its switch:

=====================  ==========================================  ============================
strategy               on                                          off
=====================  ==========================================  ============================
subset selection       a block draws (r - p) l public shards       a block uses all of them
pair dissociation      A and B are routed independently            B uses A's table
vector sharding        shards_per_vector > 1                       shards_per_vector = 1
shard privatization    private_rank > 0                            private_rank = 0
=====================  ==========================================  ============================

Axis legend: L blocks, r active rank, e equivalent rank, p private rank, l shards per vector,
h = d_in, o = d_out.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mos_jax.adapters import routing
from mos_jax.adapters.adapter import (
    Adapter,
    AdapterConfig,
    Frozen,
    local_layer,
    require_bool,
    require_finite,
    require_integer,
    require_positive,
    site_key,
    uniform_fan_in,
)
from mos_jax.adapters.low_rank import LowRank
from mos_jax.adapters.sites import Sites, SiteShape, check_sites
from mos_jax.adapters.strictness import strict
from mos_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class MoSConfig(AdapterConfig):
    """Configuration of MoS.

    Attributes:
      equivalent_rank: e, the budget: exactly the trained parameters of LoRA of rank e, which are
        e L (h + o) for each site type. Only random_scaling="trained" adds to it.
      rank: r, the active rank of every assembled A and B. Left open (None) when every block uses
        all shards: then it is p + (e - p) L. With private_rank = equivalent_rank it is e.
      shards_per_vector: l; divides every adapted width.
      private_rank: p, vectors of each site that belong to it alone.
      alpha: the scale is alpha / rank; the active rank scales, not the equivalent one.
      routing_seed: seeds the routing tables (and fixed random scalars) through NumPy.
      subset_selection: see the table in the module.
      pair_dissociation: see the table in the module.
      random_scaling: None; or every site multiplies its r vectors of A by scalars of its own
        ~ N(mean, std), "fixed" or "trained" (the pilot study's arm). The trained ones are L r
        more trained parameters for each site type, beyond the budget.
      random_scaling_mean: mean of those scalars.
      random_scaling_std: their standard deviation.
    """

    method: ClassVar[str] = "mos"

    equivalent_rank: int = 2
    rank: int | None = None
    shards_per_vector: int = 1
    private_rank: int = 0
    alpha: float = 16.0
    routing_seed: int = 0
    subset_selection: bool = True
    pair_dissociation: bool = True
    random_scaling: Literal["fixed", "trained"] | None = None
    random_scaling_mean: float = 1.0
    random_scaling_std: float = 0.02

    def __post_init__(self) -> None:
        """Checks what can be checked without the sites. Raises InputError."""
        e, r, p = self.equivalent_rank, self.rank, self.private_rank
        require_integer("mos", "equivalent_rank", e, 1)
        require_integer("mos", "shards_per_vector", self.shards_per_vector, 1)
        require_integer("mos", "private_rank", p, 0)
        require_integer("mos", "routing_seed", self.routing_seed, 0)
        require_positive("mos", "alpha", self.alpha)
        require_bool("mos", "subset_selection", self.subset_selection)
        require_bool("mos", "pair_dissociation", self.pair_dissociation)
        if p > e:
            raise InputError(f"mos: private_rank={p} must be at most equivalent_rank={e}")
        if r is not None:
            require_integer("mos", "rank", r, 1)
            if not self.subset_selection:
                raise InputError(
                    f"mos: rank={r} contradicts subset_selection=False, where every block uses "
                    "all shards; leave rank open (None), it becomes private_rank + "
                    "(equivalent_rank - private_rank) * num_layers"
                )
            if p == e and r != e:
                raise InputError(
                    f"mos: with private_rank = equivalent_rank = {e} nothing is public, so rank "
                    f"must be {e}, got {r}"
                )
            if p < e and r <= p:
                raise InputError(
                    f"mos: rank={r} must be above private_rank={p}, or no public shard is used "
                    f"although equivalent_rank={e} pays for them"
                )
        elif self.subset_selection and p < e:
            raise InputError(
                "mos: rank is open (None), but subset_selection=True needs it; give rank "
                f"(the paper uses up to 8 * equivalent_rank = {8 * e}) or set "
                "subset_selection=False"
            )
        if self.random_scaling not in (None, "fixed", "trained"):
            raise InputError(
                "mos: random_scaling must be None, 'fixed' or 'trained', got "
                f"{self.random_scaling!r}"
            )
        require_finite("mos", "random_scaling_mean", self.random_scaling_mean)
        require_finite("mos", "random_scaling_std", self.random_scaling_std)
        if self.random_scaling_std < 0:
            raise InputError(
                f"mos: random_scaling_std must be >= 0, got {self.random_scaling_std!r}"
            )

    @classmethod
    def pure_sharing(cls, equivalent_rank: int, **fields: Any) -> MoSConfig:
        """The pilot study's arm: every block uses all e L vectors of one pair of pools.

        Args:
          equivalent_rank: e.
          **fields: of the configuration, other than those that make it this arm.

        Raises:
          InputError: for a field that contradicts the arm, or is unknown or refused.
        """
        arm = {
            "rank": None,
            "shards_per_vector": 1,
            "private_rank": 0,
            "subset_selection": False,
            "pair_dissociation": False,
        }
        for name, value in arm.items():
            if fields.get(name, value) != value:
                raise InputError(
                    f"mos: {name}={fields[name]!r} contradicts pure_sharing, where it is "
                    f"{value!r}; leave it out or use MoSConfig"
                )
        return cls.from_dict({"equivalent_rank": equivalent_rank, **fields, **arm})

    def layout(self, name: str, site: SiteShape) -> routing.PoolLayout:
        """The pool of site type `name`.

        Raises:
          InputError: if l does not divide a width, or there are fewer public shards than r - p
            vectors need, with the numbers.
        """
        e, p, shards = self.equivalent_rank, self.private_rank, self.shards_per_vector
        for width in ("d_in", "d_out"):
            if getattr(site, width) % shards:
                raise InputError(
                    f"mos: shards_per_vector={shards} does not divide "
                    f"{width}={getattr(site, width)} of {name!r}"
                )
        if self.rank is not None:
            rank = self.rank
        else:
            rank = p + (e - p) * site.num_layers
        if rank - p > (e - p) * site.num_layers:
            raise InputError(
                f"mos: rank={rank} needs rank - private_rank = {rank - p} public vectors in every "
                f"block, but {name!r} has (equivalent_rank - private_rank) * num_layers = "
                f"{(e - p) * site.num_layers} of them; lower rank or raise equivalent_rank"
            )
        return routing.PoolLayout(site.num_layers, e, rank, p, shards)

    def build(self, sites: Sites, key: jax.Array) -> MoS:
        """See base class."""
        return MoS(self, sites, key)


@strict
def assemble(pool: jax.Array, table: jax.Array) -> jax.Array:
    """Puts rank vectors together from shards (the paper's equation for A^k and B^k).

    Args:
      pool: fp32 [S, w], S shards of width w.
      table: int32 [..., r, l], which shard stands at which position; any leading axes, so that
        all blocks at once and one block are the same function.

    Returns:
      fp32 [..., r, l * w].
    """
    # The indices were checked when the table was drawn or loaded.
    shards = pool.at[table].get(mode="promise_in_bounds")
    return shards.reshape(*table.shape[:-1], table.shape[-1] * pool.shape[-1])


class MoS(Adapter):
    """Pools, routing tables and, in one pilot arm, scalars; each a mapping by site type.

    Attributes:
      pool_a: nnx.Param fp32 [e L l, h / l], U(-1/sqrt(h), 1/sqrt(h)) with the full h.
      pool_b: nnx.Param fp32 [e L l, o / l], zeros: step 0 is the base.
      table_a: Frozen int32 [L, r, l].
      table_b: Frozen int32 [L, r, l].
      scaling: fp32 [L, r], nnx.Param or Frozen; empty without random scaling.
    """

    config: MoSConfig

    def __init__(self, config: MoSConfig, sites: Sites, key: jax.Array):
        layouts = {name: config.layout(name, site) for name, site in check_sites(sites).items()}
        super().__init__(config, sites)
        self.pool_a: nnx.Dict = nnx.Dict()
        self.pool_b: nnx.Dict = nnx.Dict()
        self.table_a: nnx.Dict = nnx.Dict()
        self.table_b: nnx.Dict = nnx.Dict()
        self.scaling: nnx.Dict = nnx.Dict()
        for name, site in self.sites.items():
            layout = layouts[name]
            shards = config.shards_per_vector
            shape_a = (layout.num_shards, site.d_in // shards)
            shape_b = (layout.num_shards, site.d_out // shards)
            self.pool_a[name] = nnx.Param(
                uniform_fan_in(site_key(key, name, "a"), shape_a, site.d_in)
            )
            self.pool_b[name] = nnx.Param(jnp.zeros(shape_b, jnp.float32))
            table_a, table_b = routing.draw_tables(
                layout, name, config.routing_seed, config.pair_dissociation
            )
            self.table_a[name] = Frozen(jnp.asarray(table_a))
            self.table_b[name] = Frozen(jnp.asarray(table_b))
            if config.random_scaling is not None:
                self.scaling[name] = self._draw_scaling(layout, name, key)

    def _draw_scaling(self, layout: routing.PoolLayout, name: str, key: jax.Array) -> nnx.Variable:
        config, shape = self.config, (layout.num_layers, layout.rank)
        if config.random_scaling == "trained":
            noise = jax.random.normal(site_key(key, name, "scaling"), shape, jnp.float32)
            values = config.random_scaling_mean + config.random_scaling_std * noise
            return nnx.Param(values)
        normals = routing.draw_normals(shape, name, config.routing_seed)
        drawn = config.random_scaling_mean + config.random_scaling_std * normals
        return Frozen(jnp.asarray(drawn, jnp.float32))

    def layout(self, name: str) -> routing.PoolLayout:
        """The layout of the pools of site type `name`."""
        return self.config.layout(name, self.sites[name])

    @strict
    def site_factors(self, name: str, layer: jax.Array | int | None = None) -> LowRank:
        """See base class."""
        site = self.sites[name]
        table_a, table_b = self.table_a[name][...], self.table_b[name][...]
        scaling = self.scaling[name][...] if name in self.scaling else None
        scale = self.config.alpha / table_a.shape[1]
        if layer is None:
            scales = jnp.full((site.num_layers,), scale, jnp.float32)
            layers = site.layers
        else:
            index, adapted = local_layer(site, layer)
            table_a, table_b = table_a[index], table_b[index]
            scaling = None if scaling is None else scaling[index]
            scales, layers = adapted * scale, None
        a = assemble(self.pool_a[name][...], table_a)
        if scaling is not None:
            a = a * scaling[..., None]
        return LowRank(a, assemble(self.pool_b[name][...], table_b), scales, layers)

    def tables(self) -> dict[str, np.ndarray]:
        """All routing tables on the host, by `"table_a/<site type>"` and `"table_b/..."`."""
        return {
            f"{part}/{name}": np.asarray(variable[...])
            for part, tables in (("table_a", self.table_a), ("table_b", self.table_b))
            for name, variable in tables.items()
        }

    def check(self) -> None:
        """Checks the routing tables against the configuration. Raises InputError."""
        for name in self.sites:
            layout = self.layout(name)
            table_a, table_b = (
                np.asarray(tables[name][...]) for tables in (self.table_a, self.table_b)
            )
            routing.check_table(layout, table_a, f"table_a/{name}")
            routing.check_table(layout, table_b, f"table_b/{name}")
            if not self.config.pair_dissociation and not np.array_equal(table_a, table_b):
                raise InputError(
                    f"table_b/{name} must be equal to table_a/{name}, since "
                    "pair_dissociation=False routes A and B alike"
                )

    def count_idle_parameters(self) -> int:
        """Trained parameters in shards that no block draws; they never get a gradient."""
        idle = 0
        for name, site in self.sites.items():
            layout, shards = self.layout(name), self.config.shards_per_vector
            for tables, width in ((self.table_a, site.d_in), (self.table_b, site.d_out)):
                unused = routing.count_idle(layout, np.asarray(tables[name][...]))
                idle += unused * (width // shards)
        return idle

    def summary(self) -> dict[str, Any]:
        """See base class; adds what is used, what is idle, and the idle share to expect.

        `parameters_beyond_budget` are the trained scalars of random scaling: e L (h + o) for each
        site type, and these, are all that is trained.
        """
        layouts = [self.layout(name) for name in self.sites]
        idle = self.count_idle_parameters()
        return {
            **super().summary(),
            "used_parameters": self.count_trained() - idle,
            "idle_parameters": idle,
            "parameters_beyond_budget": sum(
                variable[...].size
                for variable in self.scaling.values()
                if isinstance(variable, nnx.Param)
            ),
            "expected_idle_share_of_public_pool": max(map(routing.expected_idle_share, layouts)),
            "routing_checksum": routing.checksum(self.tables()),
        }
