"""Weighted combinations of adapters, of any methods, and how far each is from the exact sum.

The exact combination changes each weight by the weighted sum of the adapters' changes; its rank is
the sum of theirs. The others keep one rank, or choose between adapters that disagree, and are
something else than that sum: the relative distance is reported with each.

All of it runs once, on the host, in NumPy and fp64, and is rounded to fp32 at the end.

Axis legend: n adapters, L blocks that one of them adapts, r rank, h = d_in, o = d_out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mos_jax.adapters.adapter import Adapter, require_finite, require_integer, require_positive
from mos_jax.adapters.low_rank import Factors, LowRank
from mos_jax.adapters.patterns import differ
from mos_jax.adapters.routing import raw_words
from mos_jax.errors import InputError, suggest

# Of fp64 sums of products, relative to the largest of them.
ROUNDING = 1e-12
HOW = ("exact", "linear", "ties", "dare_linear", "dare_ties")


@dataclasses.dataclass(frozen=True)
class Combined:
    """A combination of adapters.

    Attributes:
      how: one of `HOW`.
      factors: by site type that one of the adapters changes: a fp32 [L, r, h], b fp32 [L, r, o],
        scale fp32 [L] of ones, for the blocks that one of them adapts, and their ranks.
      errors: by site type, the Frobenius distance of its change to the exact weighted sum of the
        changes, over all blocks, divided by the norm of that sum (inf where the sum is 0).
      error: the same over all sites.
    """

    how: str
    factors: dict[str, LowRank]
    errors: dict[str, float]
    error: float


@dataclasses.dataclass(frozen=True)
class _Stack:
    """One site type of the n adapters that change it, on all blocks that one of them adapts.

    `places` are theirs in the list of adapters; `a` and `b` hold n fp64 arrays [L, r, h] and
    [L, r, o], whose ranks may differ, and `scale` [n, L]; an adapter's other blocks are zeros.
    `ranks` [n, L] says how many rows are real.
    """

    site: str
    layers: tuple[int, ...] | None
    blocks: tuple[int, ...]
    places: list[int]
    weights: np.ndarray
    a: list[np.ndarray]
    b: list[np.ndarray]
    scale: np.ndarray
    ranks: np.ndarray

    @property
    def coefficients(self) -> np.ndarray:
        """Weight times scale, [n, L]: what a^T b is multiplied by in the exact sum."""
        return self.weights[:, None] * self.scale


def combine(
    adapters: Sequence[Adapter | Factors],
    weights: Sequence[float],
    how: str = "exact",
    *,
    density: float | None = None,
    rank: int | None = None,
    seed: int = 0,
) -> Combined:
    """Combines adapters of any methods, with weights, into factors.

    * "exact": the change is the weighted sum of the changes; ranks are concatenated. With `rank`,
      its best approximation of that rank (Eckart and Young 1936), found without the dense change.
    * "linear": A is the sum of sqrt(w s) A_i and B that of sqrt(w s) B_i, w the weight, s the
      scale, as PEFT's "linear". Equal ranks only. It is not the sum of the changes: it adds the
      products of every A_i with every other B_j, and is exact for a single adapter alone.
    * "ties" (TIES, Yadav et al. 2023, arXiv 2306.01708): of every array the `density` largest
      entries are kept; of each entry the sign with more mass is elected; the weighted entries of
      that sign are averaged over the adapters that have it. The average is over their number, not
      their weights, so that weights of 1 give the paper's mean.
    * "dare_linear", "dare_ties" (DARE, Yu et al. 2023, arXiv 2311.03099): a random share `density`
      of the entries is kept and divided by `density`; then as "linear", or as "ties" without its
      own choice of entries.

    The last three work on A and B, each by itself, as PEFT does, and then need equal ranks; with
    `rank` they work on the dense changes, one block at a time, which are then cut to that rank by
    a singular value decomposition (PEFT's "..._svd").

    Args:
      adapters: adapters, or their factors; their sites and blocks may differ.
      weights: one for each; negative ones subtract.
      how: one of `HOW`.
      density: above 0 and at most 1, the share of entries that "ties" and "dare" keep.
      rank: of the result at most; None for that of `how`.
      seed: of DARE's choice, which it decides alone with the adapter's place in the list.

    Raises:
      InputError: for an unknown `how`, numbers out of range or a setting that has no part in `how`,
        adapters that are for different bases or whose ranks must be equal and are not, or a
        result that is not finite in fp32.
    """
    _check_settings(adapters, weights, how, density, rank, seed)
    every = [_factors_of(place, given) for place, given in enumerate(adapters)]
    rule = _Rule(how, density, seed)
    factors: dict[str, LowRank] = {}
    squares: dict[str, tuple[float, float]] = {}
    for site in dict.fromkeys(name for adapter in every for name in adapter):
        stack = _stack(site, every, weights)
        with np.errstate(over="ignore", invalid="ignore"):
            ranks: np.ndarray | None = None
            if rank is None:
                a, b, ranks = _packed(stack) if how == "exact" else _on_factors(stack, rule)
            elif how == "exact":
                a, b = _truncated(*_exact(stack), rank)
            else:
                a, b = _on_deltas(stack, rule, rank)
            a, b = a.astype(np.float32), b.astype(np.float32)
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            raise InputError(f"the combination at {site!r} is not finite in fp32")
        ones = jnp.ones(len(stack.blocks), jnp.float32)
        own = tuple(ranks.tolist()) if ranks is not None and differ(ranks.tolist()) else None
        factors[site] = LowRank(jnp.asarray(a), jnp.asarray(b), ones, stack.layers, own)
        squares[site] = _distance(stack, a, b)
    errors = {name: _ratio(*pair) for name, pair in squares.items()}
    distance, norm = (sum(part) for part in zip(*squares.values(), strict=True))
    return Combined(how, factors, errors, _ratio(distance, norm))


def scaled(factors: Factors, by: float) -> dict[str, LowRank]:
    """Factors of `by` times the change, -1 for its opposite. Raises InputError if not finite."""
    require_finite("scaled", "by", by)
    return {name: f.scaled(by) for name, f in factors.items()}


def _exact(stack: _Stack) -> tuple[np.ndarray, np.ndarray]:
    """The weighted sum of the changes as a [L, sum r, h] and b [L, sum r, o]."""
    b = [c[:, None, None] * x for c, x in zip(stack.coefficients, stack.b, strict=True)]
    return np.concatenate(stack.a, axis=1), np.concatenate(b, axis=1)


def _packed(stack: _Stack) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same with each block's real rows first and no more of others than needed; their count."""
    a, b = _exact(stack)
    widths = [x.shape[1] for x in stack.a]
    real = np.concatenate(
        [np.arange(w)[None] < own[:, None] for w, own in zip(widths, stack.ranks, strict=True)], 1
    )
    ranks = real.sum(1)
    first = np.argsort(~real, axis=1, kind="stable")[:, : ranks.max(), None]
    return np.take_along_axis(a, first, 1), np.take_along_axis(b, first, 1), ranks


def _truncated(a: np.ndarray, b: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """The nearest a^T b of a lower rank, block by block, through r x r matrices only."""
    q_a, r_a = np.linalg.qr(a.swapaxes(1, 2))
    q_b, r_b = np.linalg.qr(b.swapaxes(1, 2))
    u, sizes, v = np.linalg.svd(r_a @ r_b.swapaxes(1, 2), full_matrices=False)
    root = np.sqrt(sizes[:, :rank, None])  # shared, so that A and B are of one size
    return root * (q_a @ u).swapaxes(1, 2)[:, :rank], root * (v @ q_b.swapaxes(1, 2))[:, :rank]


@dataclasses.dataclass(frozen=True)
class _Rule:
    """How arrays of the same place in n adapters become one."""

    how: str
    density: float | None
    seed: int

    def merge(
        self, stack: _Stack, part: str, k: int, coefficients: np.ndarray, arrays: np.ndarray
    ) -> np.ndarray:
        """Merges the n arrays of block k of a site: coefficients [n], arrays [n, ...]."""
        if self.how == "ties":
            assert self.density is not None
            # A share of what an adapter has: rows beyond its rank in this block are no part of it.
            rows = [arrays.shape[1]] * len(arrays) if part == "delta" else stack.ranks[:, k]
            kept = [_largest(x, self.density, r) for x, r in zip(arrays, rows, strict=True)]
            arrays = arrays * np.stack(kept)
        elif self.how.startswith("dare"):
            assert self.density is not None
            where = self.density, self.seed
            kept = [
                keep_mask(x.shape, *where, place, stack.site, part, stack.blocks[k])
                for place, x in zip(stack.places, arrays, strict=True)
            ]
            arrays = arrays * np.stack(kept) / self.density
        weighted = coefficients.reshape(-1, 1, 1) * arrays
        if not self.how.endswith("ties"):
            return weighted.sum(0)
        # Elected by mass before the weights; a sum of 0 elects the positive ones.
        agrees = np.sign(arrays) == np.where(arrays.sum(0) >= 0, 1, -1)
        return (weighted * agrees).sum(0) / np.maximum(agrees.sum(0), 1)


def _on_factors(stack: _Stack, rule: _Rule) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A and B merged each by itself, with the root of the coefficients on both; their ranks."""
    ranks = [x.shape[1] for x in stack.a]
    if len(set(ranks)) > 1:
        other = "" if rule.how == "linear" else ", or give rank to merge the dense changes"
        raise InputError(
            f"{rule.how!r} needs equal ranks, at {stack.site!r} they are {ranks}; take 'exact'"
            f"{other}"
        )
    root = np.sqrt(np.abs(stack.coefficients))
    signed = np.sign(stack.coefficients) * root
    a, b = np.stack(stack.a), np.stack(stack.b)
    blocks = range(len(stack.blocks))
    return (
        np.stack([rule.merge(stack, "a", k, signed[:, k], a[:, k]) for k in blocks]),
        np.stack([rule.merge(stack, "b", k, root[:, k], b[:, k]) for k in blocks]),
        stack.ranks.max(0),
    )


def _on_deltas(stack: _Stack, rule: _Rule, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """The dense changes merged, then cut to a rank; those of one block are in memory at once."""
    halves = []
    for k in range(len(stack.blocks)):
        changes = np.stack(
            [s[k] * (a[k].T @ b[k]) for s, a, b in zip(stack.scale, stack.a, stack.b, strict=True)]
        )
        merged = rule.merge(stack, "delta", k, stack.weights, changes)
        u, sizes, v = np.linalg.svd(merged, full_matrices=False)
        root = np.sqrt(sizes[:rank, None])
        halves.append((root * u.T[:rank], root * v[:rank]))
    return np.stack([a for a, _ in halves]), np.stack([b for _, b in halves])


def _largest(array: np.ndarray, density: float, rows: int) -> np.ndarray:
    """1 at the largest entries, as many as `density` of its first `rows` rows; 0 elsewhere."""
    mask = np.zeros(array.size)
    order = np.argsort(-np.abs(array).reshape(-1), kind="stable")
    mask[order[: int(density * rows * array.shape[1])]] = 1
    return mask.reshape(array.shape)


def keep_mask(
    shape: tuple[int, ...],
    density: float,
    seed: int,
    adapter: int,
    site: str,
    part: str,
    block: int,
) -> np.ndarray:
    """DARE's choice: fp64 of `shape`, 1 with probability `density`, 0 otherwise.

    Args:
      shape: of the array, [r, h], [r, o] or [h, o].
      density: the share that is kept.
      seed: of the combination.
      adapter: its place in the list; each has a stream of its own, and so have the next three.
      site: the site type.
      part: "a", "b" or "delta".
      block: index of the block in the model.
    """
    words = raw_words(int(np.prod(shape)), seed, f"dare/{site}/{part}", adapter, block)
    # 53 bits fill a double: uniform in [0, 1).
    return ((words >> np.uint64(11)) * 2.0**-53 < density).astype(np.float64).reshape(shape)


def _distance(stack: _Stack, a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Squared distance of the change a^T b to the exact sum, and the squared norm of that sum."""
    exact_a, exact_b = _exact(stack)
    both_a = np.concatenate([exact_a, a.astype(np.float64)], axis=1)
    both_b = np.concatenate([exact_b, -b.astype(np.float64)], axis=1)
    distance, norm = _squared_norm(both_a, both_b), _squared_norm(exact_a, exact_b)
    # What is left of changes that cancel out is rounding, and no size to measure a distance by.
    parts = (
        _squared_norm(x, c[:, None, None] * y)
        for x, y, c in zip(stack.a, stack.b, stack.coefficients, strict=True)
    )
    nothing = ROUNDING**2 * sum(parts)
    return (distance if distance > nothing else 0.0), (norm if norm > nothing else 0.0)


def _squared_norm(a: np.ndarray, b: np.ndarray) -> float:
    """The squared Frobenius norm of a^T b over all blocks, without that product.

    a^T = Q R leaves |a^T b| = |R_a R_b^T|. The Gram matrices a a^T and b b^T would do as well, but
    lose half the digits of a small difference of large changes.
    """
    # The types of NumPy do not know that mode "r" gives one array.
    r_a = np.asarray(np.linalg.qr(a.swapaxes(1, 2), mode="r"))
    r_b = np.asarray(np.linalg.qr(b.swapaxes(1, 2), mode="r"))
    return float(np.sum((r_a @ r_b.swapaxes(1, 2)) ** 2))


def _ratio(distance: float, norm: float) -> float:
    if norm == 0:
        return 0.0 if distance == 0 else float("inf")
    return float(np.sqrt(distance / norm))


def _check_settings(
    adapters: Sequence[Adapter | Factors],
    weights: Sequence[float],
    how: str,
    density: float | None,
    rank: int | None,
    seed: int,
) -> None:
    if how not in HOW:
        raise InputError(f"unknown combination {how!r}; {suggest(str(how), HOW)}")
    if isinstance(adapters, Mapping) or not len(adapters):
        raise InputError("combine needs a list of adapters, at least one")
    if len(weights) != len(adapters):
        raise InputError(f"{len(adapters)} adapters need as many weights, got {len(weights)}")
    for weight in weights:
        require_finite("combine", "a weight", weight)
    require_integer("combine", "seed", seed, 0)
    if how in ("exact", "linear"):
        if density is not None:
            raise InputError(f"density has no part in {how!r}; it is for ties and dare")
    else:
        if density is None:
            raise InputError(f"{how!r} needs density, the share of entries to keep, such as 0.5")
        require_positive("combine", "density", density)
        if density > 1:
            raise InputError(f"combine: density must be at most 1, got {density!r}")
    if rank is not None:
        require_integer("combine", "rank", rank, 1)
        if how == "linear":
            raise InputError("rank has no part in 'linear'; 'exact' with a rank is what it aims at")


def _factors_of(place: int, adapter: Adapter | Factors) -> Factors:
    factors = adapter.factors() if isinstance(adapter, Adapter) else adapter
    if (
        not isinstance(factors, Mapping)
        or not factors
        or not all(isinstance(f, LowRank) and f.a.ndim == 3 for f in factors.values())
    ):
        raise InputError(
            f"adapter {place} must be an adapter or its factors of all blocks, adapter.factors(), "
            f"got {factors!r}"
        )
    return factors


def _stack(site: str, adapters: Sequence[Factors], weights: Sequence[float]) -> _Stack:
    """The factors that the adapters have for one site type, checked against each other."""
    places = [place for place, factors in enumerate(adapters) if site in factors]
    own = [adapters[place][site] for place in places]
    widths = sorted({(f.a.shape[-1], f.b.shape[-1]) for f in own})
    depths = sorted({f.a.shape[0] for f in own if f.layers is None})
    named = sorted({k for f in own for k in f.layers or ()})
    if len(widths) > 1 or len(depths) > 1 or (depths and named and named[-1] >= depths[0]):
        raise InputError(
            f"the adapters are for different bases: {site!r} is "
            f"{' and '.join(f'{h} -> {o}' for h, o in widths)}, of "
            f"{' and '.join(map(str, depths)) or 'some'} blocks, "
            f"the last one named is {named[-1] if named else 'none'}"
        )
    layers = None if depths else tuple(named)
    blocks = tuple(range(depths[0])) if depths else tuple(named)

    def spread(leaf: jax.Array | tuple[int, ...], f: LowRank) -> np.ndarray:
        array = np.asarray(leaf, np.float64)
        if not np.isfinite(array).all():
            raise InputError(f"an adapter holds values at {site!r} that are not finite")
        if f.layers is None or f.layers == blocks:
            return array
        whole = np.zeros((len(blocks), *array.shape[1:]))
        whole[[blocks.index(k) for k in f.layers]] = array
        return whole

    return _Stack(
        site,
        layers,
        blocks,
        places,
        np.array([weights[place] for place in places], np.float64),
        [spread(f.a, f) for f in own],
        [spread(f.b, f) for f in own],
        np.stack([spread(f.scale, f) for f in own]),
        np.stack([spread(f.ranks or (f.rank,) * len(f.scale), f) for f in own]).astype(int),
    )
