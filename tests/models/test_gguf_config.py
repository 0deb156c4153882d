import dataclasses

import numpy as np
import pytest

from mos_jax.errors import InputError
from mos_jax.models.config import LinearScaling, RopeScaling
from mos_jax.models.gguf_config import GGUF_ARCHITECTURES, config_from_gguf
from mos_jax.models.known import known_config
from mos_jax.models.rope import inverse_frequencies
from mos_jax.models.tiny import tiny_config


def gguf_fields(architecture="llama", **changes):
    keys = {
        "block_count": 2,
        "context_length": 512,
        "embedding_length": 64,
        "feed_forward_length": 128,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.layer_norm_rms_epsilon": 9.999999747378752e-06,
        "rope.freq_base": 10000.0,
    }
    result = {f"{architecture}.{key}": value for key, value in (keys | changes).items()}
    result |= {"general.architecture": architecture, "tokenizer.ggml.tokens": ["x"] * 320}
    return {key: value for key, value in result.items() if value is not None}


def test_llama():
    config = config_from_gguf(
        gguf_fields() | {"general.name": "tiny-random"}, ["token_embd.weight"]
    )
    assert config == dataclasses.replace(tiny_config(), name="tiny-random")
    untied = config_from_gguf(gguf_fields(**{"attention.head_count_kv": None}), ["output.weight"])
    assert (untied.tied_embeddings, untied.num_kv_heads, untied.name) == (False, 4, "llama")


def test_qwen():
    plain = dataclasses.replace(tiny_config(), name="m")
    named = {"general.name": "m"}
    qwen2 = config_from_gguf(gguf_fields("qwen2") | named, [])
    assert qwen2 == dataclasses.replace(plain, family="qwen2", qkv_bias=True)
    wide = {"attention.key_length": 32, "attention.value_length": 32}
    qwen3 = config_from_gguf(gguf_fields("qwen3", **wide) | named, [])
    assert qwen3 == dataclasses.replace(plain, family="qwen3", qk_norm=True, head_dim=32)


def gemma_fields(**changes):
    own = {"block_count": 8, "attention.sliding_window": 32, "attention.key_length": 16}
    own |= {"rope.freq_base": 1e6}
    return gguf_fields("gemma3", **(own | changes))


def test_gemma():
    config = config_from_gguf(gemma_fields(), [])
    assert (config.family, config.qk_norm, config.post_norms) == ("gemma3", True, True)
    assert (config.activation, config.embed_scale) == ("gelu_tanh", 8.0)
    # Every sixth layer is global; the rest turn by angles of their own.
    assert (config.window, config.windowed_layers) == (32, (0, 1, 2, 3, 4, 6, 7))
    assert (config.local_rope_base, config.query_scale) == (10000.0, None)


def test_gemma_states_its_windows_in_other_ways():
    every_second = config_from_gguf(gemma_fields(**{"attention.sliding_window_pattern": 2}), [])
    assert every_second.windowed_layers == (0, 2, 4, 6)
    listed = [True, False, False, True] * 2
    by_layer = config_from_gguf(
        gemma_fields(**{"attention.sliding_window_pattern": listed, "rope.freq_base_swa": 500.0}),
        [],
    )
    assert (by_layer.windowed_layers, by_layer.local_rope_base) == ((0, 3, 4, 7), 500.0)
    for change in ({"attention.sliding_window": None}, {"attention.sliding_window_pattern": 1}):
        everywhere = config_from_gguf(gemma_fields(**change), [])
        assert (everywhere.window, everywhere.windowed_layers) == (None, None)
        assert everywhere.local_rope_base is None
    with pytest.raises(InputError, match=r"sliding_window_pattern = \[True\].*each of 8"):
        config_from_gguf(gemma_fields(**{"attention.sliding_window_pattern": [True]}), [])


def test_the_largest_gemma_scales_its_queries_by_the_width():
    sizes = {"block_count": 62, "embedding_length": 5376, "attention.head_count": 32}
    config = config_from_gguf(gemma_fields(**sizes, **{"attention.key_length": 128}), [])
    assert config.query_scale == 168**-0.5


@pytest.mark.parametrize("architecture", GGUF_ARCHITECTURES)
def test_linear_scaling(architecture):
    def scaling(**changes):
        return config_from_gguf(gguf_fields(architecture, **changes), []).rope_scaling

    four = {"rope.scaling.factor": 4.0}
    assert scaling(**four) == scaling(**{"rope.scale_linear": 4.0}) == LinearScaling(4.0)
    assert scaling(**four, **{"rope.scaling.type": "linear"}) == LinearScaling(4.0)
    assert scaling(**four, **{"rope.scaling.type": "none"}) is None
    assert scaling(**{"rope.scaling.factor": 1.0}) is None


def factors_of(config):
    plain = dataclasses.replace(config, rope_scaling=None)
    return inverse_frequencies(plain) / inverse_frequencies(config)


def from_factors(config, factors):
    fields = gguf_fields(
        **{"attention.key_length": config.head_dim, "rope.freq_base": config.rope_base}
    )
    return config_from_gguf(fields, ["rope_freqs.weight"], factors).rope_scaling


@pytest.mark.parametrize("name", ["llama3.2-1b", "llama3.2-3b"])
def test_factors_of_llama3(name):
    config = known_config(name)
    assert from_factors(config, factors_of(config)) == config.rope_scaling
    assert from_factors(config, np.ones(config.head_dim // 2, np.float32)) is None


@pytest.mark.parametrize(
    "scaling", [RopeScaling(4.0, 2.0, 8.0, 4096), RopeScaling(16.0, 1.0, 3.0, 2048)]
)
def test_factors_of_other_settings_give_the_same_frequencies(scaling):
    config = dataclasses.replace(known_config("llama3.2-1b"), rope_scaling=scaling)
    read = dataclasses.replace(config, rope_scaling=from_factors(config, factors_of(config)))
    np.testing.assert_allclose(inverse_frequencies(read), inverse_frequencies(config), rtol=1e-6)


def test_other_factors_are_refused():
    config = known_config("llama3.2-1b")
    good = factors_of(config)
    for factors in (good**2, good[::-1], np.linspace(1, 8, 32), np.full(32, 3.0)):
        with pytest.raises(InputError, match="factors that Llama 3's RoPE scaling does not give"):
            from_factors(config, factors.astype(np.float32))
    for factors in (good[:-1], -good, good * np.nan, np.zeros(32)):
        with pytest.raises(InputError, match="must hold 32 positive numbers"):
            from_factors(config, factors.astype(np.float32))
    with pytest.raises(InputError, match=r"rope_freqs\.weight beside qwen2's own"):
        config_from_gguf(gguf_fields("qwen2"), [], good)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope.scaling.type": "yarn"}, "llama.rope.scaling.type = 'yarn'.*'linear' are"),
        ({"rope.scaling.factor": -4.0}, "llama.rope.scaling.factor"),
        ({"rope.scaling.attn_factor": 2.0}, "llama.rope.scaling.attn_factor = 2.0"),
        ({"expert_count": 8}, "llama.expert_count = 8"),
        ({"attention.sliding_window": 4096}, "llama.attention.sliding_window = 4096"),
        ({"rope.dimension_count": 8}, "rope.dimension_count = 8"),
        ({"attention.value_length": 32}, "attention.value_length = 32"),
        ({"attention.head_count": [4, 4]}, "attention.head_count"),
        ({"block_count": None}, "block_count is missing"),
        ({"block_count": 2**32 - 1}, "block_count = 4294967295 must be at most 65536"),
        ({"attention.layer_norm_rms_epsilon": None}, "rms_epsilon is missing"),
        ({"rope.freq_base": 1e300}, "rope_base = inf"),
        ({"tensor_data_layout": "else"}, "llama.tensor_data_layout = 'else'"),
    ],
)
def test_refuses_by_name(change, message):
    with pytest.raises(InputError, match=message):
        config_from_gguf(gguf_fields(**change), [])


def test_refuses_other_files_by_name():
    with pytest.raises(InputError, match=r"'mamba' is not supported; llama, qwen2, qwen3, gemma3"):
        config_from_gguf(gguf_fields("mamba"), [])
    with pytest.raises(InputError, match=r"split\.count = 3.*merge the parts"):
        config_from_gguf(gguf_fields() | {"split.count": 3}, [])
    with pytest.raises(InputError, match=r"general\.type = 'adapter'.*'model' is"):
        config_from_gguf(gguf_fields() | {"general.type": "adapter"}, [])
    with pytest.raises(InputError, match=r"gemma3\.final_logit_softcapping = 30\.0"):
        config_from_gguf(gguf_fields("gemma3", final_logit_softcapping=30.0), [])
