"""What config.json says of each family; Llama's own fields are in test_config.py."""

import re

import pytest

from mos_jax.errors import InputError
from mos_jax.models.config import FAMILIES, DecoderConfig, LinearScaling, RopeScaling
from mos_jax.models.huggingface_config import config_from_huggingface, config_to_huggingface
from mos_jax.models.known import KNOWN_CONFIGS
from tests.models.fixtures_families import FAMILY_FIELDS, family_config

# As published, without the fields that say nothing of the computation.
GEMMA_270M = {
    "_sliding_window_pattern": 6,
    "architectures": ["Gemma3ForCausalLM"],
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 640,
    "intermediate_size": 2048,
    "layer_types": ([*["sliding_attention"] * 5, "full_attention"] * 3),
    "max_position_embeddings": 32768,
    "model_type": "gemma3_text",
    "num_attention_heads": 4,
    "num_hidden_layers": 18,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000.0,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": 512,
    "use_bidirectional_attention": False,
    "vocab_size": 262144,
}
GEMMA_4B = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "model_type": "gemma3",
    "mm_tokens_per_image": 256,
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
}
MISTRAL = {
    "architectures": ["MistralForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 21,
    "model_type": "qwen2",
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN3 = QWEN2 | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 128}


def read(raw, **changes):
    raw = raw | changes
    return config_from_huggingface({k: v for k, v in raw.items() if v != "absent"}, "m")


@pytest.mark.parametrize(
    ("raw", "name"),
    [(GEMMA_270M, "gemma3-270m"), (MISTRAL, "mistral-7b-v0.1"), (QWEN2, "qwen2.5-0.5b")],
)
def test_published_files_are_the_known_sizes(raw, name):
    assert config_from_huggingface(raw, name) == KNOWN_CONFIGS[name]


@pytest.mark.parametrize("name", KNOWN_CONFIGS)
def test_known_sizes_survive_a_round_trip(name):
    config = KNOWN_CONFIGS[name]
    assert config_from_huggingface(config_to_huggingface(config), name) == config


@pytest.mark.parametrize("family", FAMILIES)
def test_families_survive_a_round_trip(family):
    config = family_config(family)
    assert config_from_huggingface(config_to_huggingface(config), family) == config
    assert config.family == family


def in_version_5(raw):
    """Moves the settings of RoPE to where transformers 5 writes them."""
    raw = dict(raw)
    scaling = raw.pop("rope_scaling", None) or {"rope_type": "default"}
    table = scaling | {"rope_theta": raw.pop("rope_theta")}
    if "rope_local_base_freq" in raw:
        local = {"rope_type": "default", "rope_theta": raw.pop("rope_local_base_freq")}
        table = {"full_attention": table, "sliding_attention": local}
    return raw | {"rope_parameters": table}


@pytest.mark.parametrize("family", FAMILIES)
def test_both_versions_of_transformers_are_read(family):
    config = family_config(family, rope_base=5e5)
    raw = in_version_5(config_to_huggingface(config))
    assert "rope_theta" not in raw
    assert config_from_huggingface(raw, family) == config


def test_the_language_model_of_a_gemma_with_an_image_encoder():
    config = config_from_huggingface(GEMMA_4B, "gemma3-4b")
    assert config == DecoderConfig.create(
        name="gemma3-4b", family="gemma3", num_layers=34, d_model=2560, num_heads=8,
        num_kv_heads=4, head_dim=256, d_ff=10240, vocab_size=262208, rope_base=1e6, rms_eps=1e-6,
        tied_embeddings=True, max_positions=131072, rope_scaling=LinearScaling(8.0), qk_norm=True,
        post_norms=True, activation="gelu_tanh", embed_scale=2560**0.5, window=1024,
        windowed_layers=tuple(k for k in range(34) if k % 6 != 5), local_rope_base=1e4,
    )  # fmt: skip
    # The published count leaves out the last 64 rows of the embedding, which no token has.
    assert config.num_parameters == 3_880_099_328 + 64 * 2560


def test_which_layers_have_a_window():
    def windowed(raw, **changes):
        config = read(raw, num_hidden_layers=4, **changes)
        return config.window, config.is_windowed()

    on, off = True, False
    used = {"use_sliding_window": True, "sliding_window": 8}
    assert windowed(MISTRAL) == (4096, (on,) * 4)
    assert windowed(MISTRAL, sliding_window="absent") == (4096, (on,) * 4)
    assert windowed(MISTRAL, sliding_window=None) == (None, (off,) * 4)
    for raw in (QWEN2, QWEN3):
        assert windowed(raw) == (None, (off,) * 4)
        assert windowed(raw, **used, max_window_layers=3) == (8, (off, off, off, on))
        assert windowed(raw, **used, max_window_layers=0) == (8, (on,) * 4)
        assert windowed(raw, **used, max_window_layers=4) == (None, (off,) * 4)
        kinds = ["sliding_attention", "full_attention"] * 2
        assert windowed(raw, **used, layer_types=kinds) == (8, (on, off, on, off))
    bare = {"layer_types": "absent", "_sliding_window_pattern": "absent"}
    assert windowed(GEMMA_270M, **bare) == (512, (on,) * 4)
    assert windowed(GEMMA_270M, **bare, sliding_window_pattern=2) == (512, (on, off, on, off))
    assert windowed(GEMMA_270M, layer_types=kinds) == (512, (on, off, on, off))
    assert windowed(GEMMA_270M, layer_types=["full_attention"] * 4) == (None, (off,) * 4)


def test_absent_fields_mean_what_they_do_in_transformers():
    absent = dict.fromkeys(("num_key_value_heads", "rope_theta", "rms_norm_eps"), "absent")
    absent |= {"max_position_embeddings": "absent", "tie_word_embeddings": "absent"}
    for raw, positions in ((MISTRAL, 131072), (QWEN2, 32768), (QWEN3, 32768), (GEMMA_270M, 131072)):
        config = read(raw, **absent, num_attention_heads=32, hidden_size=128, head_dim="absent")
        gemma = raw is GEMMA_270M
        assert config.num_kv_heads == {"qwen2": 32, "qwen3": 32, "mistral": 8}.get(config.family, 4)
        assert config.head_dim == {"qwen3": 128, "gemma3": 256}.get(config.family, 4)
        assert (config.rope_base, config.rms_eps) == (1e6 if gemma else 1e4, 1e-6)
        assert (config.max_positions, config.tied_embeddings) == (positions, gemma)


def test_the_scale_of_gemmas_queries():
    assert read(GEMMA_270M).query_scale is None  # 256 is the width of a head
    assert read(GEMMA_270M, query_pre_attn_scalar=168).query_scale == 168**-0.5


def test_linear_scaling_is_read_in_every_family():
    scaling = {"rope_type": "linear", "factor": 4.0}
    for raw in (MISTRAL, QWEN2, QWEN3, GEMMA_270M):
        assert read(raw, rope_scaling=scaling).rope_scaling == LinearScaling(4.0)


@pytest.mark.parametrize("raw", [MISTRAL, QWEN2, QWEN3, GEMMA_270M], ids=lambda r: r["model_type"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "phi3"}, "only llama, mistral, qwen2, qwen3, gemma3_text, gemma3 are"),
        ({"model_type": ["qwen2"]}, "model_type = .* is not supported"),
        ({"architectures": ["XForSequenceClassification"]}, "architectures"),
        ({"hidden_act": "relu"}, "hidden_act = 'relu'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"mlp_bias": True}, "mlp_bias = True"),
        ({"use_mrope": True}, "use_mrope = True"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope type 'yarn'"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 4, "beta": 1}}, "'beta'"),
        ({"num_hidden_layers": "absent"}, "num_hidden_layers is missing"),
        ({"num_hidden_layers": 2**31}, "num_hidden_layers = 2147483648 must be at most"),
        ({"num_hidden_layers": 2**30}, "num_hidden_layers = 1073741824 must be at most"),
        ({"hidden_size": 10**400}, "hidden_size = 1000"),
        ({"head_dim": 2.5}, "head_dim = 2.5"),
        ({"layer_types": ["full_attention"]}, "layer_types = .* for each"),
        ({"layer_types": "full"}, "layer_types = 'full'"),
    ],
)
def test_every_family_refuses_by_name(raw, change, message):
    with pytest.raises(InputError, match=message):
        read(raw, **change)


@pytest.mark.parametrize(
    ("raw", "change", "message"),
    [
        (MISTRAL, {"attention_bias": True}, "attention_bias = True"),
        (MISTRAL, {"sliding_window": "4096"}, "sliding_window = '4096'"),
        (MISTRAL, {"layer_types": ["full_attention"] * 32}, "all alike"),
        (QWEN3, {"attention_bias": True}, "attention_bias = True"),
        (QWEN2, {"use_sliding_window": 1}, "use_sliding_window = 1"),
        (QWEN2, {"layer_types": ["sliding_attention"] * 24}, "no sliding_window is set and used"),
        (QWEN2, {"use_sliding_window": True, "max_window_layers": -1}, "max_window_layers = -1"),
        (GEMMA_270M, {"hidden_activation": "gelu"}, "hidden_activation = 'gelu'"),
        (GEMMA_270M, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0"),
        (GEMMA_270M, {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar = 0"),
        (GEMMA_270M, {"query_pre_attn_scalar": 10**400}, "query_pre_attn_scalar = 1000"),
        (GEMMA_270M, {"sliding_window": None}, "no sliding_window is set"),
        (GEMMA_270M, {"rope_local_base_freq": "x"}, "rope_local_base_freq = 'x'"),
        (GEMMA_270M, {"rope_parameters": {"rope_type": "default"}}, "rope_parameters.rope_type"),
        (
            GEMMA_270M,
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
            "scaled RoPE in windowed layers",
        ),
        (
            GEMMA_270M,
            {"rope_parameters": {"full_attention": {"rope_theta": 2.0}}},
            "rope_theta = 1000000.0 disagrees",
        ),
        (GEMMA_4B, {"text_config": None}, "text_config"),
        (GEMMA_4B, {"text_config": {"model_type": "llama"}}, "'gemma3_text'"),
        (GEMMA_4B, {"architectures": ["Gemma3Model"]}, "architectures"),
        (GEMMA_4B, {"quantization_config": {"bits": 4}}, "quantization_config"),
    ],
)
def test_a_family_refuses_by_name(raw, change, message):
    with pytest.raises(InputError, match=message.replace(".", r"\.")):
        read(raw, **change)


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("llama", {"window": 4}, "cannot say window = 4"),
        ("llama", {"qkv_bias": True}, "cannot say qkv_bias = True"),
        ("mistral", {"windowed_layers": (0,)}, "windowed_layers = (0,)"),
        ("qwen2", {"local_rope_base": 7.0}, "local_rope_base = 7.0"),
        ("qwen3", {"embed_scale": 8.0}, "embed_scale = 8.0"),
        ("gemma3", {"embed_scale": 7.0}, "embed_scale = 7.0"),
        ("gemma3", {"query_scale": 0.3}, "query_scale = 0.3"),
        ("gemma3", {"query_scale": 1e-200}, "query_scale = 1e-200"),
        ("gemma3", {"query_scale": 1e200}, "query_scale = 1e+200"),
        ("gemma3", {"local_rope_base": None}, "local_rope_base = None"),
        ("gemma3", {"activation": "silu"}, "activation = 'silu'"),
    ],
)
def test_what_a_familys_files_cannot_say_is_not_written(family, change, message):
    with pytest.raises(InputError, match=re.escape(message)):
        config_to_huggingface(family_config(family, **change))


def test_written_files_have_no_settings_of_other_families():
    keys = {family: set(config_to_huggingface(family_config(family))) for family in FAMILY_FIELDS}
    assert "sliding_window" not in keys["llama"]
    assert "hidden_act" not in keys["gemma3"]
    assert {"use_sliding_window", "max_window_layers"} <= keys["qwen2"] & keys["qwen3"]
    assert "query_pre_attn_scalar" in keys["gemma3"] - keys["qwen3"]
    scaling = config_to_huggingface(family_config("llama"))["rope_scaling"]
    assert scaling["rope_type"] == "llama3"
    assert RopeScaling(*list(scaling.values())[1:]) == FAMILY_FIELDS["llama"]["rope_scaling"]
