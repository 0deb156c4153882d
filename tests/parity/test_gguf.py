"""GGUF bases against transformers: tiny models of every architecture and type, and Gemma 3 270M.

The files are written with the `gguf` package's own table of names and converted as llama.cpp's
converter does, and are read back with its own reader, so that no code of the readers under test
stands on both sides.
"""

import dataclasses
import functools
import unicodedata

import gguf
import jax
import numpy as np
import pytest

from mos_jax import InputError, Sampling, generate, load_base
from mos_jax.models import huggingface
from mos_jax.models.decoder import Decoder
from mos_jax.models.gguf import open_gguf, read_config, read_weights
from mos_jax.models.packaged import assembled
from mos_jax.models.tiny import tiny_config, tiny_weights
from mos_jax.models.tokenizer import Tokenizer
from tests.models.fixtures_models import (
    as_halves,
    as_pairs,
    greedy_merge,
    in_file_order,
    plain_tensors,
    quantise,
    write_gguf,
)
from tests.parity.test_readers import TEXTS as TOKENIZER_TEXTS

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
no_init_weights = pytest.importorskip("transformers.initialization").no_init_weights
pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore"),  # those of the other libraries
]

SIZES = {
    "vocab_size": 320,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "head_dim": 64,
    "eos_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
}  # fmt: skip
THETA = {"rope_type": "default", "rope_theta": 10000.0}
WINDOW = 6
# Config, model, and what the architecture states beyond the common keys.
MODELS = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {"rope_parameters": LLAMA3}, {}),
    "mistral": (  # its file cannot state a window
        "MistralConfig", "MistralForCausalLM",
        {"rope_parameters": THETA, "sliding_window": None}, {},
    ),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {"rope_parameters": THETA}, {}),
    "qwen3": (
        "Qwen3Config", "Qwen3ForCausalLM",
        {"rope_parameters": THETA, "head_dim": 128, "tie_word_embeddings": True}, {},
    ),
    "gemma3": (
        "Gemma3TextConfig", "Gemma3ForCausalLM",
        {
            "num_hidden_layers": 7,
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 64,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": THETA,
            },
        },
        {
            "gemma3.attention.sliding_window": WINDOW,
            "gemma3.rope.scaling.type": "linear",
            "gemma3.rope.scaling.factor": 8.0,
        },
    ),
}  # fmt: skip
KINDS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q4_K", "Q6_K")


@functools.cache
def reference(family):
    """A random model by transformers, norms and biases made to matter."""
    config_class, model_class, fields, _ = MODELS[family]
    config = getattr(transformers, config_class)(**(SIZES | fields))
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(config).float().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1:
                weight.add_(0.2 * torch.randn_like(weight))
            elif "embed_tokens" not in name:
                weight.mul_(2)
    return model


def write(path, family, kind):
    """Writes transformers' model as llama.cpp's converter does."""
    model, stated = reference(family), MODELS[family][3]
    c = model.config
    architecture = "llama" if family == "mistral" else family
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_vocab_size(c.vocab_size)
    head_dim = getattr(c, "head_dim", c.hidden_size // c.num_attention_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    rope = c.rope_parameters
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    for key, value in stated.items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add[type(value)](key, value)
    arch = gguf.MODEL_ARCH[architecture.upper()]
    names = gguf.get_tensor_name_map(arch, c.num_hidden_layers)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and c.tie_word_embeddings:
            continue
        array = weight.numpy()
        if architecture == "llama" and name.endswith("q_proj.weight"):
            array = as_pairs(array, c.num_attention_heads)
        elif architecture == "llama" and name.endswith("k_proj.weight"):
            array = as_pairs(array, c.num_key_value_heads)
        elif architecture == "gemma3" and name.endswith("norm.weight"):
            array = array + 1
        stored = "F32" if array.ndim == 1 else kind
        to = names.get_name(name, try_suffixes=(".weight", ".bias"))
        kind_of = gguf.GGMLQuantizationType[stored]
        writer.add_tensor(to, quantise(np.ascontiguousarray(array), stored), raw_dtype=kind_of)
    if rope.get("rope_type") == "llama3":
        plain = 1 / rope["rope_theta"] ** (np.arange(0, head_dim, 2) / head_dim)
        factors = plain / model.model.rotary_emb.inv_freq.numpy()
        writer.add_tensor("rope_freqs.weight", factors.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def filled(path, family):
    """transformers' model with what a file holds, by the `gguf` package's reader."""
    original = reference(family)
    c = original.config
    architecture = "llama" if family == "mistral" else family
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], c.num_hidden_layers)
    tensors = plain_tensors(path)
    model = type(original)(c).float().eval()
    state = {}
    for name in model.state_dict():
        if name == "lm_head.weight" and c.tie_word_embeddings:
            continue
        array = tensors[names.get_name(name, try_suffixes=(".weight", ".bias"))]
        if architecture == "llama" and name.endswith("q_proj.weight"):
            array = as_halves(array, c.num_attention_heads)
        elif architecture == "llama" and name.endswith("k_proj.weight"):
            array = as_halves(array, c.num_key_value_heads)
        elif architecture == "gemma3" and name.endswith("norm.weight"):
            array = array - 1
        state[name] = torch.from_numpy(np.array(array, np.float32))
    missing, extra = model.load_state_dict(state, strict=False)
    assert set(missing) <= {"lm_head.weight"}
    assert not extra
    model.tie_weights()
    return model


@jax.jit
def run(model, tokens, positions, segments):
    return model(tokens, positions=positions, segments=segments)


def padded(rows):
    """Tokens, which of them are real, and their positions; padding stands in front."""
    width = max(map(len, rows))
    tokens, real = np.zeros((2, len(rows), width), np.int32)
    for i, row in enumerate(rows):
        tokens[i, width - len(row) :] = row
        real[i, width - len(row) :] = 1
    return tokens, real, np.maximum(np.cumsum(real, axis=1) - 1, 0).astype(np.int32)


def assert_same_logits(decoder, model, rows, atol=1e-3):
    tokens, real, positions = padded(rows)
    with torch.no_grad():
        want = model(
            torch.from_numpy(tokens).long(),
            attention_mask=torch.from_numpy(real).long(),
            position_ids=torch.from_numpy(positions).long(),
        ).logits.numpy()
    got = np.asarray(run(decoder, tokens, positions, real))
    np.testing.assert_allclose(got[real > 0], want[real > 0], atol=atol)
    assert want[real > 0].std() > 0.1  # a model that says something


def greedy(model, prompt, length):
    with torch.no_grad():
        out = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=length,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    return out[0, len(prompt) :].tolist()


def rows_of(vocabulary, lengths=(11, 4, 17)):
    rng = np.random.default_rng(1)
    return [rng.integers(1, vocabulary, length).tolist() for length in lengths]


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_tiny_models(tmp_path, family, kind):
    path = write(tmp_path / "m.gguf", family, kind)
    config = read_config(path)
    decoder = Decoder(config, read_weights(path, config))
    model = filled(path, family)
    assert_same_logits(decoder, model, rows_of(320))
    if kind == "F32":
        assert_same_logits(decoder, reference(family), rows_of(320))
    if kind == "Q4_K":
        prompts = rows_of(320, (9, 3))
        got = generate(decoder, prompts, [], Sampling.create(max_new_tokens=12))
        assert got == [greedy(model, prompt, 12) for prompt in prompts]


@pytest.mark.parametrize("family", MODELS)
def test_file_and_folder_state_one_config(tmp_path, family):
    reference(family).save_pretrained(tmp_path / "m")
    of_folder = huggingface.read_config(tmp_path / "m")
    of_file = read_config(write(tmp_path / "m.gguf", family, "F32"))
    assert of_file.architecture() == of_folder.architecture()


@pytest.mark.parametrize("family", [family for family in MODELS if family != "llama"])
def test_transformers_reads_the_same_file_alike(tmp_path, family):
    # Without Llama 3's factors, which transformers passes over.
    path = write(tmp_path / "m.gguf", family, "Q8_0")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, local_files_only=True, dtype=torch.float32
    ).eval()
    config = read_config(path)
    if family == "gemma3":
        # Nor does it read a linear scaling, and it takes the scale of queries of 256 dimensions.
        config = dataclasses.replace(config, rope_scaling=None, query_scale=256**-0.5)
    assert_same_logits(Decoder(config, read_weights(path, config)), model, rows_of(320))


@pytest.fixture(scope="module")
def gemma():
    try:
        return load_base("gemma3-270m")
    except InputError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def gemma_reference(gemma):
    """transformers' Gemma 3 270M, filled from this base's own arrays."""
    c = gemma.config
    config = transformers.Gemma3TextConfig(
        vocab_size=c.vocab_size,
        hidden_size=640,
        intermediate_size=2048,
        num_hidden_layers=18,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        sliding_window=512,
        query_pre_attn_scalar=256,
        max_position_embeddings=32768,
    )
    with no_init_weights():
        model = transformers.Gemma3ForCausalLM(config).eval()
    tensors = in_file_order(c, gemma.model.weights, huggingface.tensor_names(c))
    state = {
        name: torch.from_numpy(array - 1 if name.endswith("norm.weight") else array.copy())
        for name, array in tensors.items()
    }
    missing, extra = model.load_state_dict(state, strict=False)
    assert set(missing) <= {"lm_head.weight"}
    assert not extra
    model.tie_weights()
    return model


TEXTS = ["The capital of France is", "Once upon a time, there was", "def fib(n):\n    if n <"]


def gemma_prompts(gemma):
    return [gemma.tokenizer.encode(gemma.tokenizer.text_start + text) for text in TEXTS]


def test_gemma_logits_with_padding_in_front(gemma, gemma_reference):
    assert_same_logits(gemma.model, gemma_reference, gemma_prompts(gemma))


def test_gemma_logits_beyond_the_window(gemma, gemma_reference):
    tokens = np.array([rows_of(gemma.config.vocab_size, (530,))[0]], np.int32)
    with torch.no_grad():
        want = gemma_reference(torch.from_numpy(tokens).long(), logits_to_keep=4).logits.numpy()
    got = jax.jit(lambda m, t: m.logits(m.hidden(t)[:, -4:]))(gemma.model, tokens)
    np.testing.assert_allclose(got, want, atol=1e-3)


def test_gemma_greedy_text(gemma, gemma_reference):
    prompts = gemma_prompts(gemma)[:2]
    got = generate(gemma.model, prompts, [], Sampling.create(max_new_tokens=10))
    assert got == [greedy(gemma_reference, prompt, 10) for prompt in prompts]
    # It is the model before any instruction: it goes on with a text.
    assert "France" in gemma.tokenizer.decode(got[0])


def test_gemma_tokenizer_is_the_greedy_merge(gemma):
    tokenizer = gemma.tokenizer
    assert (tokenizer.end_of_turn, tokenizer.pad, tokenizer.bos) == (1, 0, 2)
    assert (tokenizer.text_start, tokenizer.has_chat_template) == ("<bos>", False)
    fields = open_gguf(assembled()).fields
    keys = ("tokens", "token_type", "scores")
    tokens, types, scores = (fields[f"tokenizer.ggml.{key}"] for key in keys)
    for text in (*TOKENIZER_TEXTS, *TEXTS):
        assert tokenizer.encode(text) == greedy_merge(text, tokens, types, scores), text
        if "<bos>" not in text:
            assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("pre", ["llama-bpe", "qwen2", "gpt-2"])
def test_byte_level_tokenizers_are_those_of_transformers(tmp_path, pre):
    config = tiny_config()
    path = write_gguf(tmp_path / "m.gguf", config, tiny_weights(config), vocabulary=True, pre=pre)
    theirs = transformers.AutoTokenizer.from_pretrained(
        tmp_path, gguf_file=path.name, local_files_only=True
    )
    ours = Tokenizer.from_gguf(path)
    split, other = ours._backend.pre_tokenizer, theirs.backend_tokenizer.pre_tokenizer
    for text in (*TOKENIZER_TEXTS, *TEXTS, "WE'LL pay 12345 \r\n\n  now  "):
        assert split.pre_tokenize_str(text) == other.pre_tokenize_str(text), text
        ids = theirs.encode(text, add_special_tokens=False)
        if pre != "qwen2" or unicodedata.is_normalized("NFC", text):  # theirs composes nothing
            assert ours.encode(text) == ids, text
        assert ours.decode(ids, skip_special=False) == theirs.decode(ids), text
