"""A loss in chunks of the vocabulary is the loss, and no array holds all logits."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mos_jax import InputError
from mos_jax.distributed.mesh import make_mesh, resolve_sizes
from mos_jax.distributed.partition import Placement
from mos_jax.models.decoder import Decoder
from mos_jax.models.head import chunk_size
from mos_jax.models.quantized import find_scheme
from mos_jax.models.tiny import tiny_config, tiny_weights

ROWS, TARGETS = 4, 30
# Neither a multiple of 128 nor a power of two: the last chunk reaches back.
VOCABULARY = 1000
# The smallest chunks that there are, however the tokens are divided.
SMALLEST = 1e-6


def decoder(tied=True, dtype="float32", mesh=None, logits_mib=0.0, quantize=None):
    config = dataclasses.replace(tiny_config(), vocab_size=VOCABULARY, tied_embeddings=tied)
    weights = {k: jnp.asarray(v) for k, v in tiny_weights(config, 0, dtype).items()}
    if quantize is not None:
        scheme = find_scheme(quantize)
        for name, weight in weights.items():
            if name.endswith("_proj"):
                weights[name] = scheme.build(*scheme.encode(weight.astype(jnp.float32)))
    if mesh is None:
        return Decoder(config, weights, logits_mib=logits_mib)
    placement = Placement(make_mesh(resolve_sizes(*mesh, jax.device_count())), 1 << 24)
    shardings = placement.weights()
    placed = {name: jax.device_put(w, shardings(name, w.shape)) for name, w in weights.items()}
    return Decoder(config, placed, mesh=placement.mesh, logits_mib=logits_mib)


def inputs(dtype="float32"):
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(ROWS, TARGETS, 64))
    targets = rng.integers(0, VOCABULARY, (ROWS, TARGETS))
    # Both ends, and both sides of the place where the last chunk begins.
    targets[0, :6] = 0, 127, 128, 895, 896, 999
    weights = rng.normal(size=(ROWS, TARGETS))
    return (
        jnp.asarray(hidden, dtype),
        jnp.asarray(targets, jnp.int32),
        jnp.asarray(weights, jnp.float32),
    )


def compiled(model, dtype="float32"):
    hidden, targets, weights = inputs(dtype)

    def loss(hidden, model):
        nats, right = model.score(hidden, targets)
        return jnp.sum(nats * weights), (nats, right)

    return jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(hidden, model).compile()


def score(model, dtype="float32"):
    """Nats, correctness, and the gradient of a weighted sum of the nats."""
    (_, (nats, right)), gradient = compiled(model, dtype)(inputs(dtype)[0], model)
    return np.asarray(nats), np.asarray(right), np.asarray(gradient, np.float32)


def plain(model):
    """The same from all logits, in NumPy and float64."""
    hidden, targets, weights = (np.asarray(x, np.float64) for x in inputs())
    targets = targets.astype(int)
    head = np.asarray(model.weights.get("head", model.embed[...].T), np.float64)
    logits = hidden @ head
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    chances = shifted / shifted.sum(-1, keepdims=True)
    picked = np.take_along_axis(chances, targets[..., None], 2)[..., 0]
    chances -= np.eye(VOCABULARY)[targets]
    return -np.log(picked), logits.argmax(-1) == targets, (chances * weights[..., None]) @ head.T


def assert_near(found, expected, share=1e-5):
    for a, b in zip(found, expected, strict=True):
        if b.dtype == bool:
            np.testing.assert_array_equal(a, b)
        else:
            assert np.abs(a - b).max() <= share * np.abs(b).max()


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("logits_mib", [0.0, ROWS * TARGETS * 300 * 4 / 2**20, SMALLEST])
def test_loss_correctness_and_gradient_do_not_depend_on_the_chunks(tied, logits_mib):
    model = decoder(tied, logits_mib=logits_mib)
    assert_near(score(model), plain(model))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("mesh", [(2, 2, 1), (1, 2, 2), (1, 1, 4)], ids=str)
def test_chunks_on_a_mesh_whose_devices_hold_parts_of_the_head(tied, mesh):
    found = score(decoder(tied, mesh=mesh, logits_mib=SMALLEST))
    assert_near(found, score(decoder(tied)))


def test_the_first_of_several_largest_logits_counts_across_chunks():
    model = decoder(logits_mib=SMALLEST)
    weights = dict(model.weights)
    # Tokens 3 and 700 are alike, and nothing is larger.
    rows = jnp.zeros_like(weights["embed"]).at[jnp.array([3, 700])].set(1.0)
    model = Decoder(model.config, weights | {"embed": rows}, logits_mib=SMALLEST)
    hidden = jnp.ones((1, 2, 64))
    _, right = jax.jit(model.score)(hidden, jnp.array([[3, 700]], jnp.int32))
    assert right.tolist() == [[True, False]]


def test_a_bf16_base_sums_its_gradient_in_fp32():
    whole = score(decoder(dtype="bfloat16"), "bfloat16")
    parts = score(decoder(dtype="bfloat16", logits_mib=SMALLEST), "bfloat16")
    assert_near(parts[:2], whole[:2])
    # One rounding of a chunk's part and one of the sum, of entries up to the largest.
    assert np.abs(parts[2] - whole[2]).max() <= 2**-7 * np.abs(whole[2]).max()


def test_no_array_holds_all_logits():
    def largest(logits_mib, mesh=None):
        model = decoder(tied=False, logits_mib=logits_mib, mesh=mesh)
        shapes = re.findall(r"f32\[(\d+),(\d+)\]", compiled(model).as_text())
        wide = [int(b) for a, b in shapes if int(a) in (ROWS * TARGETS, ROWS * TARGETS // 4)]
        return max(b for b in wide if b != 64)

    assert largest(0.0) == VOCABULARY
    assert largest(SMALLEST) == 128
    assert largest(SMALLEST, (4, 1, 1)) == 128


def test_runs_that_are_stacked_score_in_chunks():
    hidden, targets, _ = inputs()
    model = decoder(logits_mib=SMALLEST)
    stacked = jax.jit(jax.vmap(model.score))(jnp.stack([hidden, -hidden]), jnp.stack([targets] * 2))
    for number, one in enumerate((hidden, -hidden)):
        for a, b in zip(stacked, jax.jit(model.score)(one, targets), strict=True):
            np.testing.assert_allclose(a[number], b, rtol=1e-5)


def test_a_quantised_base_has_a_head_of_numbers_and_the_same_chunks():
    found = score(decoder(quantize="nf4", logits_mib=SMALLEST))
    assert_near(found, score(decoder()))


def test_chunks_are_as_few_as_the_limit_allows():
    mib = 2**20
    assert chunk_size(100, 49152, 0) == 49152
    assert chunk_size(100, 49152, 100 * 49152 * 4) == 49152
    assert chunk_size(8192, 32000, 64 * mib) == 2048
    assert chunk_size(8192, 32000, 1.0) == 128
    for tokens in (1, 100, 5000, 10**6):
        for vocabulary in (100, 320, 49152, 128256):
            size = chunk_size(tokens, vocabulary, 8 * mib)
            assert size == vocabulary or size % 128 == 0
            assert tokens * size * 4 <= 8 * mib or size in (128, vocabulary)


def test_a_limit_below_zero_is_refused():
    with pytest.raises(InputError, match=r"logits_mib must be 0 or more, got -1"):
        decoder(logits_mib=-1.0)
