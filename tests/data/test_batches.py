from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mos_jax.data import (
    Batch,
    Layout,
    TokenExample,
    choose_layout,
    evaluation_batches,
    make_batch,
    packing_figures,
    plan_epoch,
    widen,
)
from mos_jax.data.packing import lengths_of
from mos_jax.errors import InputError

PAD = 0


def example(prompt: int, answer: int, number: int) -> TokenExample:
    """`prompt` tokens and `answer` targets; every token of every example is another one."""
    tokens = 1 + 1000 * number + np.arange(prompt + answer, dtype=np.int32)
    return TokenExample(tokens, np.arange(prompt + answer) >= prompt, str(number))


@st.composite
def example_lists(draw: st.DrawFn) -> list[TokenExample]:
    sizes = st.tuples(st.integers(1, 30), st.integers(1, 12))
    drawn = draw(st.lists(sizes, min_size=1, max_size=60))
    # Enough of them to need several windows.
    repeats = draw(st.sampled_from([1, 1, 10]))
    return [example(p, a, i) for i, (p, a) in enumerate(drawn * repeats)]


def check(batch: Batch, examples: Sequence[TokenExample], layout: Layout) -> list[int]:
    """Checks that the arrays say the same thing and returns the examples in the batch."""
    count = len(batch.tokens)
    assert batch.tokens.shape == batch.positions.shape == batch.segments.shape
    assert batch.tokens.shape == (count, layout.width)
    assert batch.loss_positions.shape == (count, layout.targets)
    for array in (batch.loss_targets, batch.loss_weights, batch.loss_examples):
        assert array.shape == (count, layout.targets)
    found: list[int] = []
    for r in range(count):
        used = batch.segments[r] > 0
        assert (batch.tokens[r][~used] == PAD).all()
        assert (batch.positions[r][~used] == 0).all()
        last = batch.segments[r].max(initial=0)
        real = batch.loss_weights[r] == 1
        assert set(batch.loss_weights[r].tolist()) <= {0.0, 1.0}
        assert (batch.loss_examples[r][~real] == -1).all()
        indices = list(dict.fromkeys(batch.loss_examples[r][real].tolist()))
        assert len(indices) == last
        targets = 0
        for segment, index in enumerate(indices, start=1):
            columns = np.flatnonzero(batch.segments[r] == segment)
            source = examples[index]
            assert columns.tolist() == list(range(columns[0], columns[0] + source.length))
            assert (batch.tokens[r, columns] == source.tokens).all()
            assert (batch.positions[r, columns] == np.arange(source.length)).all()
            mine = batch.loss_examples[r] == index
            predicting = batch.loss_positions[r, mine]
            assert (batch.segments[r, predicting] == segment).all()
            assert (batch.tokens[r, predicting + 1] == batch.loss_targets[r, mine]).all()
            assert (batch.loss_targets[r, mine] == source.tokens[source.is_target]).all()
            targets += source.targets
        assert real.sum() == targets
        found += indices
    return found


@given(example_lists(), st.integers(1, 4), st.booleans(), st.integers(0, 3))
def test_an_epoch_holds_each_example_once(
    examples: list[TokenExample], rows: int, packing: bool, epoch: int
) -> None:
    layout = choose_layout(examples, rows, packing=packing)
    plan = plan_epoch(*lengths_of(examples), layout, 7, epoch)
    batch = make_batch(examples, plan, layout, PAD)
    assert sorted(check(batch, examples, layout)) == list(range(len(examples)))
    if not packing:
        assert all(len(row) == 1 for row in plan)


@given(example_lists(), st.integers(1, 4))
def test_evaluation_holds_each_example_once(examples: list[TokenExample], rows: int) -> None:
    layout = choose_layout(examples, rows)
    batches = evaluation_batches(examples, layout, PAD)
    found = [index for batch in batches for index in check(batch, examples, layout)]
    assert sorted(found) == list(range(len(examples)))
    assert all(len(batch.tokens) == rows for batch in batches)
    # Only the last batch may have rows of nothing.
    assert all((batch.segments[:, 0] == 1).all() for batch in batches[:-1])


@given(st.integers(0, 5), st.integers(0, 5))
def test_plans_are_pure_and_differ_by_epoch(seed: int, epoch: int) -> None:
    examples = [example(3 + i % 7, 2, i) for i in range(50)]
    layout = choose_layout(examples, 2)
    sizes = lengths_of(examples)
    plan = plan_epoch(*sizes, layout, seed, epoch)
    assert plan == plan_epoch(*sizes, layout, seed, epoch)
    assert plan != plan_epoch(*sizes, layout, seed, epoch + 1)
    assert plan != plan_epoch(*sizes, layout, seed + 1, epoch)


@pytest.mark.parametrize("width", [None, 256])
def test_padding_is_small(width: int | None) -> None:
    random = np.random.default_rng(0)
    examples = [
        example(int(p), int(a), i)
        for i, (p, a) in enumerate(
            zip(random.integers(50, 95, 1000), random.integers(2, 8, 1000), strict=True)
        )
    ]
    layout = choose_layout(examples, 4, width)
    figures = packing_figures(examples, layout, seed=0)
    assert figures.padding_share < 0.1
    assert figures.examples_per_batch == pytest.approx(4 * 1000 / figures.rows_per_epoch)
    rows = plan_epoch(*lengths_of(examples), layout, 0, 0)
    assert len(rows) == figures.rows_per_epoch
    # Packing sorts windows by length; the order of an epoch must not show it.
    lengths = [examples[row[0]].length for row in rows]
    assert abs(np.corrcoef(lengths, np.arange(len(rows)))[0, 1]) < 0.2


def test_the_capacity_of_targets_is_tight_and_respected() -> None:
    # One answer in fifty is long: rows full of long answers are too rare to make room for.
    examples = [example(8, 60 if i % 50 == 0 else 2, i) for i in range(1000)]
    layout = choose_layout(examples, 4, 256)
    lengths, targets = lengths_of(examples)
    free = plan_epoch(lengths, targets, Layout(4, 256, 256), 0, 0)
    assert layout.targets <= 0.6 * max(targets[list(row)].sum() for row in free)
    packed = plan_epoch(lengths, targets, layout, 0, 0)
    assert len(packed) <= 1.03 * len(free)
    for row in packed:
        assert targets[list(row)].sum() <= layout.targets
        assert lengths[list(row)].sum() <= layout.width


def test_chosen_widths() -> None:
    examples = [example(35, 5, i) for i in range(9)]
    assert choose_layout(examples, 2).width == 192
    assert choose_layout([*examples, example(300, 5, 9)], 2).width == 320
    assert choose_layout([*examples, example(40, 5, 9)], 2, packing=False).width == 48
    assert choose_layout(examples, 2, 50, packing=False) == Layout(2, 50, 8, packing=False)
    with pytest.raises(InputError, match="example 0 has 40 tokens, but rows are 39 wide"):
        choose_layout(examples, 2, 39)
    with pytest.raises(InputError, match="empty set"):
        choose_layout([], 2)


def test_widened_layouts() -> None:
    layout = Layout(2, 64, 8)
    assert widen(layout, [example(50, 8, 0)]) == layout
    assert widen(layout, []) == layout
    assert widen(layout, [example(61, 9, 0), example(1, 17, 1)]) == Layout(2, 72, 24)


def test_evaluation_refuses_what_does_not_fit() -> None:
    with pytest.raises(InputError, match="example 0 has 70 tokens and 9 targets"):
        evaluation_batches([example(61, 9, 0)], Layout(2, 64, 16), PAD)
    with pytest.raises(InputError, match="widen the layout"):
        evaluation_batches([example(4, 9, 0)], Layout(2, 64, 8), PAD)
