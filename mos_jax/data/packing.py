"""Which examples share a row.

Rows have one width and one capacity of targets for a whole run, so that a training step compiles
once. A plan is a pure function of the examples' lengths, the seed and the epoch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from mos_jax.data.tokens import TokenExample
from mos_jax.errors import InputError

Row = tuple[int, ...]
"""The examples of one row, as indices into the list of examples."""

# Examples are packed this many at a time: enough to fill rows well, few enough that the order of
# an epoch stays that of its shuffle.
_WINDOW = 256
_EXAMPLES_PER_ROW = 4
_WIDTH_MULTIPLE = 64
_TARGETS_MULTIPLE = 8
_UNPACKED_MULTIPLE = 8
# A capacity of targets is tight enough when it costs at most this share of extra rows.
_EXTRA_ROWS = 0.01
_SAMPLE = 4096
_TRIALS = 16


@dataclass(frozen=True)
class Layout:
    """The fixed shapes of a run's batches.

    Attributes:
        rows: rows in a batch, B.
        width: tokens in a row, S.
        targets: the most targets in a row, M.
        packing: whether a row may hold several examples.
        prefix: ids that all examples begin with. A row holds them once, before its examples,
            which all see them: the sums are those of separate copies, from fewer tokens.
    """

    rows: int
    width: int
    targets: int
    packing: bool = True
    prefix: tuple[int, ...] = ()

    @property
    def room(self) -> int:
        """Tokens of a row that are left for the examples' own."""
        return self.width - len(self.prefix)


def _round_up(value: float, multiple: int) -> int:
    return -int(-value // multiple) * multiple


def shared_prefix(examples: Sequence[TokenExample]) -> tuple[int, ...]:
    """Returns the longest prefix that all `examples` share and that predicts no target.

    It ends before the token from which an example's first target is predicted, so that this token
    belongs to the example. Chat templates that open with a system turn make it long.
    """
    if not examples:
        return ()
    length = min(int(np.argmax(example.is_target)) for example in examples) - 1
    heads = np.stack([example.tokens[: max(length, 0)] for example in examples])
    unequal = np.flatnonzero((heads != heads[0]).any(axis=0))
    return tuple(heads[0, : unequal[0] if unequal.size else None].tolist())


def lengths_of(
    examples: Sequence[TokenExample], prefix: Sequence[int] = ()
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Returns the tokens beyond `prefix` and the targets of each example, int64[N] each."""
    return (
        np.array([example.length - len(prefix) for example in examples], dtype=np.int64),
        np.array([example.targets for example in examples], dtype=np.int64),
    )


def _best_fit(
    indices: Sequence[int],
    lengths: NDArray[np.int64],
    targets: NDArray[np.int64],
    width: int,
    capacity: int,
) -> list[list[int]]:
    """Packs `indices`, the longest first, each into the fullest row that still has room."""
    rows: list[list[int]] = []
    room = np.zeros(len(indices), dtype=np.int64)
    spare = np.zeros(len(indices), dtype=np.int64)
    for i in sorted(indices, key=lambda index: -int(lengths[index])):
        fits = np.flatnonzero((room >= lengths[i]) & (spare >= targets[i]))
        # Rows not opened yet have no room, and no example is empty, so they never fit.
        if fits.size:
            row = int(fits[np.argmin(room[fits])])
        else:
            row = len(rows)
            rows.append([])
            room[row], spare[row] = width, capacity
        rows[row].append(i)
        room[row] -= lengths[i]
        spare[row] -= targets[i]
    return rows


def pack_in_order(
    order: NDArray[np.int64],
    lengths: NDArray[np.int64],
    targets: NDArray[np.int64],
    layout: Layout,
    shuffle: np.random.Generator | None = None,
) -> list[Row]:
    """Packs the examples of `order`, a window of a few hundred at a time.

    Args:
        order: int64[n], indices of examples.
        lengths: int64[N], own tokens of every example; at most `layout.room`.
        targets: int64[N], targets of every example; at most `layout.targets`.
        layout: shapes of the rows.
        shuffle: mixes the rows of a window, which are otherwise ordered by length.

    Returns:
        Rows that hold each index of `order` exactly once.
    """
    if not layout.packing:
        return [(int(i),) for i in order]
    packed: list[Row] = []
    carried: list[int] = []
    for start in range(0, len(order), _WINDOW):
        window = [*carried, *(int(i) for i in order[start : start + _WINDOW])]
        rows = _best_fit(window, lengths, targets, layout.room, layout.targets)
        carried = []
        if start + _WINDOW < len(order):
            # What opened the emptiest row finds better company in the next window.
            emptiest = min(range(len(rows)), key=lambda row: int(lengths[rows[row]].sum()))
            if len(rows) > 1:
                carried = rows.pop(emptiest)
        if shuffle is not None:
            rows = [rows[int(i)] for i in shuffle.permutation(len(rows))]
        packed += [tuple(row) for row in rows]
    return packed


def plan_epoch(
    lengths: NDArray[np.int64],
    targets: NDArray[np.int64],
    layout: Layout,
    seed: int,
    epoch: int,
) -> list[Row]:
    """Returns the rows of one epoch: every example exactly once, in an order drawn anew.

    The plan depends on nothing but the arguments, which are as in `pack_in_order`.
    """
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(len(lengths))
    return pack_in_order(order, lengths, targets, layout, random)


def _tight_capacity(
    lengths: NDArray[np.int64], targets: NDArray[np.int64], rows: int, width: int, seed: int
) -> int:
    """Returns the smallest capacity of targets that costs next to no extra rows.

    The logits of a step grow with the capacity. The fullest row of an epoch needs much more
    than most rows, so the packer respects a capacity rather than the capacity all rows.
    """
    order = np.random.default_rng(seed).permutation(len(lengths))[:_SAMPLE]
    unlimited = pack_in_order(order, lengths, targets, Layout(rows, width, width))
    in_rows = [int(targets[list(row)].sum()) for row in unlimited]
    least = _round_up(max(int(targets.max()), float(np.mean(in_rows))), _TARGETS_MULTIPLE)
    most = _round_up(max(in_rows), _TARGETS_MULTIPLE)
    step = _round_up(max(1, most - least) / _TRIALS, _TARGETS_MULTIPLE)
    for capacity in range(least, most, step):
        packed = pack_in_order(order, lengths, targets, Layout(rows, width, capacity))
        if len(packed) <= (1 + _EXTRA_ROWS) * len(unlimited):
            return capacity
    return max(least, most)


def choose_layout(
    examples: Sequence[TokenExample],
    rows: int,
    width: int | None = None,
    packing: bool = True,
    seed: int = 0,
    prefix: tuple[int, ...] = (),
) -> Layout:
    """Returns the shapes of batches made of `examples`.

    Args:
        examples: at least one.
        rows: rows in a batch.
        width: tokens in a row; None chooses it: with packing, room for the longest example and
            for four of mean length, a multiple of 64; without, the longest, a multiple of 8.
        packing: whether a row may hold several examples.
        seed: of the shuffle on which the capacity of targets is tried out.
        prefix: what all examples begin with, held once a row; see `shared_prefix`.

    Raises:
        InputError: there are no examples, or one is longer than `width`.
    """
    if not examples:
        raise InputError("batches of an empty set were asked for; give at least one example")
    lengths, targets = lengths_of(examples, prefix)
    longest = len(prefix) + int(lengths.max())
    if width is None:
        several = len(prefix) + _EXAMPLES_PER_ROW * float(lengths.mean())
        wanted = max(longest, several) if packing else longest
        width = _round_up(wanted, _WIDTH_MULTIPLE if packing else _UNPACKED_MULTIPLE)
    if longest > width:
        raise InputError(
            f"example {examples[int(lengths.argmax())].id} has {longest} tokens, but rows are "
            f"{width} wide; set data.sequence_length to at least {longest}"
        )
    if packing:
        capacity = _tight_capacity(lengths, targets, rows, width - len(prefix), seed)
    else:
        capacity = _round_up(int(targets.max()), _TARGETS_MULTIPLE)
    return Layout(rows, width, min(capacity, width), packing, prefix)


def widen(layout: Layout, examples: Sequence[TokenExample]) -> Layout:
    """Returns the smallest layout with room for that of `layout` and for each of `examples`.

    It equals `layout`, so that nothing is compiled anew, unless one of `examples` is longer or has
    more targets than all of those that `layout` was chosen for.
    """
    if not examples:
        return layout
    lengths, targets = lengths_of(examples)
    width, capacity = layout.width, layout.targets
    if lengths.max() > width:
        width = _round_up(int(lengths.max()), _UNPACKED_MULTIPLE)
    if targets.max() > capacity:
        capacity = min(width, _round_up(int(targets.max()), _TARGETS_MULTIPLE))
    return replace(layout, width=width, targets=capacity)
