import dataclasses
import json
import shutil

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from mos_jax.errors import InputError
from mos_jax.models.huggingface import read_config, read_weights
from mos_jax.models.tiny import tiny_config, tiny_weights
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
