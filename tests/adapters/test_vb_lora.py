import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from mos_jax.adapters.methods import count_parameters, create_adapter, make_config
from mos_jax.adapters.sites import SiteShape
from mos_jax.adapters.vb_lora import VBLoRAConfig, admix
from mos_jax.errors import InputError
from tests.adapters.fixtures_adapters import (
    SITES,
    model_sites,
    quick_jit,
    randomised,
    split_trained,
    trained_arrays,
)

CONFIG = VBLoRAConfig(rank=2, num_vectors=6, vector_length=4, top_k=3)


def build(config=CONFIG, sites=SITES, seed=0):
    return create_adapter(config, sites, jax.random.key(seed))


def admixed_by_hand(bank, logits, top_k):
    """One vector [n * b] from the logits [n, H] of its sub-vectors."""
    pieces = []
    for row in logits:
        picked = sorted(range(len(row)), key=lambda i: -row[i])[:top_k]
        weights = [math.exp(row[i]) for i in picked]
        pieces.append(sum(w / sum(weights) * bank[i] for w, i in zip(weights, picked, strict=True)))
    return np.concatenate(pieces)


def test_what_is_trained_is_one_bank_and_the_logits_of_every_sub_vector():
    assert {name: array.shape for name, array in trained_arrays(build()).items()} == {
        "bank": (6, 4),
        "logits_a/q_proj": (3, 2, 2, 6),
        "logits_b/q_proj": (3, 2, 3, 6),
        "logits_a/down_proj": (3, 2, 2, 6),
        "logits_b/down_proj": (3, 2, 1, 6),
    }
    assert count_parameters(CONFIG, SITES) == {
        "q_proj": 3 * 2 * 5 * 6,
        "down_proj": 3 * 2 * 3 * 6,
        "shared": 24,
    }


@pytest.mark.parametrize("top_k", [1, 2, 6])
def test_the_factors_are_those_of_a_plain_loop(top_k):
    adapter = randomised(build(dataclasses.replace(CONFIG, top_k=top_k)))
    arrays = trained_arrays(adapter)
    for name, factors in quick_jit(adapter.factors)().items():
        np.testing.assert_array_equal(factors.scale, np.ones(3))
        for part in "ab":
            logits = arrays[f"logits_{part}/{name}"]
            want = [
                [admixed_by_hand(arrays["bank"], row, top_k) for row in block] for block in logits
            ]
            np.testing.assert_allclose(getattr(factors, part), want, rtol=1e-5, atol=1e-6)


def test_only_the_picked_logits_get_a_gradient_and_it_is_that_of_the_softmax_over_them():
    bank = jnp.asarray([[1.0, 0.0], [0.0, 2.0], [5.0, 5.0]])
    logits = jnp.asarray([[0.3, 0.1, -1.0]])
    weight = 1 / (1 + math.exp(-0.2))
    slope = jnp.asarray([1.0, 3.0])
    gradient = quick_jit(jax.grad(lambda logits: admix(bank, logits, 2) @ slope))(logits)
    # y = w + 6 (1 - w), and dw / dlogit = +-w (1 - w).
    want = -5 * weight * (1 - weight)
    np.testing.assert_allclose(gradient, [[want, -want, 0.0]], rtol=1e-5, atol=0.0)


def test_the_bank_gets_the_gradients_of_all_sites():
    graphdef, params, rest = split_trained(randomised(build()))

    def totals(params):
        adapter = nnx.merge(graphdef, params, rest)
        one, other = (jnp.sum(adapter.site_factors(name).a ** 2) for name in SITES)
        return jnp.stack([one, other, one + other])

    one, other, both = quick_jit(jax.jacrev(totals))(params)["bank"][...]
    assert np.any(one)
    assert np.any(other)
    np.testing.assert_allclose(both, one + other, rtol=1e-5, atol=1e-6)


def test_the_bank_starts_uniform_and_the_logits_normal():
    sites = {"q_proj": SiteShape(4, 256, 64), "down_proj": SiteShape(4, 64, 256)}
    adapter = build(VBLoRAConfig(rank=4, num_vectors=128, vector_length=64), sites)
    arrays = trained_arrays(adapter)
    deciles = np.quantile(arrays["bank"], np.linspace(0, 1, 11))
    np.testing.assert_allclose(deciles, np.linspace(-0.02, 0.02, 11), atol=1e-3)
    assert np.abs(arrays["bank"]).max() <= 0.02
    logits = {name: array for name, array in arrays.items() if name != "bank"}
    for array in logits.values():
        assert abs(array.mean()) < 0.01
        np.testing.assert_allclose(array.std(), 0.1, rtol=0.05)
        # 68% within one standard deviation: normal, not uniform (58%).
        assert abs(np.mean(np.abs(array) < 0.1) - 0.683) < 0.03
    drawn = np.concatenate([array.ravel() for array in logits.values()])
    assert np.unique(drawn).size > 0.9 * drawn.size


def test_step_0_is_near_the_base_and_not_the_base():
    delta = build(sites={"q_proj": SiteShape(2, 64, 64)}).site_factors("q_proj").delta()
    # Rank 2, and a mixture of entries below the bank's bound is below it too.
    assert 0 < np.abs(delta).max() < 2 * 0.02**2 * (1 + 1e-6)


@pytest.mark.parametrize(
    ("model", "config", "trained", "stored"),
    [
        # 39,040 sub-vectors, the bank of the paper's instruction tuning: 125 times.
        ("llama2-7b", VBLoRAConfig(4, 2048, 256), 80_478_208, 641_408),
        # 91,680 sub-vectors.
        ("llama2-13b", VBLoRAConfig(6, 2048, 256), 188_284_928, 799_328),
        # 19,080, 6,360 and 12,720 sub-vectors.
        ("smollm2-135m", VBLoRAConfig(4, 256, 64), 4_900_864, 73_624),
        ("smollm2-135m", VBLoRAConfig(4, 90, 192), 589_680, 36_360),
        ("smollm2-135m", VBLoRAConfig(4, 90, 96, top_k=3), 1_153_440, 72_240),
    ],
)
def test_trained_and_stored_counts_on_known_models(model, config, trained, stored):
    sites = model_sites(model)
    assert sum(count_parameters(config, sites).values()) == trained
    adapter = jax.eval_shape(lambda key: config.build(sites, key), jax.random.key(0))
    assert adapter.count_served() == stored
    assert 10 < trained / stored < 250


def test_the_summary_reports_trained_and_stored_counts_side_by_side():
    summary = build().summary()
    # 3 blocks, rank 2, and 2 + 3 + 2 + 1 sub-vectors.
    assert summary["trained_parameters"] == 24 + 3 * 2 * 8 * 6
    assert summary["stored_parameters"] == 24 + 3 * 2 * 8 * (3 + 2)
    assert summary["stored_bytes"] == 4 * summary["trained_parameters"]
    assert summary["served_bytes"] == 4 * summary["stored_parameters"]


def test_the_stored_form_is_enough_to_assemble_the_factors():
    adapter = randomised(build())
    arrays = trained_arrays(adapter)
    factors, kept = quick_jit(adapter.factors)(), arrays["bank"].size
    for part in "ab":
        for name in SITES:
            logits = arrays[f"logits_{part}/{name}"]
            indices = np.argsort(-logits, axis=-1)[..., :3]
            weights = np.exp(np.take_along_axis(logits, indices, -1))
            weights = (weights / weights.sum(-1, keepdims=True))[..., :2]
            kept += indices.size + weights.size
            last = 1 - weights.sum(-1, keepdims=True)
            mixed = np.concatenate([weights, last], -1)[..., None] * arrays["bank"][indices]
            want = mixed.sum(-2).reshape(*logits.shape[:2], -1)
            np.testing.assert_allclose(getattr(factors[name], part), want, rtol=1e-4, atol=1e-5)
    assert kept == adapter.count_served()


def test_the_logits_have_their_own_learning_rate():
    assert VBLoRAConfig().rate_ratios() == {"logits_a": 10.0, "logits_b": 10.0}
    config = dataclasses.replace(CONFIG, logits_rate_ratio=4.0)
    assert config.rate_ratios() == {"logits_a": 4.0, "logits_b": 4.0}
    parts = {path[0] for path, _ in nnx.to_flat_state(nnx.state(build(config), nnx.Param))}
    assert set(config.rate_ratios()) == parts - {"bank"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 0}, "rank must be an integer >= 1, got 0"),
        ({"num_vectors": 2.5}, "num_vectors must be an integer >= 1, got 2.5"),
        ({"vector_length": None}, "vector_length must be an integer >= 1, got None"),
        ({"top_k": 0}, "top_k must be an integer >= 1, got 0"),
        ({"top_k": 9, "num_vectors": 8}, "top_k=9 must be at most num_vectors=8"),
        ({"logits_rate_ratio": 0.0}, "logits_rate_ratio must be a finite number above 0, got 0.0"),
        ({"vector_size": 4}, "unknown field 'vector_size'; did you mean 'vector_length'"),
    ],
)
def test_a_configuration_that_cannot_be_used_says_why(fields, message):
    with pytest.raises(InputError, match=f"vb_lora: {message}"):
        make_config("vb_lora", fields)


def test_a_width_that_the_length_does_not_divide_is_named():
    with pytest.raises(InputError, match="vector_length=8 does not divide d_out=12 of 'q_proj'"):
        build(VBLoRAConfig(vector_length=8))
    with pytest.raises(InputError, match="vector_length=12 does not divide d_in=8 of 'q_proj'"):
        build(VBLoRAConfig(vector_length=12))


def test_training_reaches_factors_that_it_can_express():
    sites = {"q_proj": SITES["q_proj"]}
    graphdef, params, rest = split_trained(build(sites=sites))
    wanted = randomised(build(sites=sites), seed=1).factors()["q_proj"].a
    optimizer = optax.adam(0.05)

    def loss(params):
        return jnp.mean((nnx.merge(graphdef, params, rest).factors()["q_proj"].a - wanted) ** 2)

    @jax.jit
    def train(params):
        def step(carry, _):
            params, state = carry
            value, gradient = jax.value_and_grad(loss)(params)
            updates, state = optimizer.update(gradient, state)
            return (optax.apply_updates(params, updates), state), value

        return jax.lax.scan(step, (params, optimizer.init(params)), None, length=100)[1]

    losses = train(params)
    assert losses[-1] < 0.3 * losses[0]
