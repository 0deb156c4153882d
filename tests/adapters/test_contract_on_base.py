"""What every method must keep where it meets a base: merging, export, training.

The battery of `test_contract.py`, on all of its `CONFIGS`, where it needs a decoder.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from mos_jax.adapters.methods import create_adapter
from mos_jax.adapters.sites import SiteShape, select_sites
from mos_jax.data.batches import Batch
from mos_jax.interop.peft import export_peft, read_peft_factors
from mos_jax.models.decoder import Decoder
from mos_jax.training.step import AdapterParts, initial_state, make_train_step
from tests.adapters.fixtures_adapters import MODEL_LAYERS, quick_jit
from tests.adapters.test_contract import (
    CONFIGS,
    NOT_THE_BASE_AT_FIRST,
    assert_same,
    random_one,
    sites_of,
)
from tests.models.fixtures_decoder import filled_adapter, tiny_decoder, tokens_of

QUICK = {"xla_backend_optimization_level": 0}
STEPS = 4
# Uni-LoRA divides every entry by the root of how often it is used.
RATES = {"uni-lora": 0.3}
# One entry of each method: the step is the costliest thing to compile.
ONE_EACH = list({config.method: name for name, config in reversed(CONFIGS.items())}.values())


@pytest.fixture(params=CONFIGS)
def name(request):
    return request.param


@functools.cache
def base(dtype="float32"):
    return tiny_decoder(dtype=dtype)


def base_sites(name):
    """Sites of the tiny base under the names that the battery uses for this method."""
    return select_sites(base().sites, list(sites_of(name)))


# Methods of one rank share what is compiled.
@quick_jit
def logits_of(decoder, tokens, factors=None):
    return decoder(tokens, factors)


@functools.cache
def base_logits():
    return np.asarray(logits_of(base(), tokens_of(base(), rows=1, length=5)))


def test_a_fresh_adapter_leaves_the_logits_bitwise_as_they_are(name):
    adapter = create_adapter(CONFIGS[name], base_sites(name), jax.random.key(0))
    got = logits_of(base(), tokens_of(base(), rows=1, length=5), adapter.factors())
    same = np.array_equal(got, base_logits())
    assert same == (name not in NOT_THE_BASE_AT_FIRST)


def test_merged_weights_give_the_logits_of_the_adapter(name):
    tokens = tokens_of(base(), rows=1, length=5)
    factors = filled_adapter(base_sites(name), CONFIGS[name]).factors()
    weights = {"embed": base().embed[...], "final_norm": base().final_norm[...]}
    for key, variable in base().blocks.items():
        weight = variable[...]
        weights[f"blocks/{key}"] = factors[key].merge(weight) if key in factors else weight
    got = np.asarray(logits_of(base(), tokens, factors))
    merged = logits_of(Decoder(base().config, weights), tokens)
    np.testing.assert_allclose(merged, got, atol=1e-5 * np.abs(got).max())
    assert np.abs(got - base_logits()).max() > 1e-3 * np.abs(got).max()


@pytest.mark.parametrize("layers", [False, True], ids=["all-layers", "some-layers"])
def test_the_export_as_a_lora_reads_back_as_the_same_factors(name, layers, tmp_path):
    factors = random_one(name, layers).factors()
    depth = MODEL_LAYERS if layers else 3
    export_peft(tmp_path / "peft", factors, base_name="org/base", num_layers=depth)
    whole = {n: SiteShape(depth, s.d_in, s.d_out) for n, s in sites_of(name).items()}
    assert_same(read_peft_factors(tmp_path / "peft", whole), factors)


def one_batch(decoder, length=6):
    """One row whose next token is to be predicted everywhere."""
    tokens = np.asarray(tokens_of(decoder, rows=1, length=length + 1))
    places = np.arange(length, dtype=np.int32)[None]
    return Batch(
        tokens=tokens[:, :-1],
        positions=places,
        segments=np.ones((1, length), np.int32),
        loss_positions=places,
        loss_targets=tokens[:, 1:],
        loss_weights=np.ones((1, length), np.float32),
        loss_examples=np.zeros((1, length), np.int32),
    )


@pytest.mark.parametrize("name", ONE_EACH)
def test_training_steps_on_a_bf16_base_lower_the_loss_and_keep_fp32(name):
    decoder = base("bfloat16")
    adapter = create_adapter(CONFIGS[name], base_sites(name), jax.random.key(0))
    parts, trained = AdapterParts.split(adapter)
    optimizer = optax.adam(RATES.get(name, 1e-2))
    state = initial_state(trained, optimizer, jax.random.key(1))
    arguments = (state, parts, decoder, one_batch(decoder))
    step = make_train_step(optimizer).lower(*arguments).compile(compiler_options=QUICK)
    before = jax.tree.map(np.asarray, (trained, parts.frozen))
    losses = []
    for _ in range(STEPS):
        state, metrics = step(state, *arguments[1:])
        losses.append(float(metrics["loss"]))
        assert np.isfinite(float(metrics["gradient_norm"]))
    assert losses[-1] < losses[0] - 1e-3
    after = parts.merge(state.trained)
    assert_same(nnx.state(after, nnx.Not(nnx.Param)), before[1])
    moved = nnx.state(after, nnx.Param)
    assert {leaf.dtype for leaf in jax.tree.leaves(moved)} == {jnp.dtype("float32")}
    for old, new in zip(jax.tree.leaves(before[0]), jax.tree.leaves(moved), strict=True):
        assert np.any(old != new)
