"""The readers under test, one entry each: good files, the reader, and a second opinion.

A second opinion is other code that reads the same files, as plainly as can be: what a reader
accepts must be what the files say, whatever was done to them.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import jax
import ml_dtypes
import numpy as np
import tokenizers
from safetensors.numpy import save_file

from mos_jax.adapters.lora import LoRAConfig
from mos_jax.adapters.methods import create_adapter
from mos_jax.adapters.mos import MoSConfig
from mos_jax.adapters.sites import SiteShape
from mos_jax.adapters.storage import adapter_arrays, load_adapter, save_adapter
from mos_jax.adapters.vb_lora import VBLoRAConfig
from mos_jax.adapters.vera import VeRAConfig
from mos_jax.errors import InputError
from mos_jax.interop.adapter_gguf import read_adapter_gguf, write_adapter_gguf
from mos_jax.interop.detect import detect
from mos_jax.interop.peft import export_peft, read_peft_factors
from mos_jax.interop.peft_import import import_peft
from mos_jax.interop.peft_native import export_native
from mos_jax.models import gguf as gguf_reader
from mos_jax.models import huggingface
from mos_jax.models.base import Base, load_base
from mos_jax.models.config import DecoderConfig, RopeScaling
from mos_jax.models.tiny import tiny_config, tiny_weights
from mos_jax.models.tokenizer import CHATML, Tokenizer
from tests.adapters.fixtures_adapters import randomised
from tests.fuzz.mutations import mutate_bytes, mutate_files, mutate_json
from tests.fuzz.structured import mutate_gguf, mutate_safetensors
from tests.fuzz.target import Target
from tests.interop.fixtures_folders import SITES as PEFT_SITES
from tests.interop.fixtures_folders import write_peft
from tests.models.fixtures_families import family_config
from tests.models.fixtures_models import write_folder, write_gguf


def _config(**changes: Any) -> DecoderConfig:
    small = {"d_model": 32, "num_heads": 2, "num_kv_heads": 1, "d_ff": 64, "vocab_size": 40}
    return dataclasses.replace(tiny_config(), **(small | {"name": "model"} | changes))


def same(what: str, found: Any, wanted: Any) -> None:
    """Asserts that two numbers, texts or arrays are equal."""
    assert np.array_equal(np.asarray(found), np.asarray(wanted)), f"{what}: {found!r} != {wanted!r}"


# ---- GGUF


def _gguf(kind: str, changes: Mapping[str, Any], **options: Any) -> Callable[[Path], Any]:
    config = _config(**changes)
    return lambda folder: write_gguf(
        folder / "model.gguf", config, tiny_weights(config), kind, **options
    )


def _small(family: str, **changes: Any) -> DecoderConfig:
    """A config with all that the family adds to Llama."""
    narrow = {"num_layers": 2, "vocab_size": 40, "d_model": 32, "d_ff": 32, "name": "model"}
    if family in ("qwen2", "gemma3"):
        narrow["windowed_layers"] = (1,)
    return family_config(family, **narrow | changes)


def _gguf_of(config: DecoderConfig) -> Callable[[Path], Any]:
    weights = tiny_weights(config, seed=3)
    return lambda folder: write_gguf(folder / "model.gguf", config, weights)


def _folder_of(config: DecoderConfig) -> Callable[[Path], Any]:
    weights = tiny_weights(config, seed=3)
    return lambda folder: write_folder(folder, config, weights)


def _read_gguf(folder: Path) -> Any:
    file = folder / "model.gguf"
    config = gguf_reader.read_config(file)
    return config, gguf_reader.read_weights(file, config)


_GGUF_SIZES = {
    "num_layers": "block_count",
    "d_model": "embedding_length",
    "d_ff": "feed_forward_length",
    "num_heads": "attention.head_count",
    "rms_eps": "attention.layer_norm_rms_epsilon",
    "max_positions": "context_length",
}


def _check_gguf(folder: Path, reading: Any) -> None:
    config, weights = reading
    other = gguf.GGUFReader(folder / "model.gguf")
    family = other.fields["general.architecture"].contents()
    for field, key in _GGUF_SIZES.items():
        wanted = other.fields[f"{family}.{key}"].contents()
        same(key, np.float32(getattr(config, field)), np.float32(wanted))
    stored = {
        tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1])
        for tensor in other.tensors
    }
    heads = {"blocks/q_proj": config.num_heads, "blocks/k_proj": config.num_kv_heads}
    used = _check_weights(
        config,
        weights,
        gguf_reader.tensor_names(config),
        stored,
        lambda target, rows: (
            _in_halves(rows, heads[target]) if target in heads and family == "llama" else rows
        ),
    )
    left = set(stored) - used
    assert left <= {"rope_freqs.weight"}, f"ignored: {left}"


def _in_halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """Each head's rows 0, 2, 4, ... and then 1, 3, 5, ..."""
    parts = np.split(rows, heads)
    return np.concatenate([half for part in parts for half in (part[0::2], part[1::2])])


def _check_weights(
    config: DecoderConfig,
    weights: Mapping[str, np.ndarray],
    names: Mapping[str, str],
    stored: Mapping[str, np.ndarray],
    change: Callable[[str, np.ndarray], np.ndarray],
) -> set[str]:
    """Asserts that the weights are the stored ones, and returns the names of these."""
    used = set()
    assert set(weights) == set(config.weight_shapes())
    for target, weight in weights.items():
        stacked = target.startswith("blocks/")
        for layer in range(config.num_layers) if stacked else (0,):
            name = names[target].format(layer)
            used.add(name)
            wanted = change(target, stored[name].astype(np.float32))
            found = weight[layer] if stacked else weight
            if found.ndim == 2 and target != "embed":
                found = found.T
            same(name, found, wanted)
            assert np.isfinite(found).all(), name
    return used


# ---- Hugging Face folders


def _folder(changes: Mapping[str, Any], **options: Any) -> Callable[[Path], Any]:
    config = _config(**changes)
    return lambda folder: write_folder(folder, config, tiny_weights(config), **options)


def _read_folder(folder: Path) -> Any:
    config = huggingface.read_config(folder)
    return config, huggingface.read_weights(folder, config)


_HF_SIZES = {
    "num_layers": "num_hidden_layers",
    "d_model": "hidden_size",
    "d_ff": "intermediate_size",
    "num_heads": "num_attention_heads",
    "vocab_size": "vocab_size",
}


_TYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
_TYPES |= {"I64": np.int64, "I32": np.int32, "U32": np.uint32, "U8": np.uint8, "BOOL": np.bool_}


def _load(file: Path) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file, by the format's definition and nothing else."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, payload = json.loads(data[8 : 8 + length]), data[8 + length :]
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        keys = ("dtype", "shape", "data_offsets")
        # The library takes the three without their names as well.
        kind, shape, (begin, end) = [entry[k] for k in keys] if isinstance(entry, dict) else entry
        found[name] = np.frombuffer(payload[begin:end], _TYPES[kind]).reshape(shape)
    return found


def _check_folder(folder: Path, reading: Any) -> None:
    config, weights = reading
    raw = json.loads((folder / "config.json").read_text())
    for field, key in _HF_SIZES.items():
        same(key, getattr(config, field), raw[key])
    same("rms_norm_eps", config.rms_eps, raw.get("rms_norm_eps", 1e-6))
    if not raw.get("rope_parameters"):
        theta = 1000000.0 if raw["model_type"] == "gemma3_text" else 10000.0
        same("rope_theta", config.rope_base, raw.get("rope_theta", theta))
    index = folder / "model.safetensors.index.json"
    if index.exists():
        placed = json.loads(index.read_text())["weight_map"]
        stored = {name: _load(folder / file)[name] for name, file in placed.items()}
    else:
        stored = _load(folder / "model.safetensors")
    names = huggingface.tensor_names(config)
    add_one = raw["model_type"] == "gemma3_text"

    def change(target: str, rows: np.ndarray) -> np.ndarray:
        return rows + np.float32(1) if add_one and target.endswith("norm") else rows

    used = _check_weights(config, weights, names, stored, change)
    left = {name for name in stored if not name.endswith("rotary_emb.inv_freq")} - used
    assert left <= ({"lm_head.weight"} if config.tied_embeddings else set()), left


# ---- Tokenizers

_TEXTS = ("hi there 123", "<|im_start|>user\n\u00e9\u4e16<|im_end|>", "")
_MESSAGES = ({"role": "user", "content": "hi"},)


def _write_tokenizer(folder: Path) -> None:
    backend = Tokenizer.byte_level()
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(backend.to_json())
    config = {"eos_token": "<|im_end|>", "pad_token": {"content": "<|pad|>"}, "bos_token": None}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": CHATML}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [258, 256]}))


def _write_tokenizer_of_maps(folder: Path) -> None:
    _write_tokenizer(folder)
    (folder / "tokenizer_config.json").unlink()
    special = {"eos_token": "<|im_end|>", "bos_token": {"content": "<|im_start|>"}}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    (folder / "chat_template.jinja").write_text(CHATML)


def _use(tokenizer: Tokenizer) -> Any:
    ids = [tokenizer.encode(text) for text in _TEXTS]
    for numbers in ids:
        tokenizer.decode(numbers)
    tokenizer.ordinary_ids()
    if tokenizer.has_chat_template:
        # A template may refuse a conversation; it is a program, no part of the reading.
        with contextlib.suppress(InputError):
            tokenizer.render(_MESSAGES, add_generation_prompt=True)
    return tokenizer, ids


def _check_tokenizer(folder: Path, reading: Any) -> None:
    tokenizer, ids = reading
    other = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    other.no_truncation()
    for text, found in zip(_TEXTS, ids, strict=True):
        same(f"ids of {text!r}", found, other.encode(text, add_special_tokens=False).ids)
    assert other.id_to_token(tokenizer.end_of_turn) is not None


def _check_gguf_tokenizer(folder: Path, reading: Any) -> None:
    tokenizer, ids = reading
    fields = gguf.GGUFReader(folder / "model.gguf").fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    for text, found in zip(_TEXTS, ids, strict=True):
        assert tokenizer.decode(found, skip_special=False) == text
        assert all(0 <= i < len(tokens) for i in found)
    assert 0 <= tokenizer.end_of_turn < len(tokens)


# ---- Adapters

_SITES = {"q_proj": SiteShape(2, 8, 8), "down_proj": SiteShape(2, 12, 8)}
_SOME = {name: SiteShape(2, site.d_in, site.d_out, (0, 2)) for name, site in _SITES.items()}
_DEEP = {name: SiteShape(3, site.d_in, site.d_out) for name, site in _SITES.items()}


def _adapter(config: Any, sites: Mapping[str, SiteShape] = _SITES) -> Callable[[Path], Any]:
    def write(folder: Path) -> None:
        adapter = randomised(create_adapter(config, sites, jax.random.key(0)))
        save_adapter(folder, adapter, metadata={"base": "tiny"})

    return write


def _read_adapter(folder: Path) -> Any:
    return load_adapter(folder)


def _check_adapter(folder: Path, adapter: Any) -> None:
    card = json.loads((folder / "adapter.json").read_text())
    stored, found = _load(folder / "adapter.safetensors"), adapter_arrays(adapter)
    assert set(stored) == set(found)
    for name, array in stored.items():
        assert array.dtype == found[name].dtype
        same(name, found[name], array)
    assert adapter.config.method == card["method"]
    ours = adapter.config.to_dict()
    for field, value in card["config"].items():
        assert json.loads(json.dumps(ours[field])) == value, field
    for name, factor in adapter.factors().items():
        same(f"scale of {name}", factor.scale, np.float32(card["scale"][name]))
        site = card["sites"][name]
        same(
            f"widths of {name}",
            (factor.a.shape[2], factor.b.shape[2]),
            (site["d_in"], site["d_out"]),
        )


def _seal_adapter(folder: Path) -> None:
    card, arrays = folder / "adapter.json", folder / "adapter.safetensors"
    small = [p.is_file() and p.stat().st_size < 1 << 24 for p in (card, arrays)]
    if all(small):
        digest = hashlib.sha256(arrays.read_bytes()).hexdigest()
        text = card.read_text(encoding="utf-8", errors="surrogateescape")
        sealed = re.sub(r'("arrays_sha256": ")[0-9a-f]{64}"', rf'\g<1>{digest}"', text)
        card.write_text(sealed, encoding="utf-8", errors="surrogateescape")


# ---- PEFT folders


def _peft(config: Any, sites: Mapping[str, SiteShape] = _SITES) -> Callable[[Path], Any]:
    layers = 2 if sites is _SITES else 3

    def write(folder: Path) -> None:
        factors = randomised(create_adapter(config, sites, jax.random.key(0))).factors()
        export_peft(folder, factors, base_name="org/base", num_layers=layers)
        (folder / "README.md").unlink()
        if layers == 3:  # as others write it: half precision, and fields that we do not write
            arrays = _load(folder / "adapter_model.safetensors")
            halves = {name: array.astype(ml_dtypes.bfloat16) for name, array in arrays.items()}
            save_file(halves, folder / "adapter_model.safetensors")
            file = folder / "adapter_config.json"
            raw = json.loads(file.read_text())
            more = {"use_rslora": True, "peft_version": "0.17", "exclude_modules": None}
            file.write_text(json.dumps(raw | more | {"rank_pattern": {}, "r": 2}))

    return write


def _read_peft(folder: Path) -> Any:
    return read_peft_factors(folder, _DEEP if "deep" in _marks(folder) else _SITES)


def _marks(folder: Path) -> str:
    # Which base it belongs to is no part of a PEFT folder; the variant's name says it.
    return folder.name


def _check_peft(folder: Path, factors: Any) -> None:
    raw = json.loads((folder / "adapter_config.json").read_text())
    stored = _load(folder / "adapter_model.safetensors")
    used = set()
    for name, factor in factors.items():
        part = "mlp" if name == "down_proj" else "self_attn"
        for position, layer in enumerate(factor.layers or range(factor.a.shape[0])):
            module = f"model.layers.{layer}.{part}.{name}"
            a, b = (stored[f"base_model.model.{module}.lora_{x}.weight"] for x in "AB")
            used |= {f"base_model.model.{module}.lora_{x}.weight" for x in "AB"}
            rank = a.shape[0]
            same(module, factor.a[position, :rank], a.astype(np.float32))
            same(module, factor.b[position, :rank].T, b.astype(np.float32))
            assert not np.any(factor.a[position, rank:]) or not np.any(factor.b[position, rank:])
            alphas = [v for k, v in (raw.get("alpha_pattern") or {}).items() if k in module]
            if not raw.get("alpha_pattern") or alphas:
                alpha = (alphas or [raw["lora_alpha"]])[0]
                root = rank**0.5 if raw.get("use_rslora") else rank
                same(f"scale of {module}", factor.scale[position], np.float32(alpha / root))
    assert used == set(stored)


# ---- PEFT folders of every type, as adapters


def _peft_of(kind: str, **changes: Any) -> Callable[[Path], Any]:
    def write(folder: Path) -> None:
        folder.rmdir()
        write_peft(folder, kind, **changes)

    return write


def _read_import(folder: Path) -> Any:
    return import_peft(folder, PEFT_SITES)


def _check_import(folder: Path, adapter: Any) -> None:
    """A LoRA changes every weight as PEFT's formula says; of others the tensors are those read.

    What PEFT has itself is written back for that, which `tests/parity` compares with PEFT.
    """
    stored = _load(folder / "adapter_model.safetensors")
    raw = json.loads((folder / "adapter_config.json").read_text())
    if raw["peft_type"] == "LORA":
        _check_lora(raw, stored, adapter.factors())
        return
    with tempfile.TemporaryDirectory() as scratch:
        back = Path(scratch) / "back"
        export_native(back, adapter, base_name="org/base", num_layers=3)
        ours = _load(back / "adapter_model.safetensors")
    assert set(ours) == set(stored)
    for name, array in stored.items():
        if "unilora_scales" in name:  # PEFT's own are rounded once more
            assert np.allclose(ours[name], array, rtol=1e-5), name
        else:
            same(name, ours[name], array.astype(np.float32))


def _check_lora(
    raw: Mapping[str, Any], stored: Mapping[str, np.ndarray], factors: Mapping[str, Any]
) -> None:
    used = 0
    for name, factor in factors.items():
        part = "mlp" if name == "down_proj" else "self_attn"
        deltas = np.asarray(factor.delta())
        for position, layer in enumerate(factor.layers or range(3)):
            module = f"model.layers.{layer}.{part}.{name}"
            a, b = (stored[f"base_model.model.{module}.lora_{x}.weight"] for x in "AB")
            used += 2
            patterns = (raw.get("alpha_pattern") or {}).items()
            fits = [alpha for key, alpha in patterns if re.match(rf"(.*\.)?({key})$", module)]
            alpha = (*fits, raw["lora_alpha"])[0]
            scale = alpha / (len(a) ** 0.5 if raw.get("use_rslora") else len(a))
            wanted = scale * (b.astype(np.float64) @ a.astype(np.float64)).T
            if np.abs(wanted).max() > 1e37:  # the product overflows in fp32
                continue
            error = np.abs(deltas[position] - wanted).max()
            assert error <= 1e-5 * np.abs(wanted).max(), (module, error)
    assert used == len(stored)


# ---- Adapters of llama.cpp

_LLAMA = _config(num_layers=3)


def _adapter_gguf(config: Any, layers: tuple[int, ...] | None = None) -> Callable[[Path], Any]:
    depth = 3 if layers is None else len(layers)
    shapes = {name: _LLAMA.site_shapes()[name][1:] for name in ("q_proj", "down_proj")}
    sites = {name: SiteShape(depth, *widths, layers) for name, widths in shapes.items()}

    def write(folder: Path) -> None:
        factors = randomised(create_adapter(config, sites, jax.random.key(0))).factors()
        write_adapter_gguf(folder / "adapter.gguf", factors, _LLAMA)

    return write


def _check_adapter_gguf(folder: Path, factors: Any) -> None:
    other = gguf.GGUFReader(folder / "adapter.gguf")
    stored = {
        tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1])
        for tensor in other.tensors
    }
    field = other.fields.get("adapter.lora.alpha")
    alpha = field.contents() if field else 0.0
    used = set()
    for site, factor in factors.items():
        source = gguf_reader.tensor_names(_LLAMA)[f"blocks/{site}"]
        for position, layer in enumerate(factor.layers or range(3)):
            names = [f"{source.format(layer)}.lora_{part}" for part in "ab"]
            used |= set(names)
            a, b = (stored[name] for name in names)
            if site == "q_proj":
                b = _in_halves(b, _LLAMA.num_heads)
            rank = len(a)
            same(names[0], factor.a[position, :rank], a)
            same(names[1], factor.b[position, :rank], b.T)
            scale = np.float32(alpha) / np.float32(rank) if alpha else 1.0
            same(f"scale of {site}", factor.scale[position], scale)
    assert used == set(stored)


# ---- Whole bases: config, tokenizer and weights, onto the device


def _base_folder(**options: Any) -> Callable[[Path], Any]:
    config = _config(vocab_size=260, num_layers=1, d_model=64, head_dim=32)

    def write(folder: Path) -> None:
        write_folder(folder, config, tiny_weights(config), **options)
        _write_tokenizer(folder)

    return write


def _read_base(folder: Path) -> Base:
    file = folder / "model.gguf"
    scheme = next((name for name in ("int8", "nf4") if folder.name.startswith(name)), None)
    return load_base(file if folder.name.endswith("gguf") else folder, quantize=scheme)


def _check_base(folder: Path, base: Base) -> None:
    """Weights as the reader of the format has them, quantised ones to half a step."""
    read = _read_gguf if folder.name.endswith("gguf") else _read_folder
    check = _check_gguf if folder.name.endswith("gguf") else _check_folder
    config, weights = read(folder)
    check(folder, (config, weights))
    assert base.config.architecture() == config.architecture()
    step = {None: 0.0, "int8": 0.51 / 127, "nf4": 0.16}[base.quantization]
    for name, weight in weights.items():
        found = np.asarray(base.model.weight(name), np.float32)
        site = name.startswith("blocks/") and name.endswith("_proj")
        largest = np.abs(weight).max() if site else 0.0
        assert np.abs(found - weight).max() <= step * largest, name


# ---- What lies at a path


def _read_detect(folder: Path) -> Any:
    files = [folder / name for name in ("model.gguf", "adapter.gguf")]
    found = [file for file in files if os.path.lexists(file)]
    return detect(found[0] if found and not (folder / "config.json").exists() else folder)


def _check_detect(folder: Path, found: Any) -> None:
    assert found.description.isprintable()
    json.dumps(dict(found.details))


_SAFETENSORS = (
    (mutate_safetensors,) * 3 + (mutate_json,) * 3 + (mutate_bytes,) * 2 + (mutate_files,)
)
_GGUF = (mutate_gguf,) * 5 + (mutate_bytes,) * 3 + (mutate_files,)
_WORDS = (mutate_json,) * 5 + (mutate_bytes,) * 3 + (mutate_files,)
_VOCABULARY = {"num_layers": 1, "vocab_size": 260, "d_model": 64, "head_dim": 32}
# Rows of whole blocks of 256.
_WIDE = {"num_layers": 1, "d_model": 256, "d_ff": 256, "num_heads": 4, "head_dim": 64}

TARGETS: dict[str, Target] = {
    "gguf": Target(
        {
            "F32": _gguf("F32", {}),
            "Q8_0": _gguf("Q8_0", {}),
            "Q4_1": _gguf("Q4_1", {"tied_embeddings": False}),
            "F16": _gguf("F16", {"num_layers": 1}, fields={"general.file_type": 1}),
            "BF16": _gguf("BF16", {"num_layers": 1}),
            "Q4_K": _gguf("Q4_K", _WIDE),
            "llama3": _gguf_of(_small("llama", rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192))),
            "qwen2": _gguf_of(_small("qwen2", window=None, windowed_layers=None)),
            "gemma3": _gguf_of(_small("gemma3", query_scale=None, embed_scale=32**0.5)),
        },
        _read_gguf,
        _check_gguf,
        _GGUF,
    ),
    "huggingface": Target(
        {
            "single": _folder({}),
            "half": _folder({"tied_embeddings": False}, dtype="bfloat16"),
            "sharded": _folder({}, shards=3, dtype="float16"),
            "mistral": _folder_of(_small("mistral")),
            "qwen3": _folder_of(_small("qwen3")),
            "gemma3": _folder_of(_small("gemma3", embed_scale=32**0.5)),
        },
        _read_folder,
        _check_folder,
        _SAFETENSORS,
    ),
    "tokenizer": Target(
        {"config": _write_tokenizer, "maps": _write_tokenizer_of_maps},
        lambda folder: _use(Tokenizer.from_folder(folder)),
        _check_tokenizer,
        _WORDS,
    ),
    "gguf-tokenizer": Target(
        {"smollm": _gguf("F16", _VOCABULARY, vocabulary=True)},
        lambda folder: _use(Tokenizer.from_gguf(folder / "model.gguf")),
        _check_gguf_tokenizer,
        _GGUF,
    ),
    "adapter": Target(
        {
            "lora": _adapter(LoRAConfig(rank=2, alpha=4.0)),
            "mos": _adapter(
                MoSConfig(equivalent_rank=2, rank=3, shards_per_vector=2, private_rank=1)
            ),
            "some": _adapter(LoRAConfig(rank=2, rslora=True), _SOME),
            "vera": _adapter(VeRAConfig(rank=4)),
            "vb_lora": _adapter(VBLoRAConfig(rank=2, num_vectors=8, vector_length=4, top_k=2)),
        },
        _read_adapter,
        _check_adapter,
        _SAFETENSORS,
        _seal_adapter,
    ),
    "peft": Target(
        {
            "lora": _peft(LoRAConfig(rank=2, alpha=3.0)),
            "deep": _peft(LoRAConfig(rank=2, rslora=True), _SOME),
        },
        _read_peft,
        _check_peft,
        _SAFETENSORS,
    ),
    "import-peft": Target(
        {
            "lora": _peft_of("LORA", rank_pattern={"q_proj": 2}),
            "vera": _peft_of("VERA"),
            "vb_lora": _peft_of("VBLORA"),
            "uni_lora": _peft_of("UNILORA"),
        },
        _read_import,
        _check_import,
        _SAFETENSORS,
    ),
    "adapter-gguf": Target(
        {
            "lora": _adapter_gguf(LoRAConfig(rank=2, alpha=4.0)),
            "some": _adapter_gguf(LoRAConfig(rank=3), (0, 2)),
        },
        lambda folder: read_adapter_gguf(folder / "adapter.gguf", _LLAMA),
        _check_adapter_gguf,
        _GGUF,
    ),
    "base": Target(
        {
            "folder": _base_folder(),
            "int8 sharded": _base_folder(shards=2, dtype="bfloat16"),
            "nf4 gguf": _gguf("F16", _VOCABULARY, vocabulary=True),
            "gguf": _gguf("Q8_0", _VOCABULARY, vocabulary=True),
        },
        _read_base,
        _check_base,
        (*_SAFETENSORS, mutate_gguf, mutate_gguf),
    ),
    "detect": Target(
        {
            "folder": _folder({"num_layers": 1}),
            "model": _gguf("F32", {"num_layers": 1}),
            "adapter": _adapter(LoRAConfig(rank=2)),
            "peft": _peft_of("VERA"),
            "llama.cpp": _adapter_gguf(LoRAConfig(rank=2)),
        },
        _read_detect,
        _check_detect,
        (*_WORDS, mutate_gguf, mutate_gguf),
    ),
}
