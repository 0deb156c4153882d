import dataclasses

import numpy as np
import pytest

from mos_jax import load_base
from mos_jax.data.batches import SHARED, evaluation_batches, make_batch
from mos_jax.data.config import DataConfig
from mos_jax.data.load import load_data
from mos_jax.data.packing import Layout, choose_layout, shared_prefix
from mos_jax.data.tokens import TokenExample
from mos_jax.evaluation.answers import teacher_forced
from tests.models.fixtures_decoder import filled_adapter


def example(tokens, first_target, name="x"):
    is_target = np.arange(len(tokens)) >= first_target
    return TokenExample(np.array(tokens, np.int32), is_target, name)


def test_the_prefix_ends_where_examples_differ():
    assert shared_prefix([example([1, 2, 3, 4, 9], 4), example([1, 2, 5, 4], 3)]) == (1, 2)
    assert shared_prefix([example([1, 2, 3, 4], 3), example([7, 2, 3], 2)]) == ()
    assert shared_prefix([]) == ()


def test_the_prefix_leaves_every_example_the_token_that_predicts_its_first_target():
    same = [example([1, 2, 3, 4, 5], 3), example([1, 2, 3, 4, 5], 3)]
    assert shared_prefix(same) == (1, 2)
    assert shared_prefix([example([1, 2], 1)]) == ()


def test_a_row_holds_the_prefix_once_and_every_target_keeps_its_predictor():
    examples = [example([1, 2, 7, 8, 9], 3), example([1, 2, 5, 6], 3)]
    layout = Layout(1, 10, 8, prefix=(1, 2))
    batch = make_batch(examples, [(0, 1)], layout, 0)
    assert batch.tokens[0].tolist() == [1, 2, 7, 8, 9, 5, 6, 0, 0, 0]
    assert batch.positions[0].tolist() == [0, 1, 2, 3, 4, 2, 3, 0, 0, 0]
    assert batch.segments[0].tolist() == [SHARED] * 2 + [1] * 3 + [2] * 2 + [0] * 3
    real = batch.loss_weights[0] > 0
    assert batch.loss_targets[0][real].tolist() == [8, 9, 6]
    assert batch.tokens[0][batch.loss_positions[0][real]].tolist() == [7, 8, 5]


def test_rows_of_no_examples_hold_no_prefix():
    layout = Layout(4, 10, 8, prefix=(1, 2))
    (batch,) = evaluation_batches([example([1, 2, 5, 6], 3)], layout, 0)
    assert (batch.segments[1:] == 0).all()


@pytest.mark.parametrize("width", [16, 17, 40])
def test_rows_have_room_for_the_prefix_and_all_that_follows_it(width):
    random = np.random.default_rng(0)
    head = (1, 2, 3, 4)
    examples = [
        example([*head, *random.integers(5, 99, size=n)], 4 + n - 2)
        for n in random.integers(3, 12, size=60)
    ]
    layout = choose_layout(examples, 2, width, prefix=head)
    batches = evaluation_batches(examples, layout, 0)
    seen = [i for b in batches for i in b.loss_examples[b.loss_examples >= 0].tolist()]
    assert sorted(set(seen)) == list(range(60))
    assert len(seen) == 2 * 60
    assert all(b.tokens.shape == (2, width) for b in batches)


@pytest.fixture(scope="module")
def base():
    return load_base("tiny-random")


def test_sharing_the_prefix_changes_no_loss_and_no_score(base):
    fields = {"train_examples": 12, "validation_examples": 2, "test_examples": 9, "batch_size": 2}
    found = {}
    factors = filled_adapter(base.sites).factors()
    for share in (True, False):
        config = DataConfig.create(sequence_length=512, share_prefix=share, **fields)
        data = load_data(config, base.tokenizer)
        assert bool(data.layout.prefix) is share
        found[share] = teacher_forced(base.model, factors, data.batches("test"), 9)
    assert found[True].loss == pytest.approx(found[False].loss, rel=1e-6)
    np.testing.assert_array_equal(found[True].scores, found[False].scores)


def test_unpacked_rows_share_nothing(base):
    config = DataConfig.create(
        packing=False, train_examples=6, validation_examples=2, test_examples=2
    )
    data = load_data(config, base.tokenizer)
    assert data.layout == dataclasses.replace(data.layout, prefix=())
