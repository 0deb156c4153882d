"""What holds for the decoder of every family: see `FAMILY_FIELDS` for what each adds."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mos_jax import LoRAConfig, Sampling, create_adapter, generate, select_sites
from mos_jax.models.config import FAMILIES, LinearScaling
from mos_jax.models.decoder import REMAT_POLICIES
from mos_jax.models.rope import inverse_frequencies
from tests.models.fixtures_decoder import MOS, filled_adapter, plain_logits, tokens_of
from tests.models.fixtures_families import (
    WINDOW,
    family_config,
    family_decoder,
    with_fields,
)

WINDOWED = ("mistral", "qwen2", "gemma3")
LENGTH = 3 * WINDOW
LORA = LoRAConfig(2)


@pytest.fixture(scope="module", params=FAMILIES)
def decoder(request):
    return family_decoder(request.param)


@pytest.fixture(scope="module", params=WINDOWED)
def windowed(request):
    return family_decoder(request.param)


@pytest.fixture(scope="module")
def factors(decoder):
    return filled_adapter(decoder.sites, LORA).factors()


@jax.jit
def logits_of(decoder, tokens, factors=None, positions=None, segments=None):
    return decoder(tokens, factors, positions=positions, segments=segments)


def test_logits_equal_a_plain_numpy_forward(decoder):
    tokens = tokens_of(decoder, length=LENGTH)
    got = logits_of(decoder, tokens)
    for row in range(2):
        np.testing.assert_allclose(got[row], plain_logits(decoder, tokens[row]), atol=5e-5)


def test_adapted_logits_equal_a_plain_numpy_forward(decoder):
    tokens = tokens_of(decoder, rows=1, length=LENGTH)
    adapter = filled_adapter(decoder.sites, MOS)
    factors = adapter.factors()
    got = logits_of(decoder, tokens, factors)
    assert np.abs(got - logits_of(decoder, tokens)).max() > 0.1
    np.testing.assert_allclose(got[0], plain_logits(decoder, tokens[0], factors), atol=2e-4)
    inside = jax.jit(lambda d, t, a: d(t, a.factors))(decoder, tokens, adapter)
    np.testing.assert_allclose(inside, got, atol=2e-5)


def test_adapters_of_single_sites_equal_a_plain_numpy_forward(decoder):
    tokens = tokens_of(decoder, rows=1, length=LENGTH)
    chosen = select_sites(decoder.sites, ["k_proj", "o_proj"], layers=[1])
    factors = filled_adapter(chosen, LORA).factors()
    spread = {name: f.for_all_layers(3) for name, f in factors.items()}
    got = logits_of(decoder, tokens, factors)
    np.testing.assert_allclose(got[0], plain_logits(decoder, tokens[0], spread), atol=2e-4)


def test_a_fresh_adapter_leaves_the_base_bitwise_as_it_is(decoder):
    tokens = tokens_of(decoder)
    fresh = create_adapter(MOS, decoder.sites, jax.random.key(0))
    np.testing.assert_array_equal(
        logits_of(decoder, tokens, fresh.factors()), logits_of(decoder, tokens)
    )


def gradient_of(decoder, factors):
    tokens = tokens_of(decoder, length=LENGTH)
    return jax.jit(jax.grad(lambda f, d: jnp.mean(d(tokens, f) ** 2)))(factors, decoder)


def test_gradients_reach_every_site(decoder, factors):
    found = gradient_of(decoder, factors)
    assert found.keys() == decoder.sites.keys()
    for gradient in jax.tree.leaves(found):
        assert np.isfinite(gradient).all()
        assert (np.abs(gradient).reshape(3, -1).max(1) > 0).all()


def test_remat_policies_do_not_change_the_gradient():
    factors = filled_adapter(family_decoder("gemma3").sites, LORA).factors()
    found = [gradient_of(family_decoder("gemma3", r), factors) for r in REMAT_POLICIES]
    for other in found[1:]:
        for a, b in zip(jax.tree.leaves(found[0]), jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6)


def test_no_large_product_runs_twice_in_a_gradient(decoder, factors):
    """Norms behind products need their inputs in the backward pass: those have to be kept."""

    def products(decoder):
        loss = jax.jit(jax.grad(lambda f, d: jnp.sum(d(tokens_of(d), f) ** 2)))
        return loss.lower(factors, decoder).as_text().count("dot_general")

    llama = family_decoder("llama", rope_scaling=None, head_dim=decoder.config.head_dim)
    assert products(decoder) == products(llama)


def test_no_position_sees_a_later_one(decoder):
    embedded = decoder.embed_tokens(tokens_of(decoder, rows=1, length=6))

    def at(embedded, position):
        return jnp.sum(decoder.logits(decoder.transform(embedded))[0, position] ** 2)

    for position in (0, 4):
        gradient = np.abs(jax.jit(jax.grad(at), static_argnums=1)(embedded, position))[0].max(-1)
        assert (gradient[position + 1 :] == 0).all()
        assert gradient[position] > 0


def test_packed_rows_equal_a_plain_numpy_forward(decoder):
    """A shared prefix, two texts behind it and padding, each longer than the window."""
    prefix, first, second = WINDOW + 2, WINDOW + 1, WINDOW + 3
    segments = np.repeat([-1, 1, 2, 0], [prefix, first, second, 2])
    positions = np.concatenate(
        [np.arange(prefix + first), np.arange(prefix, prefix + second), np.zeros(2)]
    ).astype(np.int32)
    tokens = tokens_of(decoder, rows=1, length=len(segments))
    got = logits_of(decoder, tokens, None, positions[None], jnp.asarray(segments[None], jnp.int32))[
        0
    ]
    want = plain_logits(decoder, tokens[0], None, segments, positions)
    np.testing.assert_allclose(got[:-2], want[:-2], atol=5e-5)
    alone = np.concatenate([tokens[0, :prefix], tokens[0, prefix + first : -2]])
    np.testing.assert_allclose(
        got[prefix + first : -2], logits_of(decoder, alone[None])[0, prefix:], atol=5e-5
    )


def test_padding_in_front_changes_nothing(decoder):
    text = tokens_of(decoder, rows=1, length=LENGTH)
    front = 5
    tokens = jnp.concatenate([jnp.zeros((1, front), jnp.int32), text], axis=1)
    real = jnp.asarray(np.repeat([0, 1], [front, LENGTH])[None], jnp.int32)
    positions = jnp.maximum(jnp.cumsum(real, axis=1, dtype=jnp.int32) - 1, 0)
    got = logits_of(decoder, tokens, None, positions, real)
    np.testing.assert_allclose(got[:, front:], logits_of(decoder, text), atol=5e-5)


def test_cached_decoding_equals_the_full_forward(decoder, factors):
    tokens = tokens_of(decoder, length=LENGTH)
    full = logits_of(decoder, tokens, factors)
    cache = decoder.empty_cache(2, LENGTH + 4)

    @jax.jit
    def extend(tokens, positions, cache):
        hidden, cache = decoder.extend(tokens, positions, cache, factors)
        return decoder.logits(hidden), cache

    start = jnp.zeros(2, jnp.int32)
    got, cache = extend(tokens[:, : WINDOW + 1], start, cache)
    np.testing.assert_allclose(got, full[:, : WINDOW + 1], atol=5e-5)
    for position in range(WINDOW + 1, LENGTH):
        here = jnp.full(2, position, jnp.int32)
        got, cache = extend(tokens[:, position : position + 1], here, cache)
        np.testing.assert_allclose(got[:, 0], full[:, position], atol=5e-5)


def test_generation_beyond_the_window_is_the_most_likely_continuation(decoder):
    prompts = [tokens_of(decoder, 1, n, n)[0].tolist() for n in (2, LENGTH)]
    got = generate(decoder, prompts, (), Sampling.create(max_new_tokens=LENGTH))
    for prompt, new in zip(prompts, got, strict=True):
        predicted = np.argmax(logits_of(decoder, jnp.asarray([prompt + new], jnp.int32))[0], -1)
        assert predicted[len(prompt) - 1 : -1].tolist() == new


def test_a_window_hides_what_is_further_back_and_nothing_else(windowed):
    """One layer: the last token's logits depend on the last `WINDOW` tokens exactly."""
    one = family_decoder(windowed.config.family, num_layers=1, windowed_layers=None)
    embedded = one.embed_tokens(tokens_of(one, rows=1, length=LENGTH))

    def last(embedded):
        return jnp.sum(one.logits(one.transform(embedded))[0, -1] ** 2)

    reach = np.abs(jax.jit(jax.grad(last))(embedded))[0].max(-1)
    assert (reach[-WINDOW:] > 0).all()
    assert (reach[:-WINDOW] == 0).all()


def test_a_window_as_long_as_the_text_is_no_window(windowed):
    tokens = tokens_of(windowed, length=LENGTH)
    wide = with_fields(windowed, window=LENGTH)
    none = with_fields(windowed, window=None, windowed_layers=None, local_rope_base=None)
    short = logits_of(windowed, tokens)
    assert np.abs(short - logits_of(wide, tokens))[:, WINDOW:].max() > 1e-3
    np.testing.assert_allclose(short[:, :WINDOW], logits_of(wide, tokens)[:, :WINDOW], atol=2e-5)
    if windowed.config.local_rope_base is None:
        np.testing.assert_allclose(logits_of(wide, tokens), logits_of(none, tokens), atol=2e-5)


def test_which_layers_are_windowed_matters(windowed):
    tokens = tokens_of(windowed, length=LENGTH)
    first, last = (with_fields(windowed, windowed_layers=(layer,)) for layer in (0, 2))
    assert np.abs(logits_of(first, tokens) - logits_of(last, tokens)).max() > 1e-3


def ops(decoder, *names):
    text = jax.jit(lambda d, t: d(t)).lower(decoder, tokens_of(decoder)).as_text()
    return tuple(text.count(f"stablehlo.{name} ") for name in names)


def test_a_field_at_its_default_leaves_no_trace_in_the_program():
    counted = ("rsqrt", "cosine", "select", "tanh", "logistic")
    plain = family_decoder("llama", rope_scaling=None)
    base = dict(zip(counted, ops(plain, *counted), strict=True))
    # Norms of attention, MLP and the end; one table; the causal mask and two wrapped indices.
    assert (base["rsqrt"], base["cosine"], base["tanh"]) == (3, 1, 0)
    for changes, more in (
        ({"family": "mistral"}, {}),
        ({"window": 4}, {}),
        ({"window": 4, "windowed_layers": (1,)}, {"select": 1}),
        ({"window": 4, "windowed_layers": (1,), "local_rope_base": 1e3},
         {"select": 3, "cosine": 1}),
        ({"window": 4, "local_rope_base": 1e3}, {}),
        ({"qk_norm": True}, {"rsqrt": 2}),
        ({"post_norms": True}, {"rsqrt": 2}),
        ({"qkv_bias": True}, {}),
        ({"activation": "gelu_tanh"}, {"tanh": 1, "logistic": -base["logistic"]}),
    ):  # fmt: skip
        got = ops(family_decoder("llama", rope_scaling=None, **changes), *counted)
        want = tuple(base[name] + more.get(name, 0) for name in counted)
        assert got == want, changes


def test_frequencies_of_global_and_local_layers():
    config = family_config("gemma3")
    plain = 1e6 ** -(np.arange(0, 32, 2) / 32)
    np.testing.assert_allclose(inverse_frequencies(config), plain / 8, rtol=1e-6)
    local = 1e4 ** -(np.arange(0, 32, 2) / 32)
    np.testing.assert_allclose(inverse_frequencies(config, local=True), local, rtol=1e-6)
    shared = dataclasses.replace(config, local_rope_base=None)
    assert shared.rope_scaling == LinearScaling(8.0)
    np.testing.assert_array_equal(
        inverse_frequencies(shared, local=True), inverse_frequencies(shared)
    )


def test_the_scale_of_embeddings_is_rounded_as_they_are():
    scale = 55.425625  # 3072 ** 0.5, which is 55.5 in bfloat16
    for dtype, rounded in (("float32", scale), ("bfloat16", 55.5)):
        decoder = family_decoder("gemma3", dtype=dtype, embed_scale=scale)
        got = decoder.embed_tokens(jnp.zeros((1, 1), jnp.int32))
        want = decoder.embed[...][0].astype(jnp.float32) * rounded
        assert got.dtype == decoder.embed.dtype
        np.testing.assert_array_equal(got[0, 0], want.astype(got.dtype))


def test_a_bf16_base_stays_near_fp32():
    exact, rounded = (family_decoder("gemma3", dtype=d) for d in ("float32", "bfloat16"))
    factors = filled_adapter(exact.sites, LORA).factors()
    got, want = (logits_of(d, tokens_of(exact), factors) for d in (rounded, exact))
    assert got.dtype == jnp.float32
    assert np.linalg.norm(got - want) < 0.03 * np.linalg.norm(want)
