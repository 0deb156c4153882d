"""Batches of fixed shape: rows of packed examples as arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mos_jax.data.packing import Layout, Row, lengths_of, pack_in_order, plan_epoch
from mos_jax.data.tokens import TokenExample
from mos_jax.errors import InputError

# Segment of a row's shared prefix: every later token of the row sees it.
SHARED = -1


class Batch(NamedTuple):
    """B rows of S tokens with room for M targets each; with accumulation, [A, B, ...].

    A named tuple, so that JAX takes it as a tree of arrays. Every array is a numpy array.

    Attributes:
        tokens: int32[B, S]; the padding id where nothing is.
        positions: int32[B, S]; from 0 in each example; 0 where nothing is.
        segments: int32[B, S]; 1, 2, ... for the examples of a row, -1 for the prefix that they
            share; 0 where nothing is.
        loss_positions: int32[B, M]; the column whose hidden state predicts the target, which is
            the column before the target's.
        loss_targets: int32[B, M]; the id to be predicted.
        loss_weights: float32[B, M]; 1 for a target, 0 for filler.
        loss_examples: int32[B, M]; the index of the target's example in the list that the batch
            was made from; -1 for filler.
    """

    tokens: NDArray[np.int32]
    positions: NDArray[np.int32]
    segments: NDArray[np.int32]
    loss_positions: NDArray[np.int32]
    loss_targets: NDArray[np.int32]
    loss_weights: NDArray[np.float32]
    loss_examples: NDArray[np.int32]


def empty_batch(layout: Layout, pad: int, *leading: int) -> Batch:
    """Returns a batch that holds nothing, of shapes [*leading, S] and [*leading, M]."""

    def across(fill: float, size: int, dtype: Any) -> NDArray[Any]:
        return np.full((*leading, size), fill, dtype=dtype)

    return Batch(
        tokens=across(pad, layout.width, np.int32),
        positions=across(0, layout.width, np.int32),
        segments=across(0, layout.width, np.int32),
        loss_positions=across(0, layout.targets, np.int32),
        loss_targets=across(0, layout.targets, np.int32),
        loss_weights=across(0, layout.targets, np.float32),
        loss_examples=across(-1, layout.targets, np.int32),
    )


def make_batch(
    examples: Sequence[TokenExample],
    rows: Sequence[Row],
    layout: Layout,
    pad: int,
    count: int | None = None,
) -> Batch:
    """Lays `rows` out as arrays.

    Args:
        examples: what the indices in `rows` refer to.
        rows: each fits `layout`.
        layout: width and targets of a row.
        pad: the id where nothing is.
        count: rows of the result; those after `rows` are empty. None: as many as `rows`.

    Returns:
        A batch of shapes [count, S] and [count, M].
    """
    batch = empty_batch(layout, pad, len(rows) if count is None else count)
    shared = len(layout.prefix)
    for r, row in enumerate(rows):
        batch.tokens[r, :shared] = layout.prefix
        batch.positions[r, :shared] = np.arange(shared)
        batch.segments[r, :shared] = SHARED
        column, slot = shared, 0
        for segment, index in enumerate(row, start=1):
            example = examples[index]
            here = slice(column, column + example.length - shared)
            batch.tokens[r, here] = example.tokens[shared:]
            batch.positions[r, here] = np.arange(shared, example.length)
            batch.segments[r, here] = segment
            learnt = np.flatnonzero(example.is_target)
            there = slice(slot, slot + len(learnt))
            batch.loss_positions[r, there] = column + learnt - shared - 1
            batch.loss_targets[r, there] = example.tokens[learnt]
            batch.loss_weights[r, there] = 1
            batch.loss_examples[r, there] = index
            column, slot = here.stop, there.stop
    return batch


def evaluation_batches(examples: Sequence[TokenExample], layout: Layout, pad: int) -> list[Batch]:
    """Packs `examples` once and returns batches that hold each of them exactly once.

    The last batch is filled up with empty rows (segments 0, weights 0), so all have one shape.

    Raises:
        InputError: an example does not fit `layout`; see `packing.widen`.
    """
    lengths, targets = lengths_of(examples, layout.prefix)
    for example in examples:
        if example.length > layout.width or example.targets > layout.targets:
            raise InputError(
                f"example {example.id} has {example.length} tokens and {example.targets} targets, "
                f"but rows hold {layout.width} and {layout.targets}; widen the layout"
            )
    rows = pack_in_order(np.arange(len(examples)), lengths, targets, layout)
    return [
        make_batch(examples, rows[start : start + layout.rows], layout, pad, layout.rows)
        for start in range(0, len(rows), layout.rows)
    ]


class PackingFigures(NamedTuple):
    """How well the first epoch fills its rows.

    Attributes:
        padding_share: share of positions behind the shared prefix that hold no token, 0 to 1.
        examples_per_batch: mean number of examples in a batch.
        rows_per_epoch: rows that the epoch fills.
        batches_per_epoch: batches that the epoch fills; a fraction, as batches span epochs.
        target_share: share of the room for targets that is used, from 0 to 1.
    """

    padding_share: float
    examples_per_batch: float
    rows_per_epoch: int
    batches_per_epoch: float
    target_share: float


def packing_figures(examples: Sequence[TokenExample], layout: Layout, seed: int) -> PackingFigures:
    """Measures the plan of the first epoch of training under `seed`."""
    lengths, targets = lengths_of(examples, layout.prefix)
    rows = len(plan_epoch(lengths, targets, layout, seed, 0))
    return PackingFigures(
        padding_share=1 - int(lengths.sum()) / (rows * layout.room),
        examples_per_batch=layout.rows * len(examples) / rows,
        rows_per_epoch=rows,
        batches_per_epoch=rows / layout.rows,
        target_share=int(targets.sum()) / (rows * layout.targets),
    )
