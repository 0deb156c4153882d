import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
import qwix

from mos_jax import InputError, LoRAConfig, MoSConfig, create_adapter, load_base
from mos_jax.adapters.adapter import Frozen
from mos_jax.data.batches import Batch
from mos_jax.models import quantized
from mos_jax.models.config import SITES
from mos_jax.models.decoder import REMAT_POLICIES, Decoder
from mos_jax.models.dense import dense
from mos_jax.models.quantized import BLOCK, NF4_VALUES, SCHEMES, PackedNF4, dequantize
from mos_jax.models.tiny import tiny_config, tiny_weights
from mos_jax.training.step import AdapterParts, initial_state, make_train_step

NAMES = sorted(SCHEMES)
CONFIG = tiny_config()


def draw(*shape, seed=0):
    # Columns of very different scales, since every block has its own.
    rng = np.random.default_rng(seed)
    spread = np.exp(rng.standard_normal(shape[-1])).astype(np.float32)
    return rng.standard_normal(shape, np.float32) * spread


def encode(name, weight):
    scheme = SCHEMES[name]
    return scheme.build(*scheme.encode(jnp.asarray(weight)))


def plain_round_trip(name, weight):
    """Block by block and value by value, in float64, with scales rounded to bf16."""
    values = np.asarray(NF4_VALUES) if name == "nf4" else np.arange(-127, 128) / 127
    top = 1.0 if name == "nf4" else 127.0
    result = np.empty(weight.shape, np.float64)
    for layer, column in np.ndindex(weight.shape[0], weight.shape[2]):
        for start in range(0, weight.shape[1], BLOCK):
            block = weight[layer, start : start + BLOCK, column].astype(np.float64)
            scale = float(ml_dtypes.bfloat16(np.float32(np.abs(block).max() / top))) * top
            near = np.abs(block[:, None] - scale * values[None, :]).argmin(1)
            result[layer, start : start + BLOCK, column] = scale * values[near]
    return result


@pytest.mark.parametrize("name", NAMES)
def test_codes_are_those_of_a_plain_loop(name):
    weight = draw(2, 2 * BLOCK, 5)
    found = np.asarray(dequantize(encode(name, weight), jnp.float32), np.float64)
    expected = plain_round_trip(name, weight)
    # Equal but where a value lies halfway between two codes and rounding decides.
    same = np.isclose(found, expected, rtol=1e-5, atol=1e-7)
    assert same.mean() > 0.998
    assert np.allclose(np.abs(found - weight), np.abs(expected - weight), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("name", "gap"), [("int8", 1 / 127), ("nf4", 1 - 0.6961928)])
def test_no_value_moves_by_more_than_half_the_widest_gap(name, gap):
    weight = draw(3, 4 * BLOCK, 8, seed=1)
    found = np.asarray(dequantize(encode(name, weight), jnp.float32))
    blocks = weight.reshape(3, -1, BLOCK, 8)
    top = np.abs(blocks).max(2, keepdims=True)
    error = np.abs(found.reshape(blocks.shape) - blocks)
    # A scale in bf16 is off by up to 2^-9 of itself.
    assert (error <= top * (gap / 2 + 2**-8)).all()
    assert error.max() > 0


@pytest.mark.parametrize("name", NAMES)
def test_zeros_are_kept_and_a_block_of_them_does_no_harm(name):
    weight = np.zeros((1, BLOCK, 2), np.float32)
    weight[0, 3, 1] = -2.0
    found = np.asarray(dequantize(encode(name, weight), jnp.float32))
    assert np.array_equal(found == 0, weight == 0)
    assert np.isclose(found[0, 3, 1], -2.0, rtol=2**-8)


def test_nf4_is_that_of_qwix_and_packs_two_codes_to_a_byte():
    weight = draw(2, 2 * BLOCK, 8, seed=3)
    packed = encode("nf4", weight)
    assert isinstance(packed, PackedNF4)
    assert packed.shape == weight.shape
    assert packed.codes.shape == (2, BLOCK, 8)
    assert packed.codes.dtype == jnp.uint8
    theirs = qwix.quantize(
        jnp.asarray(weight), "nf4", tiled_axes={1: BLOCK}, channelwise_axes=[0, 2]
    )
    ours = packed.unpack()
    # Their scale is in fp32, so that a code on the border may be the next one.
    codes = np.asarray(theirs.qvalue).astype(int)
    assert (np.abs(codes - np.asarray(ours.qvalue).astype(int)) <= 1).all()
    assert (codes == np.asarray(ours.qvalue).astype(int)).mean() > 0.98
    assert np.array_equal(np.asarray(packed[1].unpack().qvalue), np.asarray(ours.qvalue)[1])


@pytest.mark.parametrize(("name", "bits"), [("int8", 8.25), ("nf4", 4.25)])
def test_bytes(name, bits):
    base, plain = load_base("tiny-random", quantize=name), load_base("tiny-random")
    assert SCHEMES[name].bits == bits
    count = sum(np.prod(shape) for shape in CONFIG.site_shapes().values())
    held = [leaf for n in SITES for leaf in jax.tree.leaves(base.model.blocks[n][...])]
    assert sum(leaf.nbytes for leaf in held) == count * bits / 8
    # As allocated: a dtype of less than a byte would not show in nbytes.
    assert all(leaf.dtype.itemsize * 8 == jnp.iinfo(leaf.dtype).bits for leaf in held[::2])
    assert base.quantization == name
    assert plain.quantization is None
    others = [n for n in CONFIG.weight_shapes() if n.removeprefix("blocks/") not in SITES]
    for other in others:
        assert np.array_equal(base.model.weight(other), plain.model.weight(other)), other


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_quantised_base_is_the_same_base_and_its_logits_are_those_of_its_numbers(name, dtype):
    base = load_base("tiny-random", dtype, quantize=name)
    assert base.fingerprint == load_base("tiny-random").fingerprint
    weights = {n: base.model.weight(n) for n in CONFIG.weight_shapes()}
    assert all(weights[f"blocks/{site}"].dtype == jnp.dtype(dtype) for site in SITES)
    tokens = np.arange(40, dtype=np.int32).reshape(2, 20)
    run = jax.jit(lambda model: model(tokens))
    expected = run(Decoder(CONFIG, weights))
    assert jnp.allclose(run(base.model), expected, atol=0.02 if dtype == "bfloat16" else 1e-5)
    full = run(load_base("tiny-random", dtype).model)
    error = float(jnp.sqrt(jnp.mean((expected - full) ** 2)) / jnp.std(full))
    assert 0 < error < (0.04 if name == "int8" else 0.4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("remat", REMAT_POLICIES)
def test_gradients_pass_and_no_numbers_are_kept_for_all_layers(name, remat):
    """Whatever the policy, memory between forward and backward holds no copy of the weights."""
    config = dataclasses.replace(CONFIG, num_layers=8, d_ff=512)
    arrays = tiny_weights(config)
    sites = [f"blocks/{site}" for site in SITES]

    def peak(scheme):
        weights = {
            name: encode(scheme, array) if scheme and name in sites else jnp.asarray(array)
            for name, array in arrays.items()
        }
        model = Decoder(config, weights, remat)
        adapter = create_adapter(LoRAConfig(rank=2), model.sites, jax.random.key(0))
        parts, trained = AdapterParts.split(adapter)
        tokens = np.arange(8, dtype=np.int32)[None]

        def loss(trained, model):
            return jnp.sum(model(tokens, parts.merge(trained).factors()) ** 2)

        compiled = jax.jit(jax.grad(loss)).lower(trained, model).compile()
        gradient = compiled(trained, model)
        assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
        assert any(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))
        return compiled.memory_analysis().temp_size_in_bytes

    largest = 4 * 64 * 512
    whole = 4 * sum(int(np.prod(shape)) for shape in config.site_shapes().values())
    extra = peak(name) - peak(None)
    # The numbers of a few projections of one layer, not the 8 of all of them.
    assert extra < 8 * largest < whole / 3


ADAPTERS = {
    "lora": LoRAConfig(rank=2),
    "mos": MoSConfig(equivalent_rank=2, rank=3, shards_per_vector=2, private_rank=1),
}


@functools.cache
def training_losses(quantize, method, steps=8):
    """Losses of some steps on a bf16 base, whose arrays must stay what they are."""
    base, adapter_config = load_base("tiny-random", "bfloat16", quantize=quantize), ADAPTERS[method]
    before = [np.asarray(leaf) for leaf in jax.tree.leaves(base.model)]
    adapter = create_adapter(adapter_config, base.sites, jax.random.key(0))
    parts, trained = AdapterParts.split(adapter)
    optimizer = optax.adam(1e-2)
    state = initial_state(trained, optimizer, jax.random.key(1))
    step = make_train_step(optimizer)
    tokens = np.random.default_rng(0).integers(0, 300, (2, 32)).astype(np.int32)
    columns = np.broadcast_to(np.arange(32, dtype=np.int32), tokens.shape)
    batch = Batch(
        tokens=tokens,
        positions=columns,
        segments=np.ones(tokens.shape, np.int32),
        loss_positions=columns,
        loss_targets=np.roll(tokens, -1, 1),
        loss_weights=np.ones(tokens.shape, np.float32),
        loss_examples=np.zeros(tokens.shape, np.int32),
    )
    losses = []
    for _ in range(steps):
        state, metrics = step(state, parts, base.model, batch)
        losses.append(float(metrics["loss"]))
    assert {leaf.dtype for leaf in jax.tree.leaves(state.trained)} == {jnp.dtype(jnp.float32)}
    after = jax.tree.leaves(base.model)
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    return losses


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", sorted(ADAPTERS))
def test_adapters_train_above_codes(name, method):
    losses, full = training_losses(name, method), training_losses(None, method)
    assert losses[-1] < losses[0] - 0.3
    assert abs(losses[0] - full[0]) < 0.1
    assert abs(losses[-1] - full[-1]) < 0.3


def test_dense_takes_both_forms():
    x, weight = jnp.asarray(draw(3, BLOCK)), draw(BLOCK, 4)
    packed = encode("nf4", weight[None])[0]
    assert jnp.allclose(dense(x, packed), x @ dequantize(packed, x.dtype))
    assert jnp.array_equal(dense(x, jnp.asarray(weight)), x @ weight)
    gradient = jax.grad(lambda x: dense(x, Frozen(packed)[...]).sum())(x)
    assert jnp.allclose(gradient, dequantize(packed, x.dtype).sum(1)[None], rtol=1e-5, atol=1e-5)
    # As in a step of stacked runs: tokens have an axis of runs, the base has none.
    runs = jnp.stack([x, 2 * x])
    several = jax.vmap(jax.grad(lambda x: (dense(x, packed) ** 2).sum()))(runs)
    alone = jax.grad(lambda x: (dense(x, packed) ** 2).sum())(x)
    assert jnp.allclose(several, jnp.stack([alone, 2 * alone]), rtol=1e-4, atol=1e-3)


def test_refusals_say_the_numbers(monkeypatch):
    with pytest.raises(InputError, match="unknown quantize = 'int4'; did you mean 'int8'"):
        load_base("tiny-random", quantize="int4")
    monkeypatch.setattr(quantized, "BLOCK", 48)
    with pytest.raises(InputError, match="d_in = 128, which is not a multiple of 48"):
        load_base("tiny-random", quantize="nf4")
