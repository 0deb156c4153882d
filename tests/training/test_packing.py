"""A packed batch has the loss and the gradient of its examples alone, in rows of their own."""

import jax
import numpy as np
import pytest
from flax import nnx

from mos_jax.data.config import DataConfig
from mos_jax.data.load import load_data
from mos_jax.evaluation.loss import token_losses
from mos_jax.models.decoder import Decoder
from mos_jax.models.tokenizer import Tokenizer
from tests.models.fixtures_decoder import filled_adapter
from tests.models.fixtures_families import family_decoder
from tests.training.fixtures_training import write_data

EXAMPLES = 10


@pytest.fixture(scope="module")
def layouts(tmp_path_factory):
    """The batches of the same examples: one to a row, packed, and packed behind their prefix."""
    fields = {
        "task": "jsonl",
        "train_path": write_data(tmp_path_factory.mktemp("data")),
        "validation_examples": 2,
        "test_examples": EXAMPLES,
        "batch_size": 2,
    }
    found = {}
    for name, more in {
        "alone": {"packing": False},
        "packed": {"sequence_length": 140, "share_prefix": False},
        "prefix": {"sequence_length": 140},
    }.items():
        data = load_data(DataConfig.create(**fields, **more), Tokenizer.byte_level())
        found[name] = data.batches("test")
    assert (found["prefix"][0].segments == -1).any()
    assert not (found["packed"][0].segments < 0).any()
    # What is packed is packed: several examples in a row.
    assert len(found["prefix"]) < len(found["packed"]) < len(found["alone"])
    return found


def loss_and_gradient(model, adapter, batches):
    """The loss of every example, and the gradient of their sum."""
    graphdef, trained, rest = nnx.split(adapter, nnx.Param, ...)

    @jax.jit
    def run(trained, batch):
        def loss(trained):
            factors = nnx.merge(graphdef, trained, rest).factors()
            losses, _ = token_losses(model, factors, batch)
            return (losses * batch.loss_weights).sum(), losses

        return jax.value_and_grad(loss, has_aux=True)(trained)

    total, losses = None, np.zeros(EXAMPLES)
    for batch in batches:
        (_, found), gradient = run(trained, batch)
        total = gradient if total is None else jax.tree.map(np.add, total, gradient)
        there = batch.loss_examples >= 0
        np.add.at(losses, batch.loss_examples[there], np.asarray(found)[there])
    return [losses, *map(np.asarray, jax.tree.leaves(total))]


@pytest.mark.parametrize("packed", ["packed", "prefix"])
@pytest.mark.parametrize(
    ("family", "attention"),
    [("llama", "grouped"), ("llama", "xla"), ("gemma3", "grouped"), ("gemma3", "xla")],
)
def test_a_packed_batch_has_the_loss_and_the_gradient_of_its_examples(
    layouts, family, attention, packed
):
    plain = family_decoder(family)
    # Chunks as small as they come, so that they are packed as well.
    model = Decoder(plain.config, plain.weights, attention=attention, logits_mib=1e-6)
    adapter = filled_adapter(model.sites)
    expected = loss_and_gradient(plain, adapter, layouts["alone"])
    found = loss_and_gradient(model, adapter, layouts[packed])
    for a, b in zip(found, expected, strict=True):
        assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max()
