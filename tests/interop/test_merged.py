import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from mos_jax.adapters.low_rank import LowRank
from mos_jax.adapters.sites import select_sites
from mos_jax.errors import InputError
from mos_jax.interop.check import largest_difference, probe_logits, probe_tokens
from mos_jax.interop.huggingface_out import write_model
from mos_jax.interop.merged import merge
from mos_jax.models.base import Base, load_base
from mos_jax.models.decoder import Decoder
from mos_jax.models.tiny import tiny_config, tiny_weights
from mos_jax.models.tokenizer import Tokenizer
from tests.adapters.test_contract import CONFIGS, sites_of
from tests.models.fixtures_decoder import filled_adapter

CONFIG = dataclasses.replace(tiny_config(), num_layers=3, d_model=32, d_ff=48)


def base_of(dtype="float32", config=CONFIG):
    weights = {name: jnp.asarray(a) for name, a in tiny_weights(config, 0, dtype).items()}
    return Base("small", Decoder(config, weights), Tokenizer.byte_level())


@pytest.fixture(scope="module")
def base():
    return base_of()


def some_factors(layers=None, sites=("q_proj", "down_proj"), rank=3, seed=0):
    random, factors = np.random.default_rng(seed), {}
    depth = CONFIG.num_layers if layers is None else len(layers)
    for name in sites:
        _, d_in, d_out = CONFIG.site_shapes()[name]
        a, b = (random.normal(size=(depth, rank, d)).astype(np.float32) for d in (d_in, d_out))
        scale = np.float32(0.02) * np.arange(1, depth + 1, dtype=np.float32)
        factors[name] = LowRank(jnp.asarray(a), jnp.asarray(b), jnp.asarray(scale), layers)
    return factors


def bits(array):
    return np.asarray(array).tobytes()


# One of each kind: every method's factors are merged in test_contract_on_base.py.
@pytest.mark.parametrize("name", ["mos", "prolora", "vera", "tied-qkv"])
def test_a_method_merges_to_the_same_logits(base, name):
    sites = select_sites(base.sites, list(sites_of(name)))
    factors = filled_adapter(sites, CONFIGS[name]).factors()
    merged = merge(base, factors)
    alone, beside = probe_logits(base.model), probe_logits(base.model, factors)
    within = probe_logits(merged.base.model)
    assert largest_difference(beside, alone) > 100 * largest_difference(beside, within)
    # What is reported is what is found.
    assert merged.difference == largest_difference(beside, within)
    assert merged.difference < 1e-5 * np.abs(beside).max()
    assert (merged.dtype, merged.tokens) == ("float32", probe_tokens(320).size)


@pytest.mark.parametrize("layers", [None, (0, 2)])
@pytest.mark.parametrize("out", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_the_sum_rounded_once_and_others_stay(dtype, out, layers):
    base, factors = base_of(dtype), some_factors(layers)
    merged = merge(base, factors, dtype=out)
    assert merged.base.dtype == out
    for name, array in base.model.weights.items():
        site, result = name.removeprefix("blocks/"), merged.base.model.weights[name]
        kind = jnp.float32 if name.endswith("norm") else jnp.dtype(out)
        assert result.dtype == kind
        if site not in factors:
            assert bits(result) == bits(array.astype(kind)), name
            continue
        for layer in range(CONFIG.num_layers):
            if layers is not None and layer not in layers:
                assert bits(result[layer]) == bits(array[layer].astype(kind))
                continue
            low_rank, entry = factors[site], layer if layers is None else layers.index(layer)
            a, b, scale = (
                np.asarray(x[entry], np.float64) for x in (low_rank.a, low_rank.b, low_rank.scale)
            )
            want = np.asarray(array[layer], np.float64) + scale * a.T @ b
            step = 2.0**-8 if out == "bfloat16" else 2.0**-22
            np.testing.assert_allclose(
                np.asarray(result[layer], np.float64), want, rtol=step, atol=1e-6
            )
    if out == "float32":
        assert set(merged.lost.values()) == {0.0}


def test_zeros_keep_their_sign_where_nothing_is_merged():
    base = base_of()
    weights = base.model.weights
    weights["blocks/q_proj"] = jnp.full_like(weights["blocks/q_proj"], -0.0)
    base = dataclasses.replace(base, model=Decoder(CONFIG, weights))
    merged = merge(base, some_factors((1,), ("q_proj",)))
    assert bits(merged.base.model.weights["blocks/q_proj"][0]) == bits(weights["blocks/q_proj"][0])


def test_what_rounding_took_is_reported(base):
    factors = some_factors()
    merged = merge(base_of("bfloat16"), factors)
    for name, low_rank in factors.items():
        old = np.asarray(base_of("bfloat16").model.weights[f"blocks/{name}"], np.float32)
        delta = np.asarray(low_rank.delta())
        exact = old + delta
        off = exact.astype(ml_dtypes.bfloat16).astype(np.float32) - exact
        want = np.linalg.norm(off) / np.linalg.norm(delta)
        assert merged.lost[name] == pytest.approx(want, rel=1e-3)
    # A change far below the spacing of bf16 numbers is lost altogether.
    tiny = {name: f.scaled(1e-7) for name, f in factors.items()}
    lost = merge(base_of("bfloat16"), tiny).lost
    assert min(lost.values()) > 0.9


def test_unmerging_restores_the_originals_bitwise(base):
    before = {name: bits(array) for name, array in base.model.weights.items()}
    logits = probe_logits(base.model)
    merged = merge(base, some_factors())
    assert bits(merged.base.model.weights["blocks/q_proj"]) != before["blocks/q_proj"]
    restored = merged.unmerge()
    assert {name: bits(array) for name, array in restored.model.weights.items()} == before
    assert bits(probe_logits(restored.model)) == bits(logits)
    assert restored.fingerprint == base.fingerprint != merged.base.fingerprint


def test_without_the_originals_unmerging_is_refused():
    base, kept = base_of(), merge(base_of(), some_factors())
    weights = base.model.weights
    merged = merge(base, some_factors(), keep=False)
    assert weights["blocks/q_proj"].is_deleted()
    assert weights["blocks/down_proj"].is_deleted()
    for name, array in merged.base.model.weights.items():
        assert bits(array) == bits(kept.base.model.weights[name]), name
    assert merged.difference == kept.difference
    with pytest.raises(InputError, match="freed"):
        merged.unmerge()


def broken(part, value, layer=1):
    factors = some_factors()
    low_rank = factors["down_proj"]
    array = getattr(low_rank, part)
    index = (layer, 0, 0) if part != "scale" else (layer,)
    return factors | {
        "down_proj": dataclasses.replace(low_rank, **{part: array.at[index].set(value)})
    }


@pytest.mark.parametrize(
    ("factors", "words"),
    [
        (broken("a", np.nan), "change is not finite"),
        (broken("b", np.inf), "change is not finite"),
        (broken("scale", 3e38), "change is not finite"),
    ],
)
@pytest.mark.parametrize("keep", [True, False])
def test_a_merge_that_is_not_finite_names_site_and_layer(factors, words, keep):
    base = base_of()
    with pytest.raises(InputError, match=f"down_proj of layer 1: .*{words}"):
        merge(base, factors, keep=keep)
    # Nothing was freed on the way: q_proj, which comes first, is whole.
    assert np.isfinite(probe_logits(base.model)).all()


def test_a_value_that_only_float32_holds_is_refused_in_bfloat16():
    # The largest float32 rounds to infinity in bfloat16.
    site = CONFIG.site_shapes()["q_proj"]
    a, b = (np.zeros((3, 1, d), np.float32) for d in site[1:])
    a[2, 0, 0], b[2, 0, 0] = 1.0, np.finfo(np.float32).max
    factors = {"q_proj": LowRank(jnp.asarray(a), jnp.asarray(b), jnp.ones(3, jnp.float32))}
    assert merge(base_of(), factors).dtype == "float32"
    with pytest.raises(InputError, match=r"q_proj of layer 2: .*3.403e\+38.*bfloat16"):
        merge(base_of(), factors, dtype="bfloat16")
    weights = base_of().model.weights
    weights["blocks/q_proj"] = weights["blocks/q_proj"].at[2, 0, 0].set(3e38)
    large = dataclasses.replace(base_of(), model=Decoder(CONFIG, weights))
    with pytest.raises(InputError, match="q_proj of layer 2: the sum"):
        merge(large, factors)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"factors": {}}, "no factors"),
        ({"dtype": "float16"}, "unknown dtype 'float16'"),
        ({"factors": {"qproj": some_factors()["q_proj"]}}, "qproj"),
        ({"factors": {"k_proj": some_factors()["q_proj"]}}, "k_proj"),
        ({"factors": {"q_proj": some_factors((0, 5))["q_proj"]}}, "q_proj"),
    ],
)
def test_bad_input_is_refused(base, options, words):
    arguments = {"factors": some_factors()} | options
    with pytest.raises(InputError, match=words):
        merge(base, arguments.pop("factors"), **arguments)


def test_the_merged_base_generates_and_trains_like_any_other():
    base = load_base("tiny-random")
    merged = merge(base, filled_adapter(base.sites).factors()).base
    tokens = jnp.asarray(probe_tokens(merged.config.vocab_size))
    loss = jax.jit(jax.grad(lambda x: jnp.sum(merged.model.transform(x).astype(jnp.float32) ** 2)))
    assert np.isfinite(loss(merged.model.embed[...][tokens])).all()
    assert merged.tokenizer is base.tokenizer


@pytest.mark.parametrize("keep", [True, False])
def test_a_base_on_several_devices_merges_to_the_same_weights(tmp_path, keep):
    devices = jax.sharding.Mesh(np.asarray(jax.devices()[:4]), ("x",))

    def place(name, shape):
        split = jax.sharding.PartitionSpec(*(None,) * (len(shape) - 1), "x")
        whole = jax.sharding.PartitionSpec()
        return jax.sharding.NamedSharding(devices, split if len(shape) > 2 else whole)

    alone, spread = load_base("tiny-random"), load_base("tiny-random", shardings=place)
    spread_to = {name: array.sharding for name, array in spread.model.weights.items()}
    factors = filled_adapter(alone.sites).factors()
    want, got = merge(alone, factors), merge(spread, factors, keep=keep)
    for name, array in got.base.model.weights.items():
        np.testing.assert_allclose(array, want.base.model.weights[name], atol=1e-6)
        # Each device still has its slice only.
        assert array.sharding.is_equivalent_to(spread_to[name], array.ndim), name
    assert got.difference < 1e-4
    write_model(tmp_path / "m", got.base)
    for name, array in load_base(tmp_path / "m").model.weights.items():
        assert bits(array) == bits(got.base.model.weights[name]), name
