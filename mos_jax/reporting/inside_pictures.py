"""Pictures of what a MoS adapter is made of: pools, routing, and what layers share and own.

Axis legend: L blocks, r rank, l shards per vector, n shards of a pool.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from mos_jax.adapters.mos import MoS, MoSConfig
from mos_jax.adapters.pools import SIDES, Pool, Side
from mos_jax.errors import InputError, suggest
from mos_jax.reporting.style import FAINT, INK, PALETTE, new_figure, require_matplotlib, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PUBLIC_COLOURS = "viridis"
PRIVATE_COLOUR = PALETTE[1]
# Above this many tiles their numbers would run into each other.
MOST_NUMBERED = 200
# In place of a shard where a block has none.
NONE = -1


def shared_shards(adapter: MoS, site: str, side: Side = "a") -> np.ndarray:
    """Which part of a block's shards another block reads as well.

    Returns:
      [L, L]; at [i, j] the share of block i's distinct shards that block j also uses; 1 on the
      diagonal.
    """
    return _common([set(block.flat) for block in _blocks(adapter, site, side)])


def shared_pairs(adapter: MoS, site: str) -> np.ndarray:
    """Which part of a block's pairs another block has as well.

    A pair is a shard of A with the shard of B at the same place of the tables. Blocks in which the
    same shards meet change the weight alike; blocks that share shards in other pairs do not.

    Returns:
      [L, L], as `shared_shards`.
    """
    both = zip(*(_blocks(adapter, site, side) for side in SIDES), strict=True)
    return _common([set(zip(a.flat, b.flat, strict=True)) for a, b in both])


def shared_vectors(adapter: MoS, site: str, side: Side = "a") -> np.ndarray:
    """Which part of a block's vectors another block has as well: the same shards in one order.

    Returns:
      [L, L], as `shared_shards`.
    """
    return _common([set(map(tuple, block.tolist())) for block in _blocks(adapter, site, side)])


def own_shards(adapter: MoS, site: str, side: Side = "a") -> np.ndarray:
    """Which part of a block's shards no other block of the site type reads.

    Returns:
      [L], each from 0 to 1.
    """
    blocks = [set(block.flat) for block in _blocks(adapter, site, side)]
    reads = collections.Counter(itertools.chain.from_iterable(blocks))
    return np.array([sum(reads[shard] == 1 for shard in own) / len(own) for own in blocks])


@dataclasses.dataclass(frozen=True)
class Strategy:
    """One of the four strategies, and what it changes between blocks.

    Attributes:
      label: of what is measured.
      measure: of an adapter and a site type; [L, L] for what two blocks share, or [L].
      off: whether a configuration does without the strategy.
    """

    label: str
    measure: Callable[[MoS, str], np.ndarray]
    off: Callable[[MoSConfig], bool]


# Subset selection, pair dissociation, vector sharding, shard privatization.
STRATEGIES = (
    Strategy("shards of A\nin common", shared_shards, lambda c: not c.subset_selection),
    Strategy("pairs of A and B\nin common", shared_pairs, lambda c: not c.pair_dissociation),
    Strategy("whole vectors of A\nin common", shared_vectors, lambda c: c.shards_per_vector == 1),
    Strategy("shards of A read\nby no other layer", own_shards, lambda c: not c.private_rank),
)


@styled
def pool_picture(adapter: MoS, site: str, side: Side = "a") -> Figure:
    """The numbers of a pool, a shard in each row, the private ones marked with their block."""
    matplotlib = require_matplotlib()
    pool, values = _pool(adapter, site, side)
    layout = pool.layout
    figure = new_figure(6.4, max(2.6, min(8.0, 1.2 + 0.08 * layout.num_shards)))
    axes = figure.add_subplot()
    limit = float(np.abs(values).max()) or 1.0
    image = axes.imshow(
        values, aspect="auto", interpolation="nearest", cmap="RdBu", vmin=-limit, vmax=limit
    )
    axes.spines[:].set_visible(True)
    axes.set_xlabel("position in the shard")
    axes.set_ylabel("shard of the pool")
    axes.set_title(f"Pool of {side.upper()} of {pool.name}: {layout.num_shards} shards")
    ticks, labels = [], []
    for block, start in enumerate(_private_starts(pool)):
        axes.axhline(start - 0.5, color=PRIVATE_COLOUR, linewidth=1.2)
        ticks.append(start + layout.num_private_per_layer / 2 - 0.5)
        labels.append(f"private to layer {block}")
    if ticks:
        right = axes.secondary_yaxis("right")
        every = -(-len(ticks) // 24)
        right.set_yticks(ticks[::every], labels[::every], color=PRIVATE_COLOUR, fontsize=7.5)
        right.tick_params(length=0)
    bar = figure.colorbar(image, ax=axes, location="bottom", shrink=0.5, aspect=30, pad=0.02)
    bar.set_label("value")
    bar.locator = matplotlib.ticker.MaxNLocator(5)
    bar.update_ticks()
    return figure


@styled
def mosaic(adapter: MoS, site: str, layer: int = 0, side: Side = "a") -> Figure:
    """One block's matrix as a mosaic: on the left the pool, on the right where its shards stand.

    Raises:
      InputError: for a block that the site type does not have.
    """
    require_matplotlib()
    blocks = _blocks(adapter, site, side)
    if not 0 <= layer < len(blocks):
        raise InputError(f"{site!r} has the blocks 0 to {len(blocks) - 1}, got layer={layer!r}")
    block, (pool, _) = blocks[layer], _pool(adapter, site, side)
    figure = new_figure(8.6, max(3.0, 1.1 + 0.34 * len(block)))
    left, right = figure.subplots(1, 2, width_ratios=[1, 3.4])
    # The pool, in as many columns as a vector has shards, to stand beside it at one scale.
    columns = block.shape[1]
    numbers = np.arange(pool.layout.num_shards)
    _tiles(left, numbers.reshape(-1, columns), pool, used=set(block.flat))
    left.set_title(f"The pool: {len(numbers)} shards")
    left.set_xticks([])
    left.set_yticks([])
    _tiles(right, block, pool)
    right.set_title(f"{side.upper()} of {site}, layer {layer}")
    right.set_xlabel("position in the vector, in shards")
    right.set_ylabel("vector of the rank")
    right.set_xticks(range(columns))
    right.set_yticks(range(len(block)))
    return figure


@styled
def routing_map(adapter: MoS, site: str) -> Figure:
    """The routing tables of A and B: which shard stands where, in every block."""
    require_matplotlib()
    depth = len(_blocks(adapter, site, "a"))
    figure = new_figure(10.0, max(2.6, 1.2 + 0.22 * depth))
    for axes, side in zip(figure.subplots(1, 2, sharey=True), SIDES, strict=True):
        pool, _ = _pool(adapter, site, side)
        blocks = _blocks(adapter, site, side)
        rank, shards = max(map(len, blocks)), blocks[0].shape[1]
        # A block of a lower rank has no shards in the last columns.
        padded = [np.pad(b, ((0, rank - len(b)), (0, 0)), constant_values=NONE) for b in blocks]
        _tiles(axes, np.stack(padded).reshape(depth, -1), pool)
        axes.set_title(f"{side.upper()} of {site}")
        axes.set_xlabel("vector and position")
        for vector in range(1, rank):
            axes.axvline(vector * shards - 0.5, color="white", linewidth=2.4)
        axes.set_xticks(
            [(vector + 0.5) * shards - 0.5 for vector in range(rank)],
            [str(vector) for vector in range(rank)],
        )
    figure.axes[0].set_ylabel("layer")
    figure.axes[0].set_yticks(range(0, depth, -(-depth // 10)))
    return figure


@styled
def strategy_map(adapters: Mapping[str, MoS], site: str) -> Figure:
    """What blocks have in common and what is their own, for several adapters side by side.

    The rows are what the four strategies are for, in the order of `STRATEGIES`; below a picture is
    its mean over blocks, in colour where the adapter has the row's strategy off.
    """
    require_matplotlib()
    if not adapters:
        raise InputError("strategy_map needs at least one adapter")
    figure = new_figure(1.4 + 1.6 * len(adapters), 7.2)
    grid = figure.subplots(
        len(STRATEGIES), len(adapters), squeeze=False, sharey="row", height_ratios=[1, 1, 1, 0.62]
    )
    image: Any = None
    for row, strategy in enumerate(STRATEGIES):
        for axes, (name, adapter) in zip(grid[row], adapters.items(), strict=True):
            found = strategy.measure(adapter, site)
            mean = float(found.mean())
            if found.ndim == 2:
                image = axes.imshow(found, cmap="cividis_r", vmin=0, vmax=1)
                axes.spines[:].set_visible(True)
                axes.set_yticks([])
                mean = _mean_off_diagonal(found)
            else:
                axes.bar(range(len(found)), found, color=PRIVATE_COLOUR, width=0.8)
            axes.set_xticks([])
            off = strategy.off(adapter.config)
            axes.set_xlabel(
                f"mean {mean:.2f}",
                fontsize=8.5,
                color=PRIVATE_COLOUR if off else INK,
                fontweight="bold" if off else "normal",
            )
            if row == 0:
                axes.set_title(name, fontsize=9)
        grid[row, 0].set_ylabel(strategy.label, fontsize=8.5)
    bar = figure.colorbar(image, ax=grid[:-1], shrink=0.6, aspect=24, pad=0.01)
    bar.set_label("part that another layer has as well")
    return figure


def _blocks(adapter: MoS, site: str, side: Side) -> list[np.ndarray]:
    """The routing table of each block of a site type, [r, l]. Raises InputError if unknown."""
    if site not in adapter.sites:
        raise InputError(f"no site type {site!r}; {suggest(site, adapter.sites)}")
    table = adapter.tables()[f"table_{side}/{site}"]
    return [block[:rank] for block, rank in zip(table, adapter.site_ranks[site], strict=True)]


def _pool(adapter: MoS, site: str, side: Side) -> tuple[Pool, np.ndarray]:
    pool = next(pool for pool in adapter.pools(side) if site in pool.blocks)
    arrays = adapter.pool_a if side == "a" else adapter.pool_b
    return pool, np.asarray(arrays[pool.name][...])


def _private_starts(pool: Pool) -> list[int]:
    """The first private shard of each block; empty where there are none."""
    each = pool.layout.num_private_per_layer
    return [
        pool.layout.num_public + block * each
        for block in range(pool.layout.num_layers if each else 0)
    ]


def _common(blocks: list[set[Any]]) -> np.ndarray:
    return np.array([[len(one & other) / len(one) for other in blocks] for one in blocks])


def _mean_off_diagonal(share: np.ndarray) -> float:
    off = ~np.eye(len(share), dtype=bool)
    return float(share[off].mean()) if off.any() else 0.0


def _tiles(axes: Axes, shards: np.ndarray, pool: Pool, used: set[int] | None = None) -> None:
    """A tile for each shard, coloured by its number; private ones in one colour, NONE in white."""
    matplotlib = require_matplotlib()
    public = pool.layout.num_public
    colours = matplotlib.colormaps[PUBLIC_COLOURS](shards / max(public - 1, 1))
    colours[shards >= public] = matplotlib.colors.to_rgba(PRIVATE_COLOUR)
    colours[shards == NONE] = 1
    if used is not None:
        colours[..., 3] = np.where(np.isin(shards, list(used)), 1.0, 0.22)
    axes.imshow(colours, aspect="auto", interpolation="nearest")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    for edge in range(shards.shape[0] + 1):
        axes.axhline(edge - 0.5, color="white", linewidth=0.8)
    for edge in range(shards.shape[1] + 1):
        axes.axvline(edge - 0.5, color="white", linewidth=0.8)
    if shards.size > MOST_NUMBERED:
        return
    for (row, column), number in np.ndenumerate(shards):
        if number == NONE:
            continue
        faded = used is not None and int(number) not in used
        dark = number < public and number < 0.6 * public
        axes.text(
            column,
            row,
            str(number),
            ha="center",
            va="center",
            fontsize=7,
            color=FAINT if faded else "white" if dark or number >= public else INK,
        )
