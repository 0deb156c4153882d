"""Every family against transformers: tiny random models, written by it and read here."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mos_jax import Sampling, generate
from mos_jax.interop.peft import export_peft
from mos_jax.models import huggingface
from mos_jax.models.config import FAMILIES
from mos_jax.models.decoder import Decoder
from mos_jax.models.huggingface_config import config_to_huggingface
from mos_jax.models.tiny import tiny_weights
from tests.models.fixtures_decoder import MOS, filled_adapter
from tests.models.fixtures_families import WINDOW, family_config
from tests.models.fixtures_models import write_folder

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore"),  # those of the other libraries
]

COMMON: dict = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
TIED = {"tie_word_embeddings": True}
LINEAR = {"rope_type": "linear", "factor": 8.0}
# Every family as published, and with each setting that its config may have besides.
MODELS: dict[str, tuple[str, dict]] = {
    "llama": ("Llama", {}),
    "llama-3.2": (
        "Llama",
        {"rope_theta": 5e5, "rope_scaling": LLAMA3, "tie_word_embeddings": True},
    ),
    "llama-linear": ("Llama", {"rope_scaling": LINEAR, "num_key_value_heads": 4}),
    "mistral": ("Mistral", {"sliding_window": WINDOW, "head_dim": 32}),
    "mistral-0.3": ("Mistral", {"sliding_window": None, "rope_theta": 1e6}),
    "qwen2": ("Qwen2", {"rope_theta": 1e6} | TIED),
    "qwen2-window": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", {"head_dim": 32, "rope_theta": 1e6} | TIED),
    "qwen3-window": (
        "Qwen3",
        {
            "head_dim": 16,
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "gemma3": (
        "Gemma3",
        {"head_dim": 32, "sliding_window": WINDOW, "sliding_window_pattern": 2},
    ),
    "gemma3-27b": (
        "Gemma3",
        {
            "head_dim": 32,
            "sliding_window": WINDOW,
            "sliding_window_pattern": 3,
            "query_pre_attn_scalar": 24,
            "rope_scaling": LINEAR,
        },
    ),
}
LENGTH = 3 * WINDOW + 1


def build(kind, fields):
    """A random model of transformers in which every weight matters."""
    config_class = "Gemma3TextConfig" if kind == "Gemma3" else f"{kind}Config"
    config = getattr(transformers, config_class)(**COMMON | fields)
    torch.manual_seed(0)
    return shake(getattr(transformers, f"{kind}ForCausalLM")(config))


def shake(model):
    """Draws the weights anew: fresh norms are alike and fresh biases 0, which hides mistakes."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1:
                centre = 1.0 if "norm" in name and "gemma" not in model.config.model_type else 0.0
                weight.copy_(centre + 0.2 * torch.randn_like(weight))
            else:
                weight.normal_(0, weight.shape[-1] ** -0.5)
    return model.eval()


@pytest.fixture(scope="module", params=MODELS)
def saved(request, tmp_path_factory):
    """A model of transformers, and the folder that it was written to."""
    model = build(*MODELS[request.param])
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return model, folder


def load(folder):
    config = huggingface.read_config(folder)
    weights = huggingface.read_weights(folder, config)
    return Decoder(config, {name: jnp.asarray(array) for name, array in weights.items()})


@jax.jit
def logits_of(decoder, tokens, positions, segments, factors=None):
    return decoder(tokens, factors, positions=positions, segments=segments)


def batch():
    """Token ids, which of them are real, and their positions; rows are padded in front."""
    lengths = (LENGTH, WINDOW - 1, LENGTH - 2)
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, COMMON["vocab_size"], (3, LENGTH)).astype(np.int32)
    real = np.array([[LENGTH - i <= n for i in range(LENGTH)] for n in lengths], np.int32)
    positions = np.maximum(np.cumsum(real, axis=1) - 1, 0).astype(np.int32)
    return np.where(real, tokens, 0), real, positions


def their_logits(model, tokens, real, positions):
    with torch.no_grad():
        return model(
            torch.from_numpy(tokens).long(),
            attention_mask=torch.from_numpy(real).long(),
            position_ids=torch.from_numpy(positions).long(),
        ).logits.numpy()


def assert_same_logits(decoder, model, factors=None):
    tokens, real, positions = batch()
    want = their_logits(model, tokens, real, positions)
    got = np.asarray(logits_of(decoder, tokens, positions, real, factors))
    assert np.abs(want[real > 0]).max() > 1
    # They differ by less than 1e-5. The two forms of GELU differ by 9e-4 here.
    np.testing.assert_allclose(got[real > 0], want[real > 0], atol=1e-4)
    np.testing.assert_allclose(
        got[:1], logits_of(decoder, tokens[:1], None, None, factors), atol=1e-4
    )


def test_logits_agree_with_and_without_padding(saved):
    model, folder = saved
    assert_same_logits(load(folder), model)


def test_the_greedy_continuation_is_the_same(saved):
    model, folder = saved
    tokens, real, _ = batch()
    prompts = [row[keep > 0].tolist() for row, keep in zip(tokens, real, strict=True)]
    got = generate(load(folder), prompts, (), Sampling.create(max_new_tokens=2 * WINDOW))
    with torch.no_grad():
        out = model.generate(
            torch.from_numpy(tokens).long(),
            attention_mask=torch.from_numpy(real).long(),
            max_new_tokens=2 * WINDOW,
            do_sample=False,
        )
    assert got == out[:, LENGTH:].tolist()


def test_a_written_config_builds_the_same_model(saved, tmp_path):
    model, folder = saved
    config = huggingface.read_config(folder)
    raw = config_to_huggingface(config)
    assert "rope_parameters" not in raw  # as version 4 has it; the saved one is of version 5
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert huggingface.config_from_huggingface(raw, config.name) == config
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    again = type(model)(theirs)
    again.load_state_dict(model.state_dict())
    inputs = batch()
    np.testing.assert_allclose(
        their_logits(again.eval(), *inputs), their_logits(model, *inputs), atol=1e-5
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_written_here_is_read_by_transformers(family, tmp_path):
    """Bare, and with an adapter that PEFT loads onto it."""
    config = family_config(family)
    folder = write_folder(tmp_path / family, config, tiny_weights(config))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    decoder = load(folder)
    assert_same_logits(decoder, model)
    factors = filled_adapter(decoder.sites, MOS).factors()
    exported = export_peft(
        tmp_path / "adapter", factors, base_name=str(folder), num_layers=config.num_layers
    )
    adapted = peft.PeftModel.from_pretrained(model, exported).eval()
    assert_same_logits(decoder, adapted, factors)


def test_the_language_model_of_a_gemma_with_an_image_encoder(tmp_path):
    vision = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
        "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    config = transformers.Gemma3Config(
        text_config=COMMON | MODELS["gemma3-27b"][1],
        vision_config=vision,
        image_token_index=300, boi_token_index=301, eoi_token_index=302,
    )  # fmt: skip
    torch.manual_seed(0)
    model = shake(transformers.Gemma3ForConditionalGeneration(config))
    model.save_pretrained(tmp_path)
    assert_same_logits(load(tmp_path), model)
