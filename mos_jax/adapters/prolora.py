"""PRoLoRA, partial rotation of low-rank factors (Wang et al., ACL 2024, arXiv 2402.16902).

Sharing inside a site, none between sites: u of the r rank vectors are ordinary; of the others only
one chunk is trained, which is repeated along the width. Each repetition is rolled along the rank
axis by one stride more than the one before, so that the chunks of a vector differ.

Axis legend: L blocks, r rank, u unshared rank, m chunks of A, n chunks of B, h = d_in, o = d_out.
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
from mos_jax.adapters.sites import Sites, check_sites
from mos_jax.adapters.strictness import strict
from mos_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class PRoLoRAConfig(AdapterConfig):
    """Configuration of PRoLoRA (arXiv 2402.16902).

    Every site trains u (h + o) + (r - u) (ceil(h / m) + ceil(o / n)) parameters. A site of a rank
    of its own has the same u and rotates among its own r - u.

    Attributes:
      rank: r, rank vectors of every site that `rank_pattern` does not name.
      unshared_rank: u, how many of them are ordinary ones; with u = r it is LoRA.
      chunks_a: m, how often the chunk of A is repeated along the input width.
      chunks_b: n, how often the chunk of B is repeated along the output width.
      alpha: the scale is alpha / rank.
    """

    method: ClassVar[str] = "prolora"

    rank: int = 8
    unshared_rank: int = 1
    chunks_a: int = 7
    chunks_b: int = 7
    alpha: float = 16.0

    def __post_init__(self) -> None:
        """Checks the fields. Raises InputError."""
        super().__post_init__()
        require_integer("prolora", "rank", self.rank, 1)
        require_integer("prolora", "unshared_rank", self.unshared_rank, 0)
        require_integer("prolora", "chunks_a", self.chunks_a, 1)
        require_integer("prolora", "chunks_b", self.chunks_b, 1)
        require_positive("prolora", "alpha", self.alpha)
        named = {f"rank_pattern[{key!r}]": r for key, r in self.rank_pattern.items()}
        for field, rank in {"rank": self.rank, **named}.items():
            if self.unshared_rank > rank:
                raise InputError(
                    f"prolora: unshared_rank={self.unshared_rank} must be at most {field}={rank}"
                )

    def site_scales(self, sites: Sites) -> dict[str, tuple[float, ...]]:
        """See base class: the scale s in y = x W + s (x A^T) B."""
        return self._alpha_over_rank(sites)

    def check_widths(self, sites: Sites) -> None:
        """Raises InputError if a width has fewer entries than chunks."""
        for name, site in check_sites(sites).items():
            for chunks, width in (("chunks_a", "d_in"), ("chunks_b", "d_out")):
                if getattr(self, chunks) > getattr(site, width):
                    raise InputError(
                        f"prolora: {chunks}={getattr(self, chunks)} must be at most "
                        f"{width}={getattr(site, width)} of {name!r}"
                    )

    def build(self, sites: Sites, key: jax.Array) -> PRoLoRA:
        """See base class."""
        return PRoLoRA(self, sites, key)


@strict
def rotate(
    chunk: jax.Array,
    chunks: int,
    width: int,
    ranks: Sequence[int] | None = None,
    index: jax.Array | slice = slice(None),
) -> jax.Array:
    """Repeats a chunk along the width, each time rolled further along the rank axis.

    Repetition i is the chunk rolled by i strides of max(R // chunks, 1). Where `chunks` does not
    divide the width, the chunk is wider than a `chunks`-th of it, and what hangs over is cut off.
    The authors' code rolls A and B the other way: the same, with the rows of both chunks reversed.

    Args:
      chunk: fp32 [..., R, ceil(width / chunks)].
      chunks: number of repetitions.
      width: of the result.
      ranks: of the L blocks where they differ, the largest R: each block rolls its own rows; what
        the others become has no meaning. `chunk` is [L, R, ...], or [R, ...] of one block.
      index: where the block stands among the L; all of it for a chunk [L, R, ...].

    Returns:
      fp32 [..., R, width].
    """
    rank, own = chunk.shape[-2:]
    if ranks is None:
        rows = jnp.asarray(_rolled_rows(rank, rank, chunks), jnp.int32)
        repeated = jnp.take(chunk, rows, axis=-2, mode="clip")
    else:
        every = jnp.asarray([_rolled_rows(r, rank, chunks) for r in ranks], jnp.int32)
        take = lambda one, rows: jnp.take(one, rows, axis=0, mode="clip")  # noqa: E731
        repeated = (jax.vmap(take) if chunk.ndim == 3 else take)(chunk, every[index])
    return repeated.reshape(*chunk.shape[:-1], chunks * own)[..., :width]


def _rolled_rows(rank: int, width: int, chunks: int) -> np.ndarray:
    """Which of `rank` rows stands at each of `width` places of each repetition: int [width, m]."""
    stride = max(rank // chunks, 1)
    rows = np.arange(width)[:, None] - stride * np.arange(chunks)[None, :]
    return rows % max(rank, 1)


class PRoLoRA(Adapter):
    """Ordinary vectors and chunks, each a mapping by site type; PRoLoRA (arXiv 2402.16902).

    The ordinary vectors come first in the factors. What has rank 0 is left out. r is the largest
    rank of the type; rows beyond a block's rank are zeros.

    Attributes:
      unshared_a: nnx.Param fp32 [L, u, h], U(-1/sqrt(h), 1/sqrt(h)).
      unshared_b: nnx.Param fp32 [L, u, o], zeros.
      shared_a: nnx.Param fp32 [L, r - u, ceil(h / m)], uniform within the bound of the full h.
      shared_b: nnx.Param fp32 [L, r - u, ceil(o / n)], zeros.
    """

    config: PRoLoRAConfig

    def __init__(self, config: PRoLoRAConfig, sites: Sites, key: jax.Array):
        config.check_widths(sites)
        super().__init__(config, sites)
        self.unshared_a: nnx.Dict = nnx.Dict()
        self.unshared_b: nnx.Dict = nnx.Dict()
        self.shared_a: nnx.Dict = nnx.Dict()
        self.shared_b: nnx.Dict = nnx.Dict()
        parts = (
            ("unshared", 1, 1, self.unshared_a, self.unshared_b),
            ("shared", config.chunks_a, config.chunks_b, self.shared_a, self.shared_b),
        )
        for name, site in self.sites.items():
            shared = self._shared_ranks(name)
            unshared = (config.unshared_rank,) * site.num_layers
            for part, m, n, part_a, part_b in parts:
                ranks = shared if part == "shared" else unshared
                rank = max(ranks)
                if rank == 0:
                    continue
                shape_a = (site.num_layers, rank, -(-site.d_in // m))
                shape_b = (site.num_layers, rank, -(-site.d_out // n))
                own_key = site_key(key, name, f"{part}_a")
                a = uniform_fan_in(own_key, shape_a, site.d_in)
                part_a[name] = nnx.Param(zero_tails(a, ranks))
                part_b[name] = nnx.Param(jnp.zeros(shape_b, jnp.float32))

    @strict
    def site_factors(self, name: str, layer: jax.Array | int | None = None) -> LowRank:
        """See base class."""
        site, config = self.sites[name], self.config
        index, scale, layers = choose_blocks(site, layer, self.site_scales[name])
        shared = self._shared_ranks(name)
        each = shared if differ(shared) else None
        parts_a, parts_b = [], []
        if name in self.unshared_a:
            parts_a.append(self.unshared_a[name][index])
            parts_b.append(self.unshared_b[name][index])
        if name in self.shared_a:
            for parts, arrays, chunks, width in (
                (parts_a, self.shared_a, config.chunks_a, site.d_in),
                (parts_b, self.shared_b, config.chunks_b, site.d_out),
            ):
                parts.append(rotate(arrays[name][index], chunks, width, each, index))
        a, b = (jnp.concatenate(parts, axis=-2) for parts in (parts_a, parts_b))
        return keep_ranks(LowRank(a, b, scale, layers), self.site_ranks[name], index)

    def _shared_ranks(self, name: str) -> tuple[int, ...]:
        """Of every block the rank vectors that are made of repeated chunks, r - u."""
        return tuple(r - self.config.unshared_rank for r in self.site_ranks[name])

    def padded_rows(self, part: str, name: str) -> int:
        """See base class."""
        return missing_rows(self.site_ranks[name]) if part in ("shared_a", "shared_b") else 0
