import dataclasses
import json
import re
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mos_jax import load_base
from mos_jax.errors import InputError
from mos_jax.models.config import FAMILIES
from mos_jax.models.huggingface import read_config, read_weights
from mos_jax.models.tiny import tiny_config, tiny_weights
from mos_jax.models.tokenizer import Tokenizer
from tests.models.fixtures_decoder import tokens_of
from tests.models.fixtures_families import family_config, family_decoder
from tests.models.fixtures_models import write_folder

CONFIG = dataclasses.replace(tiny_config(), name="model")
WEIGHTS = tiny_weights(CONFIG, seed=2)
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("hf") / "model", CONFIG, WEIGHTS)


@pytest.fixture
def sharded(tmp_path):
    return write_folder(tmp_path / "model", CONFIG, WEIGHTS, shards=3)


def rewrite_index(folder, change):
    content = json.loads((folder / INDEX).read_text())
    change(content["weight_map"])
    (folder / INDEX).write_text(json.dumps(content))


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_round_trip(tmp_path, shards, stored, dtype):
    folder = write_folder(tmp_path / "model", CONFIG, WEIGHTS, stored, shards)
    config = read_config(folder)
    assert config == CONFIG
    read = read_weights(folder, config, dtype)
    assert {k: v.shape for k, v in read.items()} == CONFIG.weight_shapes()
    in_file = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
    for name, value in read.items():
        kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32
        kind = np.float32 if name.endswith("norm") else kind
        assert value.dtype == kind
        assert np.array_equal(value, WEIGHTS[name].astype(in_file[stored]).astype(kind)), name


def test_untied_model(tmp_path):
    config = dataclasses.replace(CONFIG, tied_embeddings=False, head_dim=32)
    weights = tiny_weights(config)
    folder = write_folder(tmp_path / "model", config, weights)
    read = read_weights(folder, read_config(folder))
    assert all(np.array_equal(read[name], weights[name]) for name in weights)


def test_reading_in_pieces_changes_nothing(good, monkeypatch):
    monkeypatch.setattr("mos_jax.models.layout.CHUNK", 64 * 7)
    read = read_weights(good, CONFIG)
    assert all(np.array_equal(read[name], WEIGHTS[name]) for name in WEIGHTS)


def test_tied_head_in_the_file_must_equal_the_embedding(tmp_path):
    head = WEIGHTS["embed"].copy()
    folder = write_folder(tmp_path / "m", CONFIG, WEIGHTS, extra={"lm_head.weight": head})
    assert "head" not in read_weights(folder, CONFIG)
    head[-1, -1] += 1
    write_folder(folder, CONFIG, WEIGHTS, extra={"lm_head.weight": head})
    with pytest.raises(InputError, match="set tie_word_embeddings to false"):
        read_weights(folder, CONFIG)


def test_rotary_buffers_are_skipped_and_other_extras_refused(tmp_path):
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32)}
    folder = write_folder(tmp_path / "m", CONFIG, WEIGHTS, extra=buffer)
    assert np.array_equal(read_weights(folder, CONFIG)["embed"], WEIGHTS["embed"])
    bias = {"model.layers.0.self_attn.q_proj.bias": np.ones(64, np.float32)}
    write_folder(folder, CONFIG, WEIGHTS, extra=bias)
    with pytest.raises(InputError, match=r"q_proj\.bias is no part of this model"):
        read_weights(folder, CONFIG)


def test_wrong_shape_type_and_values(tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"
    for value, message in (
        (np.zeros((64, 128), np.float32), r"shape \[64, 128\]; the config asks for \[128, 64\]"),
        (np.full((128, 64), np.nan, np.float32), "values that are not finite"),
    ):
        folder = write_folder(tmp_path / "m", CONFIG, WEIGHTS, extra={name: value})
        with pytest.raises(InputError, match=message):
            read_weights(folder, CONFIG)
    from safetensors.numpy import load_file

    tensors = load_file(folder / "model.safetensors") | {name: np.zeros((128, 64), np.int8)}
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InputError, match="type I8; only F32, F16, BF16"):
        read_weights(folder, CONFIG)


def test_cut_short_or_foreign(tmp_path, good):
    data = (good / "model.safetensors").read_bytes()
    file = tmp_path / "model.safetensors"
    for content in (
        *(data[:n] for n in (0, 4, 8, 100, len(data) // 2, len(data) - 1)),
        b"\x80\x04" + data[2:],
        data + b"x",
        b"GGUF" + bytes(100),
        b"PK\x03\x04" + bytes(100),
    ):
        file.write_bytes(content)
        with pytest.raises(InputError, match="is not a whole safetensors file"):
            read_weights(tmp_path, CONFIG)


def test_missing_parts(tmp_path, sharded):
    with pytest.raises(InputError, match="does not exist"):
        read_config(tmp_path / "none")
    with pytest.raises(InputError, match=r"cannot read .*config\.json"):
        read_config(tmp_path)
    rewrite_index(sharded, lambda m: m.pop("model.norm.weight"))
    with pytest.raises(InputError, match=r"model\.norm\.weight, which .* does not place there"):
        read_weights(sharded, CONFIG)
    (sharded / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(InputError, match=r"model-00002-of-00003\.safetensors is missing"):
        read_weights(sharded, CONFIG)


def test_tensor_that_only_the_index_has(sharded):
    rewrite_index(sharded, lambda m: m.update({"more": "model-00001-of-00003.safetensors"}))
    with pytest.raises(InputError, match="tensor more is missing"):
        read_weights(sharded, CONFIG)


def test_missing_tensor(tmp_path, good):
    from safetensors.numpy import load_file

    tensors = load_file(good / "model.safetensors")
    del tensors["model.layers.1.input_layernorm.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"layers\.1\.input_layernorm\.weight is missing"):
        read_weights(tmp_path, CONFIG)


@pytest.mark.parametrize(
    "file",
    ["../model.safetensors", "/etc/passwd", "a/../../x.safetensors", "..", "m.bin", "a\\b", 7, ""],
)
def test_index_stays_inside_the_folder(sharded, file):
    rewrite_index(sharded, lambda m: m.update({"model.norm.weight": file}))
    with pytest.raises(InputError, match=r"must be the name of a \.safetensors file"):
        read_weights(sharded, CONFIG)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"weight_map": []}', "{}", "\udcff"])
def test_damaged_index(sharded, content):
    (sharded / INDEX).write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(InputError, match="index"):
        read_weights(sharded, CONFIG)


def test_pickles_are_refused(tmp_path, good):
    shutil.copy(good / "config.json", tmp_path)
    with pytest.raises(InputError, match=r"neither model\.safetensors nor"):
        read_weights(tmp_path, CONFIG)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(InputError, match=r"pytorch_model\.bin is a pickle.*convert it to safe"):
        read_weights(tmp_path, CONFIG)


def test_tiny_weights_are_reproducible_and_rounded():
    again = tiny_weights(CONFIG, seed=2)
    rounded = tiny_weights(CONFIG, seed=2, dtype="bfloat16")
    for name, value in WEIGHTS.items():
        assert np.array_equal(again[name], value)
        assert np.array_equal(rounded[name], value.astype(rounded[name].dtype))
    assert not np.array_equal(tiny_weights(CONFIG, seed=3)["embed"], WEIGHTS["embed"])
    with pytest.raises(InputError, match="seed = -1"):
        tiny_weights(CONFIG, seed=-1)


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip_of_a_family(tmp_path, family, stored):
    config = family_config(family)
    weights = tiny_weights(config)
    folder = write_folder(tmp_path / family, config, weights, stored, shards=2)
    assert read_config(folder) == config
    read = read_weights(folder, config)
    assert {name: array.shape for name, array in read.items()} == config.weight_shapes()
    # In bfloat16 what is stored of a Gemma's norm is 1 less, and so has smaller steps.
    tolerance = 1e-7 if stored == "float32" else 2**-8
    for name, value in read.items():
        assert value.dtype == np.float32
        np.testing.assert_allclose(value, weights[name], rtol=tolerance, atol=tolerance / 4)


@pytest.mark.parametrize("quantize", [None, "int8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_base_of_a_family(tmp_path, family, quantize):
    config = family_config(family)
    folder = write_folder(tmp_path / family, config, tiny_weights(config))
    (folder / "tokenizer.json").write_text(Tokenizer.byte_level().to_json())
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    base, decoder = load_base(folder, quantize=quantize), family_decoder(family)
    assert base.config == config
    tokens = tokens_of(decoder)
    got, want = (jax.jit(lambda d: d(tokens))(d) for d in (base.model, decoder))
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    assert error < 1e-6 if quantize is None else 1e-4 < error < 0.05


@pytest.mark.parametrize(
    ("family", "tensor"),
    [
        ("qwen2", "self_attn.q_proj.bias"),
        ("qwen3", "self_attn.k_norm.weight"),
        ("gemma3", "post_feedforward_layernorm.weight"),
        ("gemma3", "pre_feedforward_layernorm.weight"),
    ],
)
def test_a_family_lacks_none_of_its_tensors_and_llama_has_none_of_them(tmp_path, family, tensor):
    config, name = family_config(family), f"model.layers.1.{tensor}"
    folder = write_folder(tmp_path / "m", config, tiny_weights(config))
    tensors = load_file(folder / "model.safetensors")
    found = tensors.pop(name)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InputError, match=f"tensor {re.escape(name)} is missing"):
        read_weights(folder, config)
    llama = family_config("llama")
    folder = write_folder(tmp_path / "l", llama, tiny_weights(llama), extra={name: found})
    with pytest.raises(InputError, match=f"tensor {re.escape(name)} is no part of this model"):
        read_weights(folder, llama)


def test_the_image_part_of_a_gemma_is_left_out(tmp_path):
    config = family_config("gemma3")
    weights = tiny_weights(config)
    folder = write_folder(tmp_path / "m", config, weights)
    text = load_file(folder / "model.safetensors")
    image = {"vision_tower.x": np.ones(3), "multi_modal_projector.y": np.ones((2, 2))}
    tensors = {f"language_model.{name}": array for name, array in text.items()}
    save_file(tensors | image, folder / "model.safetensors")
    raw = json.loads((folder / "config.json").read_text())
    del raw["architectures"]
    (folder / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": raw}))
    assert read_config(folder) == dataclasses.replace(config, name="m")
    read = read_weights(folder, config)
    for name, array in weights.items():
        np.testing.assert_allclose(read[name], array, atol=1e-6)
    save_file(tensors | {"audio_tower.z": np.ones(1)}, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"audio_tower\.z"):
        read_weights(folder, config)
    with pytest.raises(InputError, match=r"language_model\."):
        read_weights(write_folder(tmp_path / "l", CONFIG, WEIGHTS, extra=tensors), CONFIG)


def test_entries_without_names_are_refused(tmp_path, good):
    data = (good / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    entry = header["model.norm.weight"]
    header["model.norm.weight"] = [entry["dtype"], entry["shape"], entry["data_offsets"]]
    text = json.dumps(header).encode()
    content = len(text).to_bytes(8, "little") + text + data[8 + length :]
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(InputError, match=r"model\.safetensors is not a whole.*entry is no object"):
        read_weights(tmp_path, CONFIG)
