"""Uni-LoRA, all factors from one trained vector (Li et al., NeurIPS 2025, arXiv 2506.00799).

Every entry of every A and B of the whole model is an entry of one trained vector theta [D], looked
up through a frozen index and divided by the square root of how often that entry is used. As a
matrix from theta to all factors this has orthonormal columns.

Axis legend: L blocks, r rank, D trained parameters, N entries of all factors, h = d_in, o = d_out.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mos_jax.adapters.adapter import (
    Adapter,
    AdapterConfig,
    Frozen,
    choose_blocks,
    require_integer,
    site_key,
)
from mos_jax.adapters.low_rank import LowRank
from mos_jax.adapters.patterns import keep_ranks, row_mask
from mos_jax.adapters.routing import raw_words
from mos_jax.adapters.sites import Sites, check_sites
from mos_jax.adapters.strictness import strict
from mos_jax.errors import InputError, suggest

THETA_BOUND = 0.02
UsedMore = Literal["first", "drawn"]
USED_MORE: tuple[UsedMore, ...] = ("first", "drawn")
# How far a stored scale may be from the root of a count: one that was rounded to bf16 is 2^-9 off.
SCALE_TOLERANCE = 2**-8


@dataclasses.dataclass(frozen=True)
class UniLoRAConfig(AdapterConfig):
    """Configuration of Uni-LoRA (arXiv 2506.00799). The scale is 1.

    Attributes:
      theta_length: D, all trained parameters; at most the N entries of all factors. The paper has
        524,288 on LLaMA 2.
      rank: r, rank vectors of every site that `rank_pattern` does not name. It costs no
        parameters, only a longer index: one integer for each of the N entries.
      routing_seed: seeds the index through NumPy.
      used_more: which N % D entries of theta are used once more than the others. "first" ones, or
        "drawn" ones as in the authors' code and PEFT's, for which the scale of every entry is
        stored. Before training the entries are alike, so that this only renames them.
    """

    method: ClassVar[str] = "uni_lora"
    size_field: ClassVar[str] = "theta_length"
    no_pattern: ClassVar[Mapping[str, str]] = {
        "alpha_pattern": "Uni-LoRA has no alpha; the scale is 1 and theta sets the size"
    }

    theta_length: int = 524_288
    rank: int = 4
    routing_seed: int = 0
    used_more: UsedMore = "first"

    def __post_init__(self) -> None:
        """Checks the fields. Raises InputError."""
        super().__post_init__()
        require_integer("uni_lora", "theta_length", self.theta_length, 1)
        require_integer("uni_lora", "rank", self.rank, 1)
        require_integer("uni_lora", "routing_seed", self.routing_seed, 0)
        if self.used_more not in USED_MORE:
            raise InputError(
                f"uni_lora: unknown used_more {self.used_more!r}; "
                f"{suggest(str(self.used_more), USED_MORE)}"
            )

    def count_entries(self, sites: Sites) -> int:
        """N, entries of all factors.

        Raises:
          InputError: if there are fewer of them than trained parameters.
        """
        parts = index_parts(sites, self.site_ranks(sites))
        entries = sum(sum(ranks) * width for ranks, width in parts.values())
        if self.theta_length > entries:
            raise InputError(
                f"uni_lora: theta_length={self.theta_length} must be at most the {entries} entries "
                f"that all A and B have together at rank={self.rank}; lower it or raise rank"
            )
        return entries

    def build(self, sites: Sites, key: jax.Array) -> UniLoRA:
        """See base class."""
        return UniLoRA(self, sites, key)


# Of the index of an A or a B, the rank of each block and the width.
Part = tuple[Sequence[int], int]


def index_parts(sites: Sites, ranks: Mapping[str, Sequence[int]]) -> dict[str, Part]:
    """The index of every A and B, by `"index_a/<site type>"` and `"index_b/..."`.

    Sorted by site type: the order in which sites are written down has no part in what is drawn.
    """
    return {
        f"index_{part}/{name}": (ranks[name], width)
        for name, site in sorted(check_sites(sites).items())
        for part, width in (("a", site.d_in), ("b", site.d_out))
    }


def index_shapes(sites: Sites, ranks: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
    """Shapes of the index, [L, r, width] each, r the largest rank; see `index_parts`."""
    parts = index_parts(sites, ranks)
    return {name: (len(own), max(own), width) for name, (own, width) in parts.items()}


def draw_index(
    parts: Mapping[str, Part],
    theta_length: int,
    seed: int,
    used_more: UsedMore = "first",
) -> dict[str, np.ndarray]:
    """Draws which entry of theta stands at every place of every factor.

    All places of the model in a random order, counted off by D. So every entry is used N // D
    times, and the first N % D entries once more; or, where those are to be drawn, the first ones of
    a random order of the entries.

    Args:
      parts: see `index_parts`.
      theta_length: D.
      seed: the routing seed.
      used_more: see `UniLoRAConfig`.

    Returns:
      int32 [L, r, width] each, r the largest rank; 0 in the rows beyond a block's rank.
    """
    sizes = [sum(ranks) * width for ranks, width in parts.values()]
    flat = (_random_order(sum(sizes), seed) % theta_length).astype(np.int32)
    if used_more == "drawn":
        words = raw_words(theta_length, seed, "uni_lora/used_more")
        flat = np.argsort(words, kind="stable").astype(np.int32)[flat]
    pieces = np.split(flat, np.cumsum(sizes)[:-1])
    found = {}
    for (name, (ranks, width)), piece in zip(parts.items(), pieces, strict=True):
        found[name] = np.zeros((len(ranks), max(ranks), width), np.int32)
        found[name][row_mask(ranks)] = piece.reshape(-1, width)
    return found


@functools.lru_cache(maxsize=1)
def _random_order(count: int, seed: int) -> np.ndarray:
    """The numbers below `count` in a random order; the last one is kept, since it takes long."""
    # Sorted, not Generator.permutation: see raw_words.
    order = np.argsort(raw_words(count, seed, "uni_lora"), kind="stable")
    if count < 2**31:
        order = order.astype(np.int32)
    order.setflags(write=False)
    return order


def count_uses(
    tables: Mapping[str, np.ndarray], theta_length: int, parts: Mapping[str, Part] | None = None
) -> np.ndarray:
    """How often each entry of theta stands in the tables, int64 [D].

    With `parts`, the rows beyond a block's rank are left out.
    """
    rows = {name: slice(None) if parts is None else row_mask(parts[name][0]) for name in tables}
    every = np.concatenate([table[rows[name]].ravel() for name, table in tables.items()])
    return np.bincount(every, minlength=theta_length)


def scales_of(uses: np.ndarray) -> np.ndarray:
    """fp32 [D], one over the root of how often each entry is used, with PEFT's roundings."""
    return np.float32(1) / np.sqrt(uses.astype(np.float32))


class UniLoRA(Adapter):
    """One trained vector, and the index by site type; Uni-LoRA (arXiv 2506.00799).

    Neither A nor B is zero at the start: step 0 is near the base, not the base itself.

    Attributes:
      theta: nnx.Param fp32 [D], U(-0.02, 0.02); belongs to no site type.
      index_a: Frozen int32 [L, r, h], r the largest rank; 0 in the rows beyond a block's rank.
      index_b: Frozen int32 [L, r, o], likewise.
      scales: with `used_more="drawn"`, Frozen fp32 [D], what each entry of theta is multiplied by,
        1 / sqrt(how often it is used); without, None.
    """

    config: UniLoRAConfig

    def __init__(self, config: UniLoRAConfig, sites: Sites, key: jax.Array):
        config.count_entries(sites)
        super().__init__(config, sites)
        # No site type has an empty name, so this key is no site's.
        theta_key, shape = site_key(key, "", "theta"), (config.theta_length,)
        self.theta = nnx.Param(
            jax.random.uniform(theta_key, shape, jnp.float32, -THETA_BOUND, THETA_BOUND)
        )
        parts = index_parts(self.sites, self.site_ranks)
        index = draw_index(parts, config.theta_length, config.routing_seed, config.used_more)
        self.index_a: nnx.Dict = nnx.Dict()
        self.index_b: nnx.Dict = nnx.Dict()
        for name in self.sites:
            self.index_a[name] = Frozen(jnp.asarray(index[f"index_a/{name}"]))
            self.index_b[name] = Frozen(jnp.asarray(index[f"index_b/{name}"]))
        drawn = config.used_more == "drawn"
        uses = count_uses(index, config.theta_length, parts)
        self.scales = Frozen(jnp.asarray(scales_of(uses))) if drawn else None

    @strict
    def site_factors(self, name: str, layer: jax.Array | int | None = None) -> LowRank:
        """See base class."""
        theta = self._normalised()
        index, scale, layers = choose_blocks(self.sites[name], layer, self.site_scales[name])
        # The indices were checked when they were drawn or loaded.
        a, b = (
            theta.at[part[name][index]].get(mode="promise_in_bounds")
            for part in (self.index_a, self.index_b)
        )
        return keep_ranks(LowRank(a, b, scale, layers), self.site_ranks[name], index)

    def _normalised(self) -> jax.Array:
        """Theta over the square root of how often each entry is used: fp32 [D]."""
        if self.scales is not None:
            return self.theta[...] * self.scales[...]
        uses, more = divmod(self.config.count_entries(self.sites), self.config.theta_length)
        seldom, often = (np.float32(count**-0.5) for count in (uses, uses + 1))
        factor = jnp.where(jnp.arange(self.config.theta_length) < more, often, seldom)
        return self.theta[...] * factor

    def tables(self) -> dict[str, np.ndarray]:
        """The index on the host, by `"index_a/<site type>"` and `"index_b/..."`."""
        return {
            f"{part}/{name}": np.asarray(variable[...])
            for part, tables in (("index_a", self.index_a), ("index_b", self.index_b))
            for name, variable in tables.items()
        }

    def check(self) -> None:
        """Checks shapes, range and balance of the index. Raises InputError."""
        length, tables = self.config.theta_length, self.tables()
        parts = index_parts(self.sites, self.site_ranks)
        for name, shape in index_shapes(self.sites, self.site_ranks).items():
            table = tables[name]
            if table.shape != shape or table.dtype != np.int32:
                raise InputError(
                    f"{name}: the index here is int32 {shape}, got {table.dtype} {table.shape}"
                )
            if table.min() < 0 or table.max() >= length:
                raise InputError(f"{name}: an index lies outside 0..{length - 1}")
            if np.any(table[~row_mask(parts[name][0])]):
                raise InputError(f"{name}: an index beyond the rank of its block is not 0")
        used = count_uses(tables, length, parts)
        uses, more = divmod(self.config.count_entries(self.sites), length)
        if self.scales is None:
            wanted = uses + (np.arange(length) < more)
        else:
            wanted = np.clip(used, uses, uses + 1)
        wrong = np.flatnonzero(used != wanted)
        if wrong.size:
            entry = wrong[0]
            raise InputError(
                f"the index is not balanced: it uses entry {entry} of theta {used[entry]} times "
                f"instead of {wanted[entry]}"
            )
        if self.scales is not None:
            scales = np.asarray(self.scales[...])
            wrong = np.flatnonzero(~(np.abs(scales * np.sqrt(used) - 1) <= SCALE_TOLERANCE))
            if wrong.size:
                entry = wrong[0]
                raise InputError(
                    f"scales: entry {entry} of theta is used {used[entry]} times, so that its "
                    f"scale is 1 / sqrt({used[entry]}), got {scales[entry]}"
                )
