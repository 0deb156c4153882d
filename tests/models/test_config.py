import dataclasses

import pytest

from mos_jax.errors import InputError
from mos_jax.models.config import SITES, DecoderConfig, LinearScaling, RopeScaling
from mos_jax.models.huggingface_config import config_from_huggingface
from mos_jax.models.known import KNOWN_CONFIGS, known_config
from mos_jax.models.tiny import tiny_config
from tests.models.fixtures_models import huggingface_config


def fields(**changes):
    return dataclasses.asdict(tiny_config()) | {"rope_scaling": None} | changes


@pytest.mark.parametrize(
    ("name", "per_rank", "parameters"),
    [
        ("llama2-7b", 2_498_560, 6_738_415_616),
        ("llama2-13b", 3_911_680, 13_015_864_320),
        ("llama2-70b", 12_943_360, 68_976_648_192),
        ("llama3-8b", 2_621_440, 8_030_261_248),
        ("llama3.2-3b", 1_519_616, 3_212_749_824),
        ("llama3.2-1b", 704_512, 1_235_814_400),
        ("llama3.1-8b", 2_621_440, 8_030_261_248),
        ("smollm2-135m", 305_280, 134_515_008),
        ("smollm2-360m", 542_720, 361_821_120),
        ("smollm2-1.7b", 1_130_496, 1_711_376_384),
        ("mistral-7b-v0.1", 2_621_440, 7_241_732_096),
        ("mistral-7b-v0.3", 2_621_440, 7_248_023_552),
        ("qwen2.5-0.5b", 549_888, 494_032_768),
        ("qwen2.5-1.5b", 1_154_048, 1_543_714_304),
        ("qwen2.5-7b", 2_523_136, 7_615_616_512),
        ("qwen3-0.6b", 630_784, 596_049_920),
        ("qwen3-1.7b", 1_089_536, 1_720_574_976),
        ("qwen3-8b", 2_727_936, 8_190_735_360),
        ("gemma3-270m", 237_312, 268_098_176),
        ("gemma3-1b", 815_360, 999_885_952),
    ],
)
def test_known_configs_have_the_published_sizes(name, per_rank, parameters):
    config = known_config(name)
    shapes = config.site_shapes()
    assert tuple(shapes) == SITES
    assert sum(layers * (d_in + d_out) for layers, d_in, d_out in shapes.values()) == per_rank
    assert config.num_parameters == parameters
    assert DecoderConfig.create(**vars(config)) == config


def test_unknown_name_suggests_the_nearest():
    with pytest.raises(InputError, match=r"did you mean 'llama2-7b'"):
        known_config("llama2-7B")


def test_weight_shapes_of_an_untied_model():
    config = DecoderConfig.create(**fields(tied_embeddings=False, head_dim=8))
    shapes = config.weight_shapes()
    assert shapes["head"] == (64, 320)
    assert shapes["blocks/q_proj"] == (2, 64, 32)
    assert shapes["blocks/o_proj"] == (2, 32, 64)
    assert shapes["blocks/down_proj"] == (2, 128, 64)
    assert "head" not in tiny_config().weight_shapes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 0}, "num_layers = 0"),
        ({"num_layers": 2**30}, "num_layers = 1073741824 must be at most 65536"),
        ({"head_dim": 10**400}, "head_dim = 1000000000"),
        ({"rms_eps": 10**400}, "must be a finite number above 0"),
        ({"d_model": 64.0}, "d_model = 64.0"),
        ({"vocab_size": True}, "vocab_size = True"),
        ({"head_dim": 15}, "head_dim = 15 must be even"),
        ({"num_kv_heads": 3}, "num_kv_heads = 3"),
        ({"rope_base": float("inf")}, "rope_base = inf"),
        ({"rms_eps": 0.0}, "rms_eps = 0.0"),
        ({"rms_eps": "1e-5"}, "rms_eps = '1e-5'"),
        ({"tied_embeddings": 1}, "tied_embeddings = 1"),
        ({"rope_scaling": {"factor": 8}}, "must be a RopeScaling"),
        ({"rope_scaling": LinearScaling(0.0)}, "rope_scaling.factor = 0.0"),
        ({"family": "qwen"}, "did you mean 'qwen"),
        ({"activation": "relu"}, "activation = 'relu' is unknown"),
        ({"qkv_bias": 1}, "qkv_bias = 1 must be true or false"),
        ({"qk_norm": None}, "qk_norm = None must be true or false"),
        ({"post_norms": "no"}, "post_norms = 'no' must be true or false"),
        ({"embed_scale": 0}, "embed_scale = 0"),
        ({"query_scale": -1.0}, "query_scale = -1.0"),
        ({"window": 0}, "window = 0"),
        ({"windowed_layers": (0,)}, "window is None"),
        ({"local_rope_base": 1e4}, "window is None"),
        ({"window": 4, "local_rope_base": "1"}, "local_rope_base = '1'"),
        ({"window": 4, "windowed_layers": ()}, "at least one"),
        ({"window": 4, "windowed_layers": (2,)}, "from 0 to 1"),
        ({"window": 4, "windowed_layers": (1, 0)}, "ascending"),
        ({"window": 4, "windowed_layers": [0]}, "must be a tuple"),
        ({"rope_scaling": RopeScaling(8.0, 4.0, 4.0, 8192)}, "must be less than"),
        ({"rope_scaling": RopeScaling(-1.0, 1.0, 4.0, 8192)}, "rope_scaling.factor = -1.0"),
        ({"d_mode": 3}, "did you mean 'd_model'"),
    ],
)
def test_create_refuses(change, message):
    with pytest.raises(InputError, match=message.replace(".", r"\.")):
        DecoderConfig.create(**fields(**change))


def test_windowed_layers():
    assert tiny_config().is_windowed() == (False, False)
    one = DecoderConfig.create(**fields(window=4, windowed_layers=(1,)))
    assert one.is_windowed() == (False, True)
    every = DecoderConfig.create(**fields(window=4, windowed_layers=(0, 1)))
    assert every == DecoderConfig.create(**fields(window=4))
    assert every.is_windowed() == (True, True)


def test_what_none_says_becomes_none():
    said = {"query_scale": 16**-0.5, "window": 4, "local_rope_base": 10000.0}
    config = DecoderConfig.create(**fields(**said))
    assert (config.query_scale, config.local_rope_base) == (None, None)
    scaled = DecoderConfig.create(**fields(**said, rope_scaling=LinearScaling(8.0)))
    assert scaled.local_rope_base == 10000.0


def test_weights_of_the_families_parts():
    parts = {"qkv_bias": True, "qk_norm": True, "post_norms": True}
    shapes = DecoderConfig.create(**fields(**parts)).weight_shapes()
    new = {name: shapes[name] for name in shapes.keys() - tiny_config().weight_shapes().keys()}
    norm, head = (2, 64), (2, 16)
    assert new == {
        "blocks/attn_post_norm": norm,
        "blocks/mlp_post_norm": norm,
        "blocks/q_norm": head,
        "blocks/k_norm": head,
        "blocks/q_bias": (2, 64),
        "blocks/k_bias": (2, 32),
        "blocks/v_bias": (2, 32),
    }


def test_architecture_leaves_out_names_and_what_is_at_its_default():
    plain = tiny_config().architecture()
    assert list(plain) == [
        *"num_layers d_model num_heads num_kv_heads head_dim d_ff vocab_size".split(),
        *"rope_base rms_eps tied_embeddings max_positions rope_scaling".split(),
    ]
    other = DecoderConfig.create(**fields(name="other", family="mistral"))
    assert other.architecture() == plain
    assert other.architecture() != DecoderConfig.create(**fields(window=4)).architecture()


def test_create_names_a_missing_field():
    given = fields()
    del given["d_ff"]
    with pytest.raises(InputError, match="'d_ff' is missing"):
        DecoderConfig.create(**given)


@pytest.mark.parametrize("name", [n for n, c in KNOWN_CONFIGS.items() if c.family == "llama"])
def test_huggingface_round_trip(name):
    config = KNOWN_CONFIGS[name]
    assert config_from_huggingface(huggingface_config(config), name) == config


def test_huggingface_rope_parameters_of_transformers_5():
    config = known_config("llama3.2-1b")
    raw = huggingface_config(config)
    raw["rope_parameters"] = raw.pop("rope_scaling") | {"rope_theta": raw.pop("rope_theta")}
    assert config_from_huggingface(raw, config.name) == config
    raw["rope_parameters"] = {"rope_theta": 7.0, "rope_type": "default"}
    plain = config_from_huggingface(raw)
    assert (plain.rope_base, plain.rope_scaling) == (7.0, None)


def test_huggingface_defaults_of_absent_fields():
    raw = huggingface_config(tiny_config())
    for key in ("num_key_value_heads", "head_dim", "rope_theta", "rope_scaling", "rms_norm_eps"):
        del raw[key]
    del raw["tie_word_embeddings"], raw["max_position_embeddings"], raw["architectures"]
    config = config_from_huggingface(raw)
    assert (config.name, config.num_kv_heads, config.head_dim) == ("llama", 4, 16)
    assert (config.rope_base, config.rms_eps) == (10000.0, 1e-6)
    assert (config.tied_embeddings, config.max_positions) == (False, 2048)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "phi3"}, "model_type = 'phi3'"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"mlp_bias": True}, "mlp_bias = True"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"pretraining_tp": 2}, "pretraining_tp = 2"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope type 'dynamic'"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor is missing"),
        ({"rope_scaling": {"rope_type": ["yarn"]}}, "rope type"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor is missing"),
        ({"rope_scaling": {"type": "default", "mscale": 1.0}}, "'mscale'"),
        ({"rope_scaling": "llama3"}, "rope_scaling = 'llama3'"),
        ({"rope_parameters": {"rope_theta": 2.0}}, "rope_theta = 10000.0 disagrees"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_theta": "big"}, "rope_theta = 'big'"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers = '2'"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"head_dim": None, "num_attention_heads": 5}, "multiple of 5"),
    ],
)
def test_huggingface_refuses_by_name(change, message):
    with pytest.raises(InputError, match=message):
        config_from_huggingface(huggingface_config(tiny_config()) | change)
