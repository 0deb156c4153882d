"""Index routing: which shards each rank vector is put together from.

A routing table is int32 [L, r, l]: entry [k, j, i] is the index, in a pool of one site type, of the
shard at position i of rank vector j of block k. It is drawn once from a seed with NumPy, outside
any trace, frozen, stored with the adapter and checked by its checksum (MoS, arXiv 2410.00938,
section 3: the "MoE-like" look-up that does not depend on the input).

The pool holds the public shards first, then the private ones of block 0, 1, ...

Axis legend: L blocks, r active rank, e equivalent rank, p private rank, l shards per vector.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import zlib
from collections.abc import Mapping

import numpy as np

from mos_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class PoolLayout:
    """How many shards a pool has and which of them a block may use.

    Attributes:
      num_layers: L.
      equivalent_rank: e.
      rank: r.
      private_rank: p.
      shards_per_vector: l.
    """

    num_layers: int
    equivalent_rank: int
    rank: int
    private_rank: int
    shards_per_vector: int

    @property
    def num_public(self) -> int:
        """Public shards, (e - p) L l."""
        public_rank = self.equivalent_rank - self.private_rank
        return public_rank * self.num_layers * self.shards_per_vector

    @property
    def num_private_per_layer(self) -> int:
        """Private shards of one block, p l."""
        return self.private_rank * self.shards_per_vector

    @property
    def num_shards(self) -> int:
        """All shards, e L l."""
        return self.num_public + self.num_layers * self.num_private_per_layer

    @property
    def num_drawn(self) -> int:
        """Public shards that one matrix uses, (r - p) l."""
        return (self.rank - self.private_rank) * self.shards_per_vector


def draw_tables(
    layout: PoolLayout, name: str, seed: int, pair_dissociation: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Draws the tables of A and B for one site type.

    Every block draws its public shards without replacement inside the matrix; across blocks they
    repeat. When a block uses all public shards (subset selection off) the draw is a random order.
    Private shards stand in the last p vectors, in order, so that private vector j of A meets
    private vector j of B.

    Args:
      layout: the pool's layout.
      name: the site type; each type has a stream of its own, whatever other types are adapted.
      seed: the routing seed.
      pair_dissociation: draw B's table on its own; otherwise B uses A's.

    Returns:
      Two int32 arrays [L, r, l].
    """
    table_a = _draw(layout, name, seed, "a")
    table_b = _draw(layout, name, seed, "b") if pair_dissociation else table_a.copy()
    return table_a, table_b


def _draw(layout: PoolLayout, name: str, seed: int, matrix: str) -> np.ndarray:
    shards, p = layout.shards_per_vector, layout.private_rank
    table = np.empty((layout.num_layers, layout.rank, shards), np.int32)
    for k in range(layout.num_layers):
        words = raw_words(layout.num_public, seed, f"{name}/{matrix}", k)
        # Sorted, not Generator.permutation: see raw_words.
        order = np.argsort(words, kind="stable")[: layout.num_drawn]
        table[k, : layout.rank - p] = order.reshape(layout.rank - p, shards)
        start = layout.num_public + k * layout.num_private_per_layer
        private = np.arange(start, start + layout.num_private_per_layer)
        table[k, layout.rank - p :] = private.reshape(p, shards)
    return table


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
    entropy = [seed, zlib.crc32(stream.encode()), *block]
    return np.random.PCG64(np.random.SeedSequence(entropy)).random_raw(count)


def check_table(layout: PoolLayout, table: np.ndarray, where: str) -> None:
    """Checks that `table` is a routing table of `layout`.

    Args:
      layout: the pool's layout.
      table: int32 [L, r, l].
      where: what the table is called in messages.

    Raises:
      InputError: for a wrong shape or dtype, an index out of range, a shard used twice in one
        matrix, or a private shard in another block than its own.
    """
    shape = (layout.num_layers, layout.rank, layout.shards_per_vector)
    if table.shape != shape or table.dtype != np.int32:
        raise InputError(
            f"{where}: a routing table here is int32 {shape}, got {table.dtype} {table.shape}"
        )
    public_vectors = layout.rank - layout.private_rank
    for k in range(layout.num_layers):
        public = table[k, :public_vectors].ravel()
        if public.size and (public.min() < 0 or public.max() >= layout.num_public):
            raise InputError(
                f"{where}: block {k} uses a public shard outside 0..{layout.num_public - 1}"
            )
        if len(np.unique(public)) != public.size:
            raise InputError(f"{where}: block {k} uses a public shard twice in one matrix")
        start = layout.num_public + k * layout.num_private_per_layer
        own = np.arange(start, start + layout.num_private_per_layer)
        if not np.array_equal(table[k, public_vectors:].ravel(), own):
            raise InputError(
                f"{where}: the private vectors of block {k} must use shards {start} to "
                f"{start + layout.num_private_per_layer - 1} in order"
            )


def checksum(tables: Mapping[str, np.ndarray]) -> str:
    """SHA-256, in hexadecimal, of named tables: names, shapes and every index."""
    digest = hashlib.sha256()
    for name in sorted(tables):
        table = np.ascontiguousarray(tables[name], "<i4")
        digest.update(f"{name}:{'x'.join(map(str, table.shape))};".encode())
        digest.update(table.tobytes())
    return digest.hexdigest()


def count_idle(layout: PoolLayout, table: np.ndarray) -> int:
    """Number of public shards that no block draws; they stay as they were initialised."""
    used = np.unique(table[:, : layout.rank - layout.private_rank])
    return layout.num_public - used.size


def expected_idle_share(layout: PoolLayout) -> float:
    """Expected share of the public pool that nobody draws, (1 - drawn / public)^L."""
    if layout.num_public == 0:
        return 0.0
    return (1 - layout.num_drawn / layout.num_public) ** layout.num_layers
