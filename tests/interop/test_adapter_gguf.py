import dataclasses

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mos_jax.adapters.low_rank import LowRank
from mos_jax.errors import InputError
from mos_jax.interop.adapter_gguf import (
    _choose_alpha,
    _fold,
    _llama_scale,
    _Matrices,
    plan_adapter_gguf,
    read_adapter_gguf,
    write_adapter_gguf,
)
from mos_jax.interop.check import largest_logit_difference, probe_tokens
from mos_jax.models.base import load_base
from mos_jax.models.gguf import open_gguf
from mos_jax.models.tiny import tiny_config, tiny_weights
from tests.adapters.test_contract import CONFIGS, assert_same
from tests.models.fixtures_decoder import filled_adapter
from tests.models.fixtures_models import write_gguf

CONFIG = dataclasses.replace(tiny_config(), num_layers=3, d_model=32, d_ff=48)


def low_rank(site, scales, rank=2, layers=None, seed=0):
    random = np.random.default_rng(seed)
    _, d_in, d_out = CONFIG.site_shapes()[site]
    a, b = (random.normal(size=(len(scales), rank, d)).astype(np.float32) for d in (d_in, d_out))
    return LowRank(jnp.asarray(a), jnp.asarray(b), jnp.asarray(scales, jnp.float32), layers)


def written(tmp_path, factors, config=CONFIG):
    plan = write_adapter_gguf(tmp_path / "a.gguf", factors, config)
    return plan, read_adapter_gguf(tmp_path / "a.gguf", config)


def tensors_of(path):
    """As the gguf package reads them: [rows, columns]."""
    return {t.name: np.array(t.data) for t in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize("name", ["mos", "rslora", "vera"])
def test_a_method_reads_back_as_the_same_factors(tmp_path, name):
    base = load_base("tiny-random")
    factors = filled_adapter(base.sites, CONFIGS[name]).factors()
    plan, again = written(tmp_path, factors, base.config)
    assert (plan.folded, plan.rounding, plan.sites) == (0, 0.0, 14)
    assert_same(again, factors)
    tokens = probe_tokens(base.config.vocab_size)
    assert largest_logit_difference(base.model, tokens, factors, again) == 0.0


def test_the_file_is_what_llama_cpp_asks_for(tmp_path):
    factors = {"q_proj": low_rank("q_proj", [2.0, 2.0], layers=(0, 2)),
               "o_proj": low_rank("o_proj", [2.0] * 3)}  # fmt: skip
    write_adapter_gguf(tmp_path / "a.gguf", factors, CONFIG, name="mine")
    fields = open_gguf(tmp_path / "a.gguf").fields
    want = {
        "general.type": "adapter",
        "general.architecture": "llama",
        "general.name": "mine",
        "adapter.type": "lora",
        "adapter.lora.alpha": 4.0,
    }
    assert {key: fields[key] for key in want} == want
    tensors = tensors_of(tmp_path / "a.gguf")
    assert set(tensors) == {
        f"blk.{layer}.{name}.weight.lora_{part}"
        for name, layers in (("attn_q", (0, 2)), ("attn_output", (0, 1, 2)))
        for layer in layers
        for part in "ab"
    }
    o_proj = factors["o_proj"]
    assert np.array_equal(tensors["blk.1.attn_output.weight.lora_a"], o_proj.a[1])
    assert np.array_equal(tensors["blk.1.attn_output.weight.lora_b"], o_proj.b[1].T)


def test_queries_and_keys_are_ordered_as_in_a_llama_file(tmp_path):
    """A base whose weights are the adapter's change, written as GGUF, has the same rows."""
    for site, name in (("q_proj", "attn_q"), ("k_proj", "attn_k"), ("v_proj", "attn_v")):
        factors = {site: low_rank(site, [1.0] * 3)}
        write_adapter_gguf(tmp_path / f"{site}.gguf", factors, CONFIG)
        tensors = tensors_of(tmp_path / f"{site}.gguf")
        weights = tiny_weights(CONFIG)
        weights[f"blocks/{site}"] = np.asarray(factors[site].delta())
        model = tensors_of(write_gguf(tmp_path / "m.gguf", CONFIG, weights))
        for layer in range(3):
            key = f"blk.{layer}.{name}.weight"
            got = tensors[f"{key}.lora_b"] @ tensors[f"{key}.lora_a"]
            np.testing.assert_allclose(got, model[key], atol=1e-5)


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3", "gemma3"])
def test_other_families_keep_the_rows_unless_they_are_llamas(tmp_path, family):
    config = dataclasses.replace(CONFIG, family=family)
    factors = {"q_proj": low_rank("q_proj", [2.0] * 3)}
    _, again = written(tmp_path, factors, config)
    assert_same(again, factors)
    stored = tensors_of(tmp_path / "a.gguf")["blk.0.attn_q.weight.lora_b"]
    assert np.array_equal(stored, factors["q_proj"].b[0].T) == (family != "mistral")
    architecture = open_gguf(tmp_path / "a.gguf").fields["general.architecture"]
    assert architecture == ("llama" if family == "mistral" else family)


def delta(factors):
    whole = {name: f.for_all_layers(3) for name, f in factors.items()}
    return {
        name: np.einsum("l,lrh,lro->lho", *(np.asarray(x, np.float64) for x in (f.scale, f.a, f.b)))
        for name, f in whole.items()
    }


def test_scales_that_differ_are_folded_exactly_where_they_are_powers_of_two(tmp_path):
    factors = {
        "q_proj": low_rank("q_proj", [0.3, 0.6, -0.15]),
        "o_proj": low_rank("o_proj", [0.3] * 3),
    }
    plan, again = written(tmp_path, factors)
    assert (plan.folded, plan.rounding) == (2, 0.0)
    for name, want in delta(factors).items():
        assert np.array_equal(delta(again)[name], want)


def test_other_scales_are_rounded_once_and_reported(tmp_path):
    factors = {
        "q_proj": low_rank("q_proj", [0.3, 0.7, 0.3]),
        "o_proj": low_rank("o_proj", [0.3] * 3),
    }
    plan, again = written(tmp_path, factors)
    assert plan.folded == 1
    assert 0 < plan.rounding <= 2.0**-24
    got, want = delta(again), delta(factors)
    assert np.array_equal(got["o_proj"], want["o_proj"])
    assert not np.array_equal(got["q_proj"][1], want["q_proj"][1])
    np.testing.assert_allclose(got["q_proj"], want["q_proj"], rtol=0, atol=1e-6)


def test_ranks_that_differ_have_scales_of_their_own(tmp_path):
    # Rows beyond a site's rank are left out, which changes what llama.cpp divides alpha by.
    factors = {"down_proj": low_rank("down_proj", [0.5, 0.5, 1.0], rank=4)}
    a, b = factors["down_proj"].a.at[2, 2:].set(0.0), factors["down_proj"].b.at[2, 2:].set(0.0)
    factors["down_proj"] = dataclasses.replace(factors["down_proj"], a=a, b=b, ranks=(4, 4, 2))
    plan, again = written(tmp_path, factors)
    assert (plan.rank, plan.folded, plan.alpha) == (4, 0, 2.0)
    assert tensors_of(tmp_path / "a.gguf")["blk.2.ffn_down.weight.lora_a"].shape == (2, 48)
    assert_same(again, factors)


@pytest.mark.parametrize("scales", [[0.0] * 3, [0.0, 1.0, -2.0], [1e-45] * 3, [1e30, 1e-30, 1.0]])
def test_odd_scales(tmp_path, scales):
    factors = {"q_proj": low_rank("q_proj", scales)}
    _, again = written(tmp_path, factors)
    for layer in range(3):
        got, want = delta(again)["q_proj"][layer], delta(factors)["q_proj"][layer]
        # Products below the smallest normal number lose digits, whatever the format.
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=max(1e-44, 1e-6 * np.abs(want).max()))


@given(
    st.lists(
        st.tuples(st.integers(1, 300), st.floats(2.0**-20, 2.0**20, width=32), st.booleans()),
        min_size=1,
        max_size=5,
    )
)
def test_folding_never_loses_more_than_a_rounding(cases):
    random = np.random.default_rng(0)
    sites = [
        _Matrices(
            np.zeros((rank, 1), np.float32),
            random.normal(size=(rank, 3)).astype(np.float32),
            np.float32(-scale if negative else scale),
        )
        for rank, scale, negative in cases
    ]
    alpha = _choose_alpha(sites)
    for site in sites:
        b, rounding = _fold(site, alpha)
        assert rounding <= 2.0**-24
        got = b.astype(np.float64) * float(_llama_scale(alpha, site.rank))
        want = site.b.astype(np.float64) * float(site.scale)
        np.testing.assert_allclose(got, want, rtol=2.0**-23)


def test_nothing_is_replaced_unasked(tmp_path):
    path, factors = tmp_path / "a.gguf", {"q_proj": low_rank("q_proj", [1.0] * 3)}
    write_adapter_gguf(path, factors, CONFIG)
    before = path.read_bytes()
    with pytest.raises(InputError, match="exists"):
        write_adapter_gguf(path, factors, CONFIG)
    write_adapter_gguf(path, {"q_proj": low_rank("q_proj", [2.0] * 3)}, CONFIG, overwrite=True)
    assert path.read_bytes() != before
    model = write_gguf(tmp_path / "m.gguf", CONFIG, tiny_weights(CONFIG))
    with pytest.raises(InputError, match="no GGUF adapter"):
        write_adapter_gguf(model, factors, CONFIG, overwrite=True)
    with pytest.raises(InputError, match="is a folder"):
        write_adapter_gguf(tmp_path, factors, CONFIG, overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.gguf", "m.gguf"]


def broken(**changes):
    return {"q_proj": dataclasses.replace(low_rank("q_proj", [1.0] * 3), **changes)}


@pytest.mark.parametrize(
    ("factors", "words"),
    [
        ({}, "no factors"),
        ({"qproj": low_rank("q_proj", [1.0] * 3)}, "did you mean 'q_proj'"),
        ({"k_proj": low_rank("q_proj", [1.0] * 3)}, "k_proj"),
        ({"q_proj": low_rank("down_proj", [1.0] * 3)}, r"for \d+ -> \d+, the base has \d+ -> \d+"),
        (broken(layers=(0, 1, 7)), r"blocks \[0, 1, 7\] of a base of 3"),
        # It would lose its second row there.
        (broken(ranks=(2, 1, 2)), "entry 1 has rank 1, but a row beyond it is not 0"),
        (broken(scale=jnp.full(3, jnp.inf)), "scale holds"),
        (broken(a=jnp.full((3, 2, 32), jnp.nan)), "a holds"),
    ],
)
def test_factors_that_cannot_be_written_are_refused(tmp_path, factors, words):
    with pytest.raises(InputError, match=words):
        write_adapter_gguf(tmp_path / "a.gguf", factors, CONFIG)
    with pytest.raises(InputError, match=words):
        plan_adapter_gguf(factors, CONFIG)
    assert list(tmp_path.iterdir()) == []


def make_file(path, fields=(), tensors=None, drop=()):
    site = low_rank("o_proj", [1.0])
    values = {
        "blk.0.attn_output.weight.lora_a": np.array(site.a[0]),
        "blk.0.attn_output.weight.lora_b": np.ascontiguousarray(np.array(site.b[0]).T),
    }
    strings = {"general.type": "adapter", "adapter.type": "lora"} | dict(fields)
    writer = gguf.GGUFWriter(path, strings.pop("arch", "llama"))
    for key, value in strings.items():
        if isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_float32(key, value)
    for name, array in (values | (tensors or {})).items():
        if name not in drop:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_file_of_another_writer_is_read(tmp_path):
    # No alpha means a scale of 1; half precision is widened.
    half = np.ones((4, 64), np.float16)
    path = make_file(tmp_path / "a.gguf", tensors={"blk.0.attn_output.weight.lora_a": half,
        "blk.0.attn_output.weight.lora_b": np.ones((32, 4), np.float32)})  # fmt: skip
    found = read_adapter_gguf(path, CONFIG)["o_proj"]
    assert found.layers == (0,)
    assert found.scale == 1.0
    assert np.array_equal(found.delta()[0], np.full((64, 32), 4.0))


A, B = (f"blk.0.attn_output.weight.lora_{part}" for part in "ab")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"fields": {"general.type": "model"}}, "general.type = 'model'"),
        ({"fields": {"adapter.type": "control"}}, "adapter.type = 'control'"),
        ({"fields": {"arch": "qwen2"}}, "architecture 'qwen2'"),
        ({"fields": {"adapter.lora.alpha": float("nan")}}, "alpha = nan"),
        ({"fields": {"adapter.alora.tokens": "x"}}, "adapter.alora.tokens"),
        ({"drop": (B,)}, f"{B} is missing"),
        ({"drop": (A, B)}, "no tensors"),
        ({"tensors": {A: np.zeros((2, 63), np.float32)}}, r"lora_a \[2, 63\]"),
        ({"tensors": {A: np.zeros((3, 64), np.float32)}}, r"lora_a \[3, 64\]"),
        ({"tensors": {A: np.zeros(64, np.float32)}}, r"shape \[64\]"),
        ({"tensors": {A: np.full((2, 64), np.inf, np.float32)}}, "not finite"),
        ({"tensors": {"token_embd.weight.lora_a": np.zeros((2, 2), np.float32)}}, "token_embd"),
        ({"tensors": {"blk.9.attn_q.weight.lora_a": np.zeros((2, 2), np.float32)}}, "blk.9"),
    ],
)
def test_what_is_no_such_adapter_is_refused(tmp_path, options, words):
    with pytest.raises(InputError, match=words):
        read_adapter_gguf(make_file(tmp_path / "a.gguf", **options), CONFIG)


def test_a_file_cut_short_is_refused_at_every_length(tmp_path):
    content = make_file(tmp_path / "a.gguf").read_bytes()
    for length in [*range(0, 400, 7), len(content) // 2, len(content) - 33]:
        (tmp_path / "b.gguf").write_bytes(content[:length])
        with pytest.raises(InputError):
            read_adapter_gguf(tmp_path / "b.gguf", CONFIG)
