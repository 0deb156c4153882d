"""MoS, Mixture of Shards (Wang et al., ICLR 2025, arXiv 2410.00938).

Per site type there is one pool of A-shards [e L l, h / l] and one of B-shards [e L l, o / l], owned
by the adapter and shared by all blocks. A rank vector is the concatenation of l shards that a
frozen routing table picks (`pools.py`, `routing.py`). Four strategies keep the blocks apart, each
with its switch:

=====================  ==========================================  ============================
strategy               on                                          off
=====================  ==========================================  ============================
subset selection       a block draws (r - p) l public shards       a block uses all of them
pair dissociation      A and B are routed independently            B uses A's table
vector sharding        shards_per_vector > 1                       shards_per_vector = 1
shard privatization    private_rank > 0                            private_rank = 0
=====================  ==========================================  ============================

Four options go beyond the paper, each one field and off by default: `balanced_routing`,
`rank_scaling`, `pool_scope` and `b_rate_ratio`.

Axis legend: L blocks, r active rank, e equivalent rank, p private rank, l shards per vector,
h = d_in, o = d_out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
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
    choose_blocks,
    require_bool,
    require_finite,
    require_integer,
    require_positive,
    site_key,
    uniform_fan_in,
)
from mos_jax.adapters.low_rank import LowRank
from mos_jax.adapters.patterns import keep_ranks, missing_rows, zero_tails
from mos_jax.adapters.pools import SCOPES, SIDES, Pool, Scope, Side, assemble, plan_pools
from mos_jax.adapters.sites import Sites, check_sites
from mos_jax.adapters.strictness import strict
from mos_jax.errors import InputError, suggest


@dataclasses.dataclass(frozen=True)
class MoSConfig(AdapterConfig):
    """Configuration of MoS.

    Attributes:
      equivalent_rank: e, the budget: exactly the trained parameters of LoRA of rank e, which are
        e L (h + o) for each site type. Only trained scalars add to it: `rank_scaling`,
        random_scaling="trained". One number, since it sizes pools that blocks share.
      rank: r, the active rank of every assembled A and B that `rank_pattern` does not name; a site
        of a lower rank draws fewer public shards. Left open (None) when every block uses all
        shards: then it is p + (e - p) L. With private_rank = equivalent_rank it is e.
      shards_per_vector: l; divides every adapted width.
      private_rank: p, vectors of each site that belong to it alone.
      alpha: the scale is alpha / rank; the active rank scales, not the equivalent one.
      routing_seed: seeds the routing tables (and fixed random scalars) through NumPy.
      subset_selection: a block draws (r - p) l public shards; off: every block uses all of them.
      pair_dissociation: A and B are routed independently; off: B uses A's table.
      random_scaling: None; or every site multiplies its r vectors of A by scalars of its own
        ~ N(mean, std), "fixed" or "trained" (the pilot study's arm). The trained ones are L r
        more trained parameters for each site type, beyond the budget.
      random_scaling_mean: mean of those scalars.
      random_scaling_std: their standard deviation.
      rank_scaling: every site has a trained diagonal between its A and its B that starts at ones:
        L r more trained parameters for each site type, beyond the budget. It is the trained form
        of random_scaling without the noise, so only one of the two may be set.
      balanced_routing: every public shard is used equally often over all blocks, up to one use, so
        that none is idle once the blocks draw as many shards as there are. With rank =
        equivalent_rank each is used once and nothing is shared. Where every block uses all shards
        (subset_selection=False) routing is balanced anyhow and the field changes nothing.
      pool_scope: "site_type", a pair of pools for each type; or "width", one pool of A for all
        types of one d_in and one of B for all types of one d_out, as large as theirs together,
        of which every site draws from the whole public part. Rank is then bounded by the smallest
        of these pools. Private shards stay a site's own. Needs subset_selection and
        pair_dissociation, since the pools that meet at a site differ in size.
      b_rate_ratio: the pools of B learn at this multiple of the learning rate (LoRA+, Hayou et
        al., ICML 2024, arXiv 2402.12354).
    """

    method: ClassVar[str] = "mos"
    size_field: ClassVar[str] = "equivalent_rank"

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
    rank_scaling: bool = False
    balanced_routing: bool = False
    pool_scope: Scope = "site_type"
    b_rate_ratio: float = 1.0

    def __post_init__(self) -> None:
        """Checks what can be checked without the sites. Raises InputError."""
        super().__post_init__()
        require_integer("mos", "equivalent_rank", self.equivalent_rank, 1)
        require_integer("mos", "shards_per_vector", self.shards_per_vector, 1)
        require_integer("mos", "private_rank", self.private_rank, 0)
        require_integer("mos", "routing_seed", self.routing_seed, 0)
        require_positive("mos", "alpha", self.alpha)
        require_positive("mos", "b_rate_ratio", self.b_rate_ratio)
        for switch in ("subset_selection", "pair_dissociation", "rank_scaling", "balanced_routing"):
            require_bool("mos", switch, getattr(self, switch))
        self._check_ranks()
        self._check_scaling()
        self._check_pool_scope()

    def _check_ranks(self) -> None:
        e, p = self.equivalent_rank, self.private_rank
        if p > e:
            raise InputError(f"mos: private_rank={p} must be at most equivalent_rank={e}")
        ranks = {f"rank_pattern[{key!r}]": r for key, r in self.rank_pattern.items()}
        if self.rank is not None:
            require_integer("mos", "rank", self.rank, 1)
            ranks["rank"] = self.rank
        for field, r in ranks.items():
            if not self.subset_selection:
                raise InputError(
                    f"mos: {field}={r} contradicts subset_selection=False, where every block uses "
                    "all shards; leave rank open (None), it becomes private_rank + "
                    "(equivalent_rank - private_rank) * num_layers"
                )
            if p == e and r != e:
                raise InputError(
                    f"mos: with private_rank = equivalent_rank = {e} nothing is public, so {field} "
                    f"must be {e}, got {r}"
                )
            if p < e and r <= p:
                raise InputError(
                    f"mos: {field}={r} must be above private_rank={p}, or no public shard is used "
                    f"although equivalent_rank={e} pays for them"
                )
        if self.rank is None and self.subset_selection and (p < e or self.rank_pattern):
            raise InputError(
                "mos: rank is open (None), but subset_selection=True needs it; give rank "
                f"(the paper uses up to 8 * equivalent_rank = {8 * e}) or set "
                "subset_selection=False"
            )

    def _check_scaling(self) -> None:
        if self.random_scaling not in (None, "fixed", "trained"):
            raise InputError(
                "mos: random_scaling must be None, 'fixed' or 'trained', got "
                f"{self.random_scaling!r}"
            )
        if self.rank_scaling and self.random_scaling is not None:
            raise InputError(
                f"mos: rank_scaling=True contradicts random_scaling={self.random_scaling!r}: a "
                "site has one diagonal, which starts at ones or at random; set one of the two"
            )
        require_finite("mos", "random_scaling_mean", self.random_scaling_mean)
        require_finite("mos", "random_scaling_std", self.random_scaling_std)
        if self.random_scaling_std < 0:
            raise InputError(
                f"mos: random_scaling_std must be >= 0, got {self.random_scaling_std!r}"
            )

    def _check_pool_scope(self) -> None:
        if self.pool_scope not in SCOPES:
            raise InputError(
                f"mos: pool_scope={self.pool_scope!r}; {suggest(str(self.pool_scope), SCOPES)}"
            )
        if self.pool_scope == "site_type":
            return
        for switch, reason in (
            ("subset_selection", "every block would use all shards of both"),
            ("pair_dissociation", "B would use A's indices"),
        ):
            if not getattr(self, switch):
                raise InputError(
                    f"mos: {switch}=False contradicts pool_scope='width': {reason}, but the pools "
                    "of A and B that meet at a site differ in size; use pool_scope='site_type'"
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
        off = dict.fromkeys(("subset_selection", "pair_dissociation"), False)
        arm: dict[str, Any] = {"rank": None, "shards_per_vector": 1, "private_rank": 0, **off}
        for name, value in arm.items():
            if fields.get(name, value) != value:
                raise InputError(
                    f"mos: {name}={fields[name]!r} contradicts pure_sharing, where it is "
                    f"{value!r}; leave it out or use MoSConfig"
                )
        return cls.from_dict({"equivalent_rank": equivalent_rank, **fields, **arm})

    def site_ranks(self, sites: Sites) -> dict[str, tuple[int, ...]]:
        """See base class; where rank is open, it is that of blocks which use all shards."""
        if self.rank is not None:
            return super().site_ranks(sites)
        e, p = self.equivalent_rank, self.private_rank
        blocks = {name: site.num_layers for name, site in check_sites(sites).items()}
        return {name: (p + (e - p) * count,) * count for name, count in blocks.items()}

    def site_scales(self, sites: Sites) -> dict[str, tuple[float, ...]]:
        """See base class."""
        return self._alpha_over_rank(sites)

    def pools(
        self, sites: Sites, side: Side, ranks: Mapping[str, tuple[int, ...]] | None = None
    ) -> list[Pool]:
        """The pools of A or of B that `sites` need; `ranks` are their `site_ranks`, if at hand.

        Raises:
          InputError: if the configuration does not fit the sites, with the numbers.
        """
        return plan_pools(
            sites,
            side,
            self.pool_scope,
            equivalent_rank=self.equivalent_rank,
            ranks=ranks or self.site_ranks(sites),
            private_rank=self.private_rank,
            shards_per_vector=self.shards_per_vector,
        )

    def rate_ratios(self) -> Mapping[str, float]:
        """See base class."""
        return {} if self.b_rate_ratio == 1 else {"pool_b": self.b_rate_ratio}

    def build(self, sites: Sites, key: jax.Array) -> MoS:
        """See base class."""
        return MoS(self, sites, key)


class MoS(Adapter):
    """Pools by their name; routing tables and, where asked for, scalars by site type.

    Attributes:
      pool_a: nnx.Param fp32 [e L l, h / l], U(-1/sqrt(h), 1/sqrt(h)) with the full h.
      pool_b: nnx.Param fp32 [e L l, o / l], zeros: step 0 is the base.
      table_a: Frozen int32 [L, r, l]; r is the largest rank, rows beyond a block's are zeros.
      table_b: Frozen int32 [L, r, l].
      scaling: fp32 [L, r], a factor of each vector of A; nnx.Param or Frozen, empty without.
    """

    config: MoSConfig

    def __init__(self, config: MoSConfig, sites: Sites, key: jax.Array):
        pools_a, pools_b = (config.pools(check_sites(sites), side) for side in SIDES)
        super().__init__(config, sites)
        self.pool_a: nnx.Dict = nnx.Dict()
        self.pool_b: nnx.Dict = nnx.Dict()
        self.table_a: nnx.Dict = nnx.Dict()
        self.table_b: nnx.Dict = nnx.Dict()
        self.scaling: nnx.Dict = nnx.Dict()
        for pool in pools_a:
            shards = uniform_fan_in(site_key(key, pool.name, "a"), pool.shape, pool.width)
            self.pool_a[pool.name] = nnx.Param(shards)
            self._draw_tables(pool, "a")
        for pool in pools_b:
            self.pool_b[pool.name] = nnx.Param(jnp.zeros(pool.shape, jnp.float32))
            self._draw_tables(pool, "b")
        for name in self.sites:
            scaling = self._draw_scaling(name, key)
            if scaling is not None:
                self.scaling[name] = scaling

    def _draw_tables(self, pool: Pool, side: Side) -> None:
        config = self.config
        drawn = side if config.pair_dissociation else "a"
        table = routing.draw_table(
            pool.layout, pool.name, drawn, config.routing_seed, config.balanced_routing
        )
        for name, blocks in pool.blocks.items():
            own = table[blocks.start : blocks.stop, : max(self.site_ranks[name])]
            self._tables(side)[name] = Frozen(jnp.asarray(own))

    def _draw_scaling(self, name: str, key: jax.Array) -> nnx.Variable | None:
        config, ranks = self.config, self.site_ranks[name]
        shape = (len(ranks), max(ranks))
        if config.rank_scaling:
            return nnx.Param(zero_tails(jnp.ones(shape, jnp.float32), ranks))
        if config.random_scaling is None:
            return None
        noise: jax.Array | np.ndarray = routing.draw_normals(shape, name, config.routing_seed)
        if trained := config.random_scaling == "trained":
            noise = jax.random.normal(site_key(key, name, "scaling"), shape, jnp.float32)
        drawn = jnp.float32(config.random_scaling_mean + config.random_scaling_std * noise)
        return (nnx.Param if trained else Frozen)(zero_tails(drawn, ranks))

    def pools(self, side: Side) -> list[Pool]:
        """The pools of A or of B: their sizes, and which sites draw from which."""
        return self.config.pools(self.sites, side, self.site_ranks)

    def pool_table(self, pool: Pool, side: Side) -> np.ndarray:
        """The routing tables of all site types of a pool, one after the other, on the host."""
        tables = [np.asarray(self._tables(side)[name][...]) for name in pool.blocks]
        padded = [((0, 0), (0, pool.layout.rank - t.shape[1]), (0, 0)) for t in tables]
        return np.concatenate(list(map(np.pad, tables, padded)))

    def _tables(self, side: Side) -> nnx.Dict:
        return self.table_a if side == "a" else self.table_b

    def shards(self, side: Side, name: str) -> jax.Array:
        """The pool that the site type `name` draws from: fp32 [e L l, h / l] or [e L l, o / l]."""
        arrays = self.pool_a if side == "a" else self.pool_b
        return next(arrays[pool.name][...] for pool in self.pools(side) if name in pool.blocks)

    @strict
    def site_factors(self, name: str, layer: jax.Array | int | None = None) -> LowRank:
        """See base class."""
        index, scale, layers = choose_blocks(self.sites[name], layer, self.site_scales[name])
        a = assemble(self.shards("a", name), self.table_a[name][index])
        if name in self.scaling:
            a = a * self.scaling[name][index][..., None]
        b = assemble(self.shards("b", name), self.table_b[name][index])
        return keep_ranks(LowRank(a, b, scale, layers), self.site_ranks[name], index)

    def padded_rows(self, part: str, name: str) -> int:
        """See base class."""
        return missing_rows(self.site_ranks[name]) if part == "scaling" else 0

    def tables(self) -> dict[str, np.ndarray]:
        """All routing tables on the host, by `"table_a/<site type>"` and `"table_b/..."`."""
        return {
            f"table_{side}/{name}": np.asarray(variable[...])
            for side in SIDES
            for name, variable in self._tables(side).items()
        }

    def check(self) -> None:
        """Checks the routing tables against the configuration. Raises InputError."""
        tables = self.tables()
        for side in SIDES:
            for pool in self.pools(side):
                names = [f"table_{side}/{name}" for name in pool.blocks]
                for name, blocks in zip(names, pool.blocks.values(), strict=True):
                    routing.check_table(pool.layout, tables[name], name, blocks)
                if self.config.balanced_routing:
                    table = self.pool_table(pool, side)
                    routing.check_balance(pool.layout, table, " and ".join(names))
        for name in self.sites:
            same = np.array_equal(tables[f"table_a/{name}"], tables[f"table_b/{name}"])
            if not self.config.pair_dissociation and not same:
                raise InputError(
                    f"table_b/{name} must be equal to table_a/{name}, since "
                    "pair_dissociation=False routes A and B alike"
                )

    def count_idle_parameters(self) -> int:
        """Trained parameters in shards that no site draws; they never get a gradient."""
        return sum(
            routing.count_idle(pool.layout, self.pool_table(pool, side)) * pool.shape[1]
            for side in SIDES
            for pool in self.pools(side)
        )

    def summary(self) -> dict[str, Any]:
        """See base class; adds what is used, what is idle, and the idle share to expect.

        `parameters_beyond_budget` are the trained scalars: e L (h + o) for each site type, and
        these, are all that is trained.
        """
        balanced = self.config.balanced_routing
        shares = [
            routing.expected_idle_share(pool.layout, balanced)
            for side in SIDES
            for pool in self.pools(side)
        ]
        idle = self.count_idle_parameters()
        scalars = [n for n, variable in self.scaling.items() if isinstance(variable, nnx.Param)]
        return {
            **super().summary(),
            "used_parameters": self.count_trained() - idle,
            "idle_parameters": idle,
            "parameters_beyond_budget": sum(sum(self.site_ranks[name]) for name in scalars),
            "expected_idle_share_of_public_pool": max(shares),
            "routing_checksum": routing.checksum(self.tables()),
        }
