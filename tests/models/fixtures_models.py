"""Writes weights as the files the readers read, from the formats' own definitions."""

import dataclasses
import itertools
import json
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from mos_jax.models import gguf as gguf_reader
from mos_jax.models import huggingface
from mos_jax.models.config import DecoderConfig, LinearScaling, RopeScaling
from mos_jax.models.huggingface_config import config_to_huggingface
from mos_jax.models.rope import inverse_frequencies
from mos_jax.models.tokenizer import CHATML

_SAFETENSORS_TYPES = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
}


def in_file_order(config: DecoderConfig, weights: dict, names: dict[str, str]) -> dict:
    """Returns the tensors of a file, [d_out, d_in] and one per layer, by their names there."""
    tensors = {}
    for target, array in weights.items():
        array = np.asarray(array, np.float32)
        if not target.startswith("blocks/"):
            tensors[names[target]] = np.ascontiguousarray(array.T if target == "head" else array)
            continue
        for layer in range(config.num_layers):
            tensors[names[target].format(layer)] = np.ascontiguousarray(array[layer].T)
    return tensors


def huggingface_config(config: DecoderConfig) -> dict:
    """Returns a config.json of a Llama as transformers 4 writes it."""
    scaling = config.rope_scaling
    assert scaling is None or isinstance(scaling, RopeScaling)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "hidden_act": "silu",
        "mlp_bias": False,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.d_model,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.d_ff,
        "vocab_size": config.vocab_size,
        "rope_theta": config.rope_base,
        "rope_scaling": scaling
        and {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_positions,
        },
        "rms_norm_eps": config.rms_eps,
        "tie_word_embeddings": config.tied_embeddings,
        "max_position_embeddings": config.max_positions,
    }


def write_folder(
    folder: Path,
    config: DecoderConfig,
    weights: dict,
    dtype: str = "float32",
    shards: int = 1,
    extra: dict | None = None,
) -> Path:
    """Writes a Hugging Face folder; tensors go round the shards; `extra` adds or replaces some."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_to_huggingface(config)))
    offset = huggingface.norm_offset(config)
    weights = {k: v - offset if k.endswith("norm") else v for k, v in weights.items()}
    tensors = in_file_order(config, weights, huggingface.tensor_names(config)) | (extra or {})
    tensors = {k: v.astype(_SAFETENSORS_TYPES[dtype]) for k, v in tensors.items()}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    files = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    weight_map = {name: files[i % shards] for i, name in enumerate(tensors)}
    for file in files:
        save_file({k: v for k, v in tensors.items() if weight_map[k] == file}, folder / file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def as_pairs(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """What the architecture "llama" stores: of each head, rows i and i + half in turn."""
    out = np.empty_like(rows)
    width = rows.shape[0] // num_heads
    for head in range(num_heads):
        for i in range(width // 2):
            out[head * width + 2 * i] = rows[head * width + i]
            out[head * width + 2 * i + 1] = rows[head * width + width // 2 + i]
    return out


def quantise(array: np.ndarray, kind: str) -> np.ndarray:
    """Returns the bytes of `array` in type `kind`.

    Where the `gguf` package cannot quantise (the K types), these are those of random valid blocks
    about as large as `array`, and the values are what `gguf.dequantize` makes of them.
    """
    stored = gguf.GGMLQuantizationType[kind]
    try:
        return gguf.quantize(array, stored)
    except NotImplementedError:
        block, size = gguf.GGML_QUANT_SIZES[stored]
        rng = np.random.default_rng(array.size)
        rows, count = array.shape[0], array.shape[1] // block
        data = rng.integers(0, 256, (rows, count, size), np.uint8)
        # The half-precision scales of a block; the numbers they multiply are below 2^11 together.
        scales = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
        for at in scales[kind]:
            scale = rng.uniform(0.5, 1, (rows, count)) * array.std() / 256
            data[:, :, at : at + 2] = scale.astype(np.float16)[:, :, None].view(np.uint8)
        return data.reshape(rows, -1)


def gguf_numbers(config: DecoderConfig) -> dict:
    """Returns the metadata of a config, as llama.cpp's converter writes them."""
    architecture = "llama" if config.family == "mistral" else config.family
    numbers: dict = {
        "block_count": config.num_layers,
        "context_length": config.max_positions,
        "embedding_length": config.d_model,
        "feed_forward_length": config.d_ff,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "rope.freq_base": float(config.rope_base),
        "attention.layer_norm_rms_epsilon": config.rms_eps,
        "vocab_size": config.vocab_size,
        "rope.dimension_count": config.head_dim,
    }
    if architecture == "gemma3" and config.window is not None:
        numbers["attention.sliding_window"] = config.window
        windowed = config.is_windowed()
        if windowed != tuple(layer % 6 < 5 for layer in range(config.num_layers)):
            numbers["attention.sliding_window_pattern"] = list(windowed)
    if isinstance(config.rope_scaling, LinearScaling):
        numbers["rope.scaling.type"] = "linear"
        numbers["rope.scaling.factor"] = config.rope_scaling.factor
    named = {f"{architecture}.{key}": value for key, value in numbers.items()}
    return named | {"general.name": config.name}


def write_gguf(
    path: Path,
    config: DecoderConfig,
    weights: dict,
    kind: str = "F32",
    fields: dict | None = None,
    drop: tuple[str, ...] = (),
    extra: dict | None = None,
    vocabulary: bool = False,
    pre: str = "smollm",
) -> Path:
    """Writes a GGUF file with its matrices in type `kind`; norms and biases are F32.

    `fields` adds metadata (int, float, bool, str, list), `extra` adds or replaces tensors, `drop`
    leaves tensors or metadata out, and `vocabulary` writes a tokenizer of 259 tokens and one merge.
    """
    architecture = "llama" if config.family == "mistral" else config.family
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (gguf_numbers(config) | (fields or {})).items():
        if key in drop:
            continue
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        else:
            writer.add_string(key, value)
    if vocabulary:
        specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
        tokens = specials + byte_alphabet() + ["hi"]
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(tokens)
        writer.add_token_types([3] * 3 + [1] * 257)
        writer.add_token_merges(["h i"])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_chat_template(CHATML)
    tensors = in_file_order(config, weights, gguf_reader.tensor_names(config))
    if isinstance(config.rope_scaling, RopeScaling):
        plain = dataclasses.replace(config, rope_scaling=None)
        factors = inverse_frequencies(plain) / inverse_frequencies(config)
        tensors["rope_freqs.weight"] = factors
    for name, array in (tensors | (extra or {})).items():
        if name in drop:
            continue
        if architecture == "llama" and name.endswith("attn_q.weight"):
            array = as_pairs(array, config.num_heads)
        elif architecture == "llama" and name.endswith("attn_k.weight"):
            array = as_pairs(array, config.num_kv_heads)
        stored = "F32" if array.ndim == 1 else kind
        writer.add_tensor(
            name, quantise(array, stored), raw_dtype=gguf.GGMLQuantizationType[stored]
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def plain_tensors(path):
    """Every tensor in float32 through the reader of the `gguf` package."""
    return {
        tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type)
        for tensor in gguf.GGUFReader(path).tensors
    }


def as_halves(rows, heads):
    """Rows 2 i and 2 i + 1 of each head go to i and to i + half a head."""
    width = rows.shape[0] // heads
    out = np.empty_like(rows)
    for head in range(heads):
        for i in range(width):
            to = head * width + i // 2 + (i % 2) * (width // 2)
            out[to] = rows[head * width + i]
    return out


def greedy_merge(
    text: str, tokens: list[str], types: list[int], scores: list[float], prefix: bool = False
) -> list[int]:
    """SentencePiece's BPE as a loop: of all neighbours, the best pair merges, again and again.

    Control, unknown and user-defined tokens are whole first, the longest at each place; `prefix`
    puts a space before every text between them.
    """
    ids = {token: index for index, token in enumerate(tokens)}
    whole = [token for token, kind in zip(tokens, types, strict=True) if kind in (2, 3, 4)]
    normal = {t: s for t, kind, s in zip(tokens, types, scores, strict=True) if kind == 1}
    out: list[int] = []

    def flush(plain: str) -> None:
        parts = list(("▁" if prefix and plain else "") + plain.replace(" ", "▁"))
        while True:
            pairs = ["".join(pair) for pair in itertools.pairwise(parts)]
            known = [(normal[pair], -at) for at, pair in enumerate(pairs) if pair in normal]
            if not known:
                break
            at = -max(known)[1]
            parts[at : at + 2] = [pairs[at]]
        for part in parts:
            names = [part] if part in normal else [f"<0x{byte:02X}>" for byte in part.encode()]
            out.extend(ids[name] for name in names)

    start = at = 0
    while at < len(text):
        found = max((token for token in whole if text.startswith(token, at)), key=len, default="")
        if found:
            flush(text[start:at])
            out.append(ids[found])
            start = at = at + len(found)
        else:
            at += 1
    flush(text[start:])
    return out


def byte_alphabet() -> list[str]:
    """Returns the 256 characters of a byte-level vocabulary, sorted by code point."""
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())
