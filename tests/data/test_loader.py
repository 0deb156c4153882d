import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import jax
import numpy as np
import pytest

from mos_jax.data import Batch, BatchSource, Layout, Loader, TokenExample, choose_layout
from mos_jax.errors import InputError


def examples(count: int = 40) -> list[TokenExample]:
    return [
        TokenExample(
            1 + 100 * i + np.arange(6 + i % 9, dtype=np.int32), np.arange(6 + i % 9) >= 4, str(i)
        )
        for i in range(count)
    ]


LAYOUT = choose_layout(examples(), 3)


def source(accumulation: int = 1, seed: int = 0, steps: int = 2**20) -> BatchSource:
    return BatchSource(examples(), LAYOUT, 0, seed, accumulation, steps)


def equal(one: Batch, other: Batch) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_step_is_a_pure_function() -> None:
    one, other = source(), source()
    backwards = {step: other[step] for step in reversed(range(30))}
    assert all(equal(one[step], backwards[step]) for step in range(30))
    assert not equal(one[0], source(seed=1)[0])
    assert not equal(one[0], one[1])


def test_rows_made_apart_are_the_rows_of_the_whole_batch() -> None:
    whole = BatchSource(examples(), LAYOUT, 0, accumulation=2)
    parts = [
        BatchSource(examples(), LAYOUT, 0, accumulation=2, rows=rows) for rows in ([1], [0, 2])
    ]
    assert LAYOUT.rows == 3
    for step in range(30):
        for array, one, two in zip(whole[step], *(part[step] for part in parts), strict=True):
            np.testing.assert_array_equal(array[:, [1]], one)
            np.testing.assert_array_equal(array[:, [0, 2]], two)
        tokens = int((whole[step].segments != 0).sum())
        assert [s.count_tokens(step) for s in (whole, *parts)] == [tokens] * 3
    assert {part.fingerprint for part in parts} == {whole.fingerprint}


def test_threads_see_the_same_batches() -> None:
    shared = source()
    with ThreadPoolExecutor(8) as pool:
        batches = list(pool.map(shared.__getitem__, [*range(40)] * 2))
    alone = source()
    assert all(equal(batches[i], alone[i % 40]) for i in range(80))


def test_no_example_is_lost_between_epochs() -> None:
    stream = source()
    rows: list[list[int]] = []
    step = 0
    while stream.epoch(step) < 3:
        batch = stream[step]
        rows += [sorted({int(i) for i in row if i >= 0}) for row in batch.loss_examples]
        step += 1
    counts = np.zeros(40, dtype=int)
    seen: list[int] = []
    for row in rows:
        seen += row
    for epoch in range(3):
        assert sorted(seen[epoch * 40 : (epoch + 1) * 40]) == list(range(40))
        counts += np.bincount(seen[epoch * 40 : (epoch + 1) * 40], minlength=40)
    assert (counts == 3).all()


def test_fewer_examples_than_a_batch_holds() -> None:
    tiny = BatchSource(examples(2), Layout(5, 16, 16), 0)
    batch = tiny[3]
    assert (batch.segments[:, 0] == 1).all()
    assert set(batch.loss_examples.ravel().tolist()) == {-1, 0, 1}


def test_accumulation_stacks_the_batches_of_its_steps() -> None:
    single, stacked = source(), source(accumulation=4)
    for step in (0, 3):
        batch = stacked[step]
        assert batch.tokens.shape == (4, 3, LAYOUT.width)
        assert batch.loss_weights.shape == (4, 3, LAYOUT.targets)
        for i in range(4):
            assert equal(Batch(*(array[i] for array in batch)), single[4 * step + i])


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_resumed_loader_goes_on_where_it_stopped(accumulation: int) -> None:
    whole = source(accumulation)
    loader = Loader(whole)
    for step in range(7):
        assert equal(next(loader), whole[step])
    assert whole.epoch(7) != whole.epoch(0)
    state = json.loads(json.dumps(loader.get_state()))
    onward = [next(loader) for _ in range(5)]
    loader.close()

    resumed = Loader(source(accumulation))
    resumed.set_state(state)
    assert resumed.get_state() == state
    assert all(equal(next(resumed), batch) for batch in onward)
    # Back to the same place after having gone on.
    resumed.set_state(state)
    assert equal(next(resumed), onward[0])
    resumed.close()


def test_a_loader_ends_after_its_steps() -> None:
    loader = Loader(source(steps=3))
    assert len(list(loader)) == 3
    with pytest.raises(StopIteration):
        next(loader)


def test_a_state_of_other_batches_is_refused() -> None:
    loader = Loader(source())
    state = loader.get_state()
    changed = [
        source(seed=1),
        source(accumulation=2),
        BatchSource(examples(39), LAYOUT, 0),
        BatchSource(examples(), replace(LAYOUT, rows=2), 0),
        BatchSource(examples(), LAYOUT, 1),
        BatchSource([*examples(39), examples(1)[0]], LAYOUT, 0),
    ]
    for other in changed:
        with pytest.raises(InputError, match="position in the data is one of other batches"):
            Loader(other).set_state(state)
    with pytest.raises(InputError, match="loader's state"):
        loader.set_state({"step": 3})
    loader.set_state(state)


def test_bad_arguments() -> None:
    for arguments, message in (
        ({"accumulation": 0}, "accumulation is 0"),
        ({"steps": 0}, "steps is 0"),
        ({"seed": -1}, "seed is -1"),
    ):
        with pytest.raises(InputError, match=message):
            source(**arguments)
    with pytest.raises(InputError, match="empty set"):
        BatchSource([], LAYOUT, 0)
    with pytest.raises(InputError, match="prefetch is 0"):
        Loader(source(), prefetch=0)
    with pytest.raises(IndexError):
        source(steps=3)[3]


def test_a_batch_is_a_tree_of_arrays() -> None:
    batch = source()[0]
    assert len(jax.tree.leaves(batch)) == 7
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(batch)} == {"int32", "float32"}
