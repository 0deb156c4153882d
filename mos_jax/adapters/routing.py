"""Index routing: which shards each rank vector is put together from.

A routing table is int32 [L, r, l]: entry [k, j, i] is the index, in a pool of shards, of the one at
position i of rank vector j of block k. It is drawn once from a seed with NumPy, outside any trace,
frozen, stored with the adapter and checked by its checksum (MoS, arXiv 2410.00938, section 3: the
"MoE-like" look-up that does not depend on the input).

Everything here is of one pool; where several site types share it, its table is theirs one after
the other (see `pools.py`).

Axis legend: L blocks, r active rank, e equivalent rank, p private rank, l shards per vector.
"""

from __future__ import annotations

import contextlib
import contextvars
import hashlib
import math
import zlib
from collections.abc import Iterator, Mapping

import numpy as np

from mos_jax.adapters.pools import PoolLayout, Side
from mos_jax.errors import InputError

_MOST: contextvars.ContextVar[int | None] = contextvars.ContextVar("most", default=None)


@contextlib.contextmanager
def drawing_at_most(count: int) -> Iterator[None]:
    """Refuses, inside, to draw more than `count` numbers at once.

    For sizes that a file states: whatever is drawn for an adapter is also stored with it, so that
    there is an upper bound.
    """
    token = _MOST.set(count)
    try:
        yield
    finally:
        _MOST.reset(token)


def _check_count(count: int) -> None:
    most = _MOST.get()
    if most is not None and count > most:
        raise InputError(
            f"the configuration asks for {count} drawn numbers, more than are stored with it"
        )


def draw_table(
    layout: PoolLayout, name: str, side: Side, seed: int, balanced: bool = False
) -> np.ndarray:
    """Draws the table of one pool.

    Every block draws its public shards without replacement inside the matrix; across blocks they
    repeat. When a block uses all public shards (subset selection off) the draw is a random order,
    and balanced as it is: the table is the same with `balanced` and without.
    Private shards stand in the last p vectors, in order, so that private vector j of A meets
    private vector j of B. Where blocks differ in rank, one of a lower rank draws fewer public
    shards, the first ones of those that it would draw at a higher rank unless `balanced`, and its
    table ends in rows of zeros that stand for no vectors.

    Args:
      layout: the pool's layout.
      name: the pool; each has a stream of its own, whatever other types are adapted.
      side: "a" or "b", which have streams of their own too.
      seed: the routing seed.
      balanced: every public shard is used equally often over all blocks, up to one.

    Returns:
      int32 [L, r, l].
    """
    shards, p = layout.shards_per_vector, layout.private_rank
    _check_count(layout.num_layers * layout.rank * shards)
    stream = f"{name}/{side}"
    all_used = min(layout.drawn) == layout.num_public
    draw = _draw_balanced if balanced and not all_used else _draw
    private = np.arange(layout.num_public, layout.num_shards).reshape(layout.num_layers, p, shards)
    table = np.zeros((layout.num_layers, layout.rank, shards), np.int32)
    for k, public in enumerate(draw(layout, stream, seed)):
        rank = layout.rank_of(k)
        table[k, : rank - p] = public.reshape(rank - p, shards)
        table[k, rank - p : rank] = private[k]
    return table


def _draw(layout: PoolLayout, stream: str, seed: int) -> list[np.ndarray]:
    """Public shards of every block, int64 [(r - p) l], each block on its own."""
    picks = []
    for k, drawn in enumerate(layout.drawn):
        words = raw_words(layout.num_public, seed, stream, k)
        # Sorted, not Generator.permutation: see raw_words.
        picks.append(np.argsort(words, kind="stable")[:drawn])
    return picks


def _draw_balanced(layout: PoolLayout, stream: str, seed: int) -> list[np.ndarray]:
    """The same, where a block takes from the shards that were used least so far.

    So two shards never differ by more than one use. The blocks take their turns in random order:
    those who draw one after the other share little, and that shall not be the neighbours.
    """
    picks: dict[int, np.ndarray] = {}
    uses = np.zeros(layout.num_public, np.int64)
    turns = np.argsort(raw_words(layout.num_layers, seed, f"{stream}/turns"), kind="stable")
    for k in turns.tolist():
        words = raw_words(2 * layout.num_public, seed, f"{stream}/balanced", k)
        choice, order = words.reshape(2, layout.num_public)
        chosen = np.lexsort((choice, uses))[: layout.drawn[k]]
        uses[chosen] += 1
        # By words that had no part in the choice, or the least used would stand first.
        picks[k] = chosen[np.argsort(order[chosen], kind="stable")]
    return [picks[k] for k in range(layout.num_layers)]


def draw_normals(shape: tuple[int, ...], name: str, seed: int) -> np.ndarray:
    """Draws the standard normal numbers of one site type for fixed random scaling.

    Args:
      shape: of the result.
      name: the site type; each type has a stream of its own.
      seed: the routing seed.

    Returns:
      float64 of `shape`.
    """
    words = raw_words(2 * math.prod(shape), seed, f"{name}/scaling")
    # Box and Muller, of the 53 bits that fill a double: two uniform numbers in [0, 1).
    uniform = ((words >> np.uint64(11)) * 2.0**-53).reshape(2, *shape)
    return np.sqrt(-2 * np.log1p(-uniform[0])) * np.cos(2 * np.pi * uniform[1])


def raw_words(count: int, seed: int, stream: str, *block: int) -> np.ndarray:
    """uint64 [count] of a stream of its own for each seed, name and block.

    Raw words, not a Generator: NumPy keeps the raw stream of a bit generator fixed for good, and
    may change what a Generator makes of it.
    """
    _check_count(count)
    entropy = [seed, zlib.crc32(stream.encode()), *block]
    return np.random.PCG64(np.random.SeedSequence(entropy)).random_raw(count)


def check_table(
    layout: PoolLayout, table: np.ndarray, where: str, blocks: range | None = None
) -> None:
    """Checks that `table` is a routing table of `layout`.

    Args:
      layout: the pool's layout.
      table: int32 [L, r, l].
      where: what the table is called in messages.
      blocks: the blocks of the layout that `table` is for; None = all.

    Raises:
      InputError: for a wrong shape or dtype, an index out of range, a shard used twice in one
        matrix, a private shard in another block than its own, or an index other than 0 beyond a
        block's rank.
    """
    blocks = range(layout.num_layers) if blocks is None else blocks
    shape = (len(blocks), max(map(layout.rank_of, blocks)), layout.shards_per_vector)
    if table.shape != shape or table.dtype != np.int32:
        raise InputError(
            f"{where}: a routing table here is int32 {shape}, got {table.dtype} {table.shape}"
        )
    for k, block in enumerate(blocks):
        rank = layout.rank_of(block)
        public_vectors = rank - layout.private_rank
        public = table[k, :public_vectors].ravel()
        if public.size and (public.min() < 0 or public.max() >= layout.num_public):
            raise InputError(
                f"{where}: block {k} uses a public shard outside 0..{layout.num_public - 1}"
            )
        if len(np.unique(public)) != public.size:
            raise InputError(f"{where}: block {k} uses a public shard twice in one matrix")
        start = layout.num_public + block * layout.num_private_per_layer
        own = np.arange(start, start + layout.num_private_per_layer)
        if np.any(table[k, rank:]):
            raise InputError(
                f"{where}: block {k} has rank {rank}, so that the rows beyond it must be 0"
            )
        if not np.array_equal(table[k, public_vectors:rank].ravel(), own):
            raise InputError(
                f"{where}: the private vectors of block {k} must use shards {start} to "
                f"{start + layout.num_private_per_layer - 1} in order"
            )


def check_balance(layout: PoolLayout, table: np.ndarray, where: str) -> None:
    """Checks that a table that passed `check_table` uses all public shards equally often.

    Args:
      layout: the pool's layout.
      table: int32 [L, r, l], of all blocks.
      where: what the table is called in messages.

    Raises:
      InputError: if the numbers of uses differ by more than one.
    """
    uses = count_uses(layout, table)
    if uses.size and uses.max() - uses.min() > 1:
        raise InputError(
            f"{where}: shard {uses.argmin()} is used {uses.min()} times and shard "
            f"{uses.argmax()} {uses.max()} times; with balanced_routing=True the numbers differ by "
            "one at most"
        )


def checksum(tables: Mapping[str, np.ndarray]) -> str:
    """SHA-256, in hexadecimal, of named tables: names, shapes and every index."""
    digest = hashlib.sha256()
    for name in sorted(tables):
        table = np.ascontiguousarray(tables[name], "<i4")
        digest.update(f"{name}:{'x'.join(map(str, table.shape))};".encode())
        digest.update(table.tobytes())
    return digest.hexdigest()


def count_uses(layout: PoolLayout, table: np.ndarray) -> np.ndarray:
    """How often each public shard is used over all blocks, int64 [(e - p) L l]."""
    blocks = range(layout.num_layers)
    public = [table[k, : layout.rank_of(k) - layout.private_rank].ravel() for k in blocks]
    return np.bincount(np.concatenate(public), minlength=layout.num_public)


def count_idle(layout: PoolLayout, table: np.ndarray) -> int:
    """Number of public shards that no block draws; they stay as they were initialised."""
    return int(np.sum(count_uses(layout, table) == 0))


def expected_idle_share(layout: PoolLayout, balanced: bool = False) -> float:
    """Expected share of the public pool that nobody draws.

    The product over the L blocks of 1 - drawn / public; with balanced routing it is no expectation
    but what all draws together cannot cover, max(0, 1 - sum of drawn / public).
    """
    if layout.num_public == 0:
        return 0.0
    if balanced:
        return max(0.0, 1 - sum(layout.drawn) / layout.num_public)
    return math.prod(1 - drawn / layout.num_public for drawn in layout.drawn)
