import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mos_jax import InputError, LoRAConfig, MoSConfig, create_adapter, select_sites
from mos_jax.adapters.low_rank import LowRank
from mos_jax.models.decoder import REMAT_POLICIES, Decoder
from mos_jax.models.known import KNOWN_CONFIGS
from mos_jax.models.projection import keep_fraction
from mos_jax.models.tiny import tiny_config, tiny_weights
from tests.models.fixtures_decoder import (
    MOS,
    filled_adapter,
    plain_logits,
    shapes_of,
    tiny_decoder,
    tokens_of,
)


@pytest.fixture(scope="module")
def decoder():
    return tiny_decoder()


@pytest.fixture(scope="module")
def adapter(decoder):
    return filled_adapter(decoder.sites)


@jax.jit
def logits_of(decoder, tokens, factors=None):
    return decoder(tokens, factors)


def test_logits_equal_a_plain_numpy_forward(decoder):
    tokens = tokens_of(decoder)
    got = logits_of(decoder, tokens)
    assert got.dtype == jnp.float32
    for row in range(2):
        np.testing.assert_allclose(got[row], plain_logits(decoder, tokens[row]), atol=2e-5)


def test_adapted_logits_equal_a_plain_numpy_forward(decoder, adapter):
    tokens, factors = tokens_of(decoder), adapter.factors()
    got = logits_of(decoder, tokens, factors)
    assert np.abs(got - logits_of(decoder, tokens)).max() > 0.1
    np.testing.assert_allclose(got[0], plain_logits(decoder, tokens[0], factors), atol=1e-4)


@pytest.mark.parametrize("config", [MOS, MoSConfig.pure_sharing(2), LoRAConfig(4)], ids=str)
def test_a_fresh_adapter_leaves_the_base_bitwise_as_it_is(decoder, config):
    tokens = tokens_of(decoder)
    fresh = create_adapter(config, decoder.sites, jax.random.key(0))
    np.testing.assert_array_equal(
        logits_of(decoder, tokens, fresh.factors()), logits_of(decoder, tokens)
    )


def test_without_factors_the_compiled_base_holds_no_trace_of_adapters(decoder, adapter):
    tokens = tokens_of(decoder)

    def dots(*args):
        text = jax.jit(lambda d, t, *f: d(t, *f)).lower(decoder, tokens, *args).as_text()
        return text.count("dot_general")

    # Seven linear layers, two products of attention, the head.
    assert dots() == dots(None) == dots({}) == 10
    # One product for the A's of q, k and v, one for gate and up, two more A's; seven B's.
    assert dots(adapter.factors()) == 10 + 4 + 7


def test_assembly_inside_the_scan_equals_assembly_before_it(decoder, adapter):
    tokens = tokens_of(decoder)
    inside = jax.jit(lambda d, t, a: d(t, a.factors))(decoder, tokens, adapter)
    np.testing.assert_allclose(inside, logits_of(decoder, tokens, adapter.factors()), atol=1e-6)


def test_gradients_of_pools_are_the_same_inside_and_before_the_scan(decoder, adapter):
    tokens = tokens_of(decoder)
    graphdef, trained, rest = nnx.split(adapter, nnx.Param, ...)

    def loss(trained, inside):
        merged = nnx.merge(graphdef, trained, rest)
        return jnp.mean(decoder(tokens, merged.factors if inside else merged.factors()) ** 2)

    before, inside = (jax.jit(jax.grad(loss), static_argnums=1)(trained, i) for i in (False, True))
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(inside), strict=True):
        assert np.abs(a).max() > 0
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(a).max())


def test_remat_policies_change_neither_loss_nor_gradient(adapter):
    tokens = tokens_of(tiny_decoder())
    found = []
    for remat in REMAT_POLICIES:
        model = tiny_decoder(remat)
        grad = jax.jit(jax.value_and_grad(lambda f, m: jnp.mean(m(tokens, f) ** 2)))
        found.append(jax.tree.leaves(grad(adapter.factors(), model)))
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_no_position_sees_a_later_one(decoder, adapter):
    tokens = tokens_of(decoder, rows=1, length=6)
    factors, embedded = adapter.factors(), decoder.embed[...][tokens]

    def at(embedded, position):
        return jnp.sum(decoder.logits(decoder.transform(embedded, factors))[0, position] ** 2)

    for position in (0, 2, 5):
        gradient = np.abs(jax.jit(jax.grad(at), static_argnums=1)(embedded, position))[0].max(-1)
        assert (gradient[: position + 1] > 0).all()
        assert (gradient[position + 1 :] == 0).all()


def test_packed_segments_equal_separate_rows(decoder, adapter):
    first, second = tokens_of(decoder, 1, 5, 1), tokens_of(decoder, 1, 7, 2)
    packed = jnp.concatenate([first, second, jnp.zeros((1, 3), jnp.int32)], axis=1)
    positions = jnp.concatenate([jnp.arange(5), jnp.arange(7), jnp.zeros(3, int)])
    segments = jnp.repeat(jnp.array([1, 2, 0]), jnp.array([5, 7, 3]), total_repeat_length=15)
    got = jax.jit(lambda: decoder(
        packed, adapter.factors(), positions=positions[None].astype(jnp.int32),
        segments=segments[None].astype(jnp.int32)))()  # fmt: skip
    np.testing.assert_allclose(got[:, :5], logits_of(decoder, first, adapter.factors()), atol=2e-5)
    np.testing.assert_allclose(
        got[:, 5:12], logits_of(decoder, second, adapter.factors()), atol=2e-5
    )


def test_a_shared_prefix_equals_separate_copies(decoder, adapter):
    prefix, first, second = (tokens_of(decoder, 1, n, s) for n, s in ((4, 1), (3, 2), (5, 3)))
    packed = jnp.concatenate([prefix, first, second], axis=1)
    positions = jnp.concatenate([jnp.arange(7), jnp.arange(4, 9)])[None].astype(jnp.int32)
    segments = jnp.array([[-1] * 4 + [1] * 3 + [2] * 5], jnp.int32)
    factors = adapter.factors()
    run = jax.jit(lambda: decoder(packed, factors, positions=positions, segments=segments))
    got = run()
    one = logits_of(decoder, jnp.concatenate([prefix, first], axis=1), factors)
    two = logits_of(decoder, jnp.concatenate([prefix, second], axis=1), factors)
    np.testing.assert_allclose(got[:, :7], one, atol=2e-5)
    np.testing.assert_allclose(got[:, 7:], two[:, 4:], atol=2e-5)


def test_merged_weights_equal_the_unmerged_adapter(decoder, adapter):
    tokens, factors = tokens_of(decoder), adapter.factors()
    weights = {"embed": decoder.embed[...], "final_norm": decoder.final_norm[...]}
    for name, variable in decoder.blocks.items():
        weight = variable[...]
        weights[f"blocks/{name}"] = factors[name].merge(weight) if name in factors else weight
    merged = Decoder(decoder.config, weights)
    np.testing.assert_allclose(
        logits_of(merged, tokens), logits_of(decoder, tokens, factors), atol=1e-4
    )


def test_adapters_of_some_layers_and_types(decoder):
    tokens = tokens_of(decoder)
    chosen = select_sites(decoder.sites, ["v_proj", "down_proj"], layers=[1])
    config = MoSConfig(equivalent_rank=3, rank=2, shards_per_vector=2)
    some = filled_adapter(chosen, config)
    spread = {name: f.for_all_layers(2) for name, f in some.factors().items()}
    got = logits_of(decoder, tokens, some.factors())
    np.testing.assert_allclose(got[0], plain_logits(decoder, tokens[0], spread), atol=1e-4)
    inside = jax.jit(lambda d, t, a: d(t, a.factors))(decoder, tokens, some)
    np.testing.assert_allclose(inside, got, atol=1e-6)


def test_bf16_base_stays_near_fp32_and_keeps_fp32_logits(adapter):
    exact, rounded = tiny_decoder(), tiny_decoder(dtype="bfloat16")
    tokens = tokens_of(exact)
    hidden = jax.jit(lambda d, f: d.hidden(tokens, f))(rounded, adapter.factors())
    assert hidden.dtype == jnp.bfloat16
    got = logits_of(rounded, tokens, adapter.factors())
    assert got.dtype == jnp.float32
    want = logits_of(exact, tokens, adapter.factors())
    assert np.abs(got - want).max() < 0.05 * np.abs(want).max()


def test_dropout_masks_the_adapter_only_and_differs_by_key(decoder, adapter):
    tokens = tokens_of(decoder)

    @jax.jit
    def run(factors, key, rate):
        return decoder(tokens, factors, dropout=(key, rate))

    plain, full = logits_of(decoder, tokens), logits_of(decoder, tokens, adapter.factors())
    one, two = (run(adapter.factors(), jax.random.key(i), 0.5) for i in (0, 1))
    assert np.abs(one - two).max() > 1e-3
    assert np.abs(one - full).max() > 1e-3
    np.testing.assert_allclose(run(adapter.factors(), jax.random.key(0), 0.0), full, atol=1e-5)
    np.testing.assert_array_equal(run({}, jax.random.key(0), 0.5), plain)


def test_dropout_keeps_the_mean_and_the_asked_share():
    x = jnp.ones((200, 500))
    dropped = keep_fraction(jax.random.key(0), jnp.float32(0.75), x)
    assert abs(float((dropped == 0).mean()) - 0.25) < 0.01
    assert abs(float(dropped.mean()) - 1) < 0.01


def test_every_site_has_a_mask_of_its_own(decoder):
    """Equal A's with unequal masks give unequal branches, also for layers with the same input."""
    tokens = tokens_of(decoder)
    grads = {}
    for name in ("gate_proj", "up_proj"):
        factors = filled_adapter(select_sites(decoder.sites, name), LoRAConfig(2)).factors()

        def loss(a, name=name, factors=factors):
            changed = {name: dataclasses.replace(factors[name], a=a)}
            noise = (jax.random.key(0), 0.5)
            return jnp.sum(decoder(tokens, changed, dropout=noise) ** 2)

        grads[name] = np.asarray(jax.jit(jax.grad(loss))(factors[name].a))
    assert not np.allclose(grads["gate_proj"], grads["up_proj"])


def test_cached_decoding_equals_the_full_forward(decoder, adapter):
    tokens, factors = tokens_of(decoder, rows=2, length=9), adapter.factors()
    full = logits_of(decoder, tokens, factors)
    cache = decoder.empty_cache(2, 16)
    extend = jax.jit(lambda t, p, c: decoder.extend(t, p, c, factors))
    hidden, cache = extend(tokens[:, :4], jnp.zeros(2, jnp.int32), cache)
    np.testing.assert_allclose(decoder.logits(hidden), full[:, :4], atol=2e-5)
    for position in range(4, 9):
        here = jnp.full(2, position, jnp.int32)
        hidden, cache = extend(tokens[:, position : position + 1], here, cache)
        np.testing.assert_allclose(decoder.logits(hidden)[:, 0], full[:, position], atol=2e-5)


def test_factors_that_do_not_fit_are_refused(decoder):
    tokens = tokens_of(decoder)
    good = LowRank(jnp.zeros((2, 3, 64)), jnp.zeros((2, 3, 64)), jnp.ones(2))
    with pytest.raises(InputError, match="unknown site 'qproj'; did you mean 'q_proj'"):
        decoder(tokens, {"qproj": good})
    wide = r"a \[2, 3, 64\], b \[2, 3, 64\] .* for all blocks; the base has 2 of 64 -> 128"
    with pytest.raises(InputError, match=wide):
        decoder(tokens, {"up_proj": good})
    for changes, words in (
        ({"a": jnp.zeros((3, 3, 64)), "b": jnp.zeros((3, 3, 64))}, r"a \[3, 3, 64\]"),
        ({"b": good.b[:, :2]}, r"a \[2, 3, 64\], b \[2, 2, 64\]"),
        ({"scale": good.scale[:1]}, r"scale \[1\]"),
        ({"layers": (1,)}, r"the blocks \[1\]"),
        ({"layers": (1, 1)}, r"the blocks \[1, 1\]"),
        ({"layers": (1, 0)}, r"the blocks \[1, 0\]"),
        ({"layers": (0, 2)}, r"the blocks \[0, 2\]"),
        ({"layers": (), "a": good.a[:0], "b": good.b[:0], "scale": good.scale[:0]}, r"blocks \[\]"),
    ):
        with pytest.raises(InputError, match=words):
            decoder(tokens, {"q_proj": dataclasses.replace(good, **changes)})
    with pytest.raises(InputError, match="unknown remat policy 'all'"):
        tiny_decoder("all")


def test_strict_promotion_guards_the_forward(decoder):
    wrong = LowRank(jnp.zeros((2, 3, 64)), jnp.zeros((2, 3, 64)), jnp.ones(2, jnp.bfloat16))
    with pytest.raises(jax.numpy_dtype_promotion("strict") and Exception, match="promotion"):
        jax.eval_shape(lambda: decoder(tokens_of(decoder), {"q_proj": wrong}))


@pytest.fixture(scope="module")
def step_costs():
    """Temporary bytes and FLOPs of compiled gradient steps of SmolLM2 at 8 x 128 tokens."""
    config = KNOWN_CONFIGS["smollm2-135m"]
    model = shapes_of(config)
    tokens = jax.ShapeDtypeStruct((8, 128), jnp.int32)

    def loss_of(model, hidden, tokens):
        logits = model.logits(hidden)[:, :-1]
        picked = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=2)[..., 0]
        return jnp.mean(jax.nn.logsumexp(logits, axis=2) - picked)

    def frozen(embedded, model, tokens):
        return loss_of(model, model.transform(embedded), tokens)

    costs = {}
    embedded = jax.ShapeDtypeStruct((8, 128, config.d_model), jnp.float32)
    costs["base"] = jax.jit(jax.value_and_grad(frozen)).lower(embedded, model, tokens).compile()
    for name, method in (("lora", LoRAConfig(8)), ("mos", MoSConfig(2, 8, 2, 1))):
        adapter = jax.eval_shape(
            lambda key, method=method: create_adapter(method, model.sites, key), jax.random.key(0)
        )
        graphdef, trained, rest = nnx.split(adapter, nnx.Param, ...)

        def adapted(trained, rest, model, tokens, graphdef=graphdef):
            factors = nnx.merge(graphdef, trained, rest).factors()
            return loss_of(model, model.hidden(tokens, factors), tokens)

        grad = jax.jit(jax.value_and_grad(adapted))
        costs[name] = grad.lower(trained, rest, model, tokens).compile()
    return {k: v.memory_analysis().temp_size_in_bytes for k, v in costs.items()}


def test_a_mos_step_needs_little_more_memory_than_the_frozen_base(step_costs):
    assert step_costs["mos"] <= 1.15 * step_costs["base"]


def test_a_mos_step_needs_little_more_memory_than_lora(step_costs):
    assert step_costs["mos"] <= 1.05 * step_costs["lora"]


def test_the_weights_build_the_same_decoder():
    config = dataclasses.replace(tiny_config(), tied_embeddings=False)
    weights = {name: jnp.asarray(array) for name, array in tiny_weights(config).items()}
    model = Decoder(config, weights)
    assert set(model.weights) == set(config.weight_shapes())
    for name, array in Decoder(config, model.weights).weights.items():
        assert array is weights[name], name
