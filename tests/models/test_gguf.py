import dataclasses
import os
import struct

import ml_dtypes
import numpy as np
import pytest

from mos_jax.errors import InputError
from mos_jax.models.gguf import open_gguf, read_config, read_weights
from mos_jax.models.known import known_config
from mos_jax.models.packaged import find_packaged_gguf
from mos_jax.models.tiny import tiny_config, tiny_weights
from tests.models.fixtures_models import write_gguf

CONFIG = tiny_config()
WEIGHTS = tiny_weights(CONFIG, seed=1)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", CONFIG, WEIGHTS)


# Relative to the standard deviation of each weight.
@pytest.mark.parametrize(
    ("kind", "tolerance"),
    [("F32", 0), ("F16", 2e-3), ("BF16", 2e-2), ("Q8_0", 2e-2), ("Q4_0", 0.5), ("Q4_1", 0.5)],
)
def test_round_trip(tmp_path, kind, tolerance):
    path = write_gguf(tmp_path / "m.gguf", CONFIG, WEIGHTS, kind)
    config = read_config(path)
    assert config == CONFIG
    read = read_weights(path, config)
    assert {k: v.shape for k, v in read.items()} == CONFIG.weight_shapes()
    for name, value in read.items():
        assert value.dtype == np.float32
        exact = kind == "F32" or name.endswith("norm")
        bound = 0 if exact else tolerance * WEIGHTS[name].std()
        assert np.abs(value - WEIGHTS[name]).max() <= bound, name


def test_untied_model_and_head_width_of_its_own(tmp_path):
    config = dataclasses.replace(CONFIG, tied_embeddings=False, head_dim=32)
    weights = tiny_weights(config)
    path = write_gguf(tmp_path / "m.gguf", config, weights)
    assert read_config(path) == config
    read = read_weights(path, config)
    assert all(np.array_equal(read[name], weights[name]) for name in weights)


def test_reading_in_pieces_changes_nothing(good, monkeypatch):
    monkeypatch.setattr("mos_jax.models.layout.CHUNK", 64 * 7)
    read = read_weights(good, CONFIG)
    assert all(np.array_equal(read[name], WEIGHTS[name]) for name in WEIGHTS)


def test_bfloat16_keeps_norms_in_float32(good):
    read = read_weights(good, CONFIG, "bfloat16")
    expected = tiny_weights(CONFIG, seed=1, dtype="bfloat16")
    for name, value in read.items():
        assert value.dtype == (np.float32 if name.endswith("norm") else ml_dtypes.bfloat16)
        assert np.array_equal(value, expected[name])


def test_other_dtypes_are_refused(good):
    for dtype in ("float16", "int8", "float33", None):
        with pytest.raises(InputError, match="use 'float32' or 'bfloat16'"):
            read_weights(good, CONFIG, dtype)


def test_cut_short_anywhere(tmp_path, good):
    data = good.read_bytes()
    path = tmp_path / "cut.gguf"
    header = open_gguf(good)
    start = min(tensor.offset for tensor in header.tensors.values())
    places = [0, 3, 5, 12, 23, 24, *range(25, start, 97), start, (start + len(data)) // 2]
    for length in [*places, len(data) - 1]:
        path.write_bytes(data[:length])
        with pytest.raises(InputError, match=r"cut\.gguf is not a whole GGUF file"):
            read_weights(path, CONFIG)


def test_damaged_header_never_raises_anything_else(tmp_path, good):
    data = good.read_bytes()
    start = min(tensor.offset for tensor in open_gguf(good).tensors.values())
    path = tmp_path / "damaged.gguf"
    for position in range(0, start, 11):
        for byte in (0x00, 0xFF):
            path.write_bytes(data[:position] + bytes([byte]) + data[position + 1 : start + 64])
            with pytest.raises(InputError):
                read_weights(path, read_config(path))


def _header(num_tensors, num_fields, rest):
    return b"GGUF" + struct.pack("<IQQ", 3, num_tensors, num_fields) + rest


def _text(value):
    return struct.pack("<Q", len(value)) + value


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x80\x04pickle", r"it begins with b'\\x80\\x04pi'"),
        (b"GGUF" + struct.pack("<I", 1) + bytes(16), "version 1 is not supported"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(16), "big-endian version 3"),
        (_header(0, 1, _text(b"k") + struct.pack("<IIQ", 9, 4, 1 << 62)), "ends inside"),
        (_header(0, 1, _text(b"k") + struct.pack("<IIQ", 9, 9, 1)), "unknown array type 9"),
        (_header(0, 1, _text(b"k") + struct.pack("<I", 77)), "unknown value type 77"),
        (_header(0, 1, _text(b"\xff") + struct.pack("<II", 4, 1)), "not UTF-8"),
        (_header(0, 2, 2 * (_text(b"k") + struct.pack("<II", 4, 1))), "key 'k' occurs twice"),
        (_header(1, 0, _text(b"t") + struct.pack("<I", 9)), "has 9 axes"),
        (_header(1, 0, _text(b"t") + struct.pack("<IQIQ", 1, 32, 99, 0)), "unknown type 99"),
        (_header(1, 0, _text(b"t") + struct.pack("<IQIQ", 1, 33, 8, 0)), "whole Q8_0 blocks"),
        (_header(1, 0, _text(b"t") + struct.pack("<IQIQ", 1, 1 << 60, 0, 0)), "cut short"),
        (
            _header(0, 1, _text(b"general.alignment") + struct.pack("<II", 4, 0)),
            "general.alignment = 0",
        ),
    ],
)
def test_foreign_and_malformed_headers(tmp_path, data, message):
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    with pytest.raises(InputError, match=message):
        open_gguf(path)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(InputError, match="No such file"):
        read_weights(tmp_path / "none.gguf", CONFIG)
    with pytest.raises(InputError, match=r"cannot read .*: it is a folder"):
        open_gguf(tmp_path)


def test_tensors_must_match_the_config(tmp_path):
    path = tmp_path / "m.gguf"
    write_gguf(path, CONFIG, WEIGHTS, drop=("blk.1.ffn_up.weight",))
    with pytest.raises(InputError, match=r"tensor blk\.1\.ffn_up\.weight is missing"):
        read_weights(path, CONFIG)
    write_gguf(path, CONFIG, WEIGHTS, extra={"blk.0.attn_q.bias": np.zeros(64, np.float32)})
    with pytest.raises(InputError, match=r"blk\.0\.attn_q\.bias is no part of this model"):
        read_weights(path, CONFIG)
    wrong = {"blk.0.ffn_up.weight": np.zeros((64, 128), np.float32)}
    write_gguf(path, CONFIG, WEIGHTS, extra=wrong)
    with pytest.raises(InputError, match=r"shape \[64, 128\]; the config asks for \[128, 64\]"):
        read_weights(path, CONFIG)


def test_sizes_of_a_damaged_config_are_refused_before_any_allocation(good):
    for config in (
        dataclasses.replace(CONFIG, num_layers=1 << 40),
        dataclasses.replace(CONFIG, vocab_size=1 << 40),
        dataclasses.replace(CONFIG, d_ff=1 << 40),
    ):
        with pytest.raises(InputError, match=r"is missing|the config asks for"):
            read_weights(good, config)


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_values_that_are_not_finite(tmp_path, kind):
    path = write_gguf(tmp_path / "m.gguf", CONFIG, WEIGHTS, kind)
    tensor = open_gguf(path).tensors["blk.1.ffn_down.weight"]
    with path.open("r+b") as file:
        file.seek(tensor.offset)
        file.write(b"\xff\x7f\xff\x7f")  # a NaN in float32, and as the scale of a Q8_0 block
    with pytest.raises(InputError, match=r"blk\.1\.ffn_down\.weight has values that are not"):
        read_weights(path, CONFIG)


def test_type_that_cannot_be_read(tmp_path, good):
    data = bytearray(good.read_bytes())
    name = b"token_embd.weight"
    at = data.index(name) + len(name) + 4 + 2 * 8
    data[at : at + 4] = struct.pack("<I", 26)  # I32, as large as F32
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    with pytest.raises(InputError, match="has type I32, which cannot be read"):
        read_weights(path, CONFIG)


def test_smollm2():
    try:
        path = find_packaged_gguf()
    except InputError as error:
        pytest.skip(str(error))
    config = read_config(path)
    assert dataclasses.replace(config, name="smollm2-135m") == known_config("smollm2-135m")
    weights = read_weights(path, config, "bfloat16")
    assert sum(value.size for value in weights.values()) == 134_515_008
    assert np.float32(weights["embed"]).std() == pytest.approx(0.1356, abs=1e-4)
    assert np.float32(weights["blocks/q_proj"]).std() == pytest.approx(0.2022, abs=1e-4)


@pytest.mark.parametrize(("shift", "message"), [(0, "overlap"), (16, "no multiple of 32")])
def test_tensors_that_overlap_or_are_not_aligned(tmp_path, good, shift, message):
    names = [b"blk.0.attn_norm.weight", b"blk.0.ffn_norm.weight"]
    data = bytearray(good.read_bytes())
    # One axis: its size, the type and the offset follow the name and the number of axes.
    first, second = (data.index(name) + len(name) + 4 + 8 + 4 for name in names)
    (offset,) = struct.unpack_from("<Q", data, first)
    struct.pack_into("<Q", data, second, offset + shift)
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    with pytest.raises(InputError, match=rf"m\.gguf is not a whole GGUF file: .*{message}"):
        open_gguf(path)


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "m.gguf")
    with pytest.raises(InputError, match=r"m\.gguf: it is no regular file"):
        open_gguf(tmp_path / "m.gguf")


def test_a_header_of_gigabytes_is_refused_before_it_is_parsed(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(_header(0, 1, _text(b"k") + struct.pack("<IIQ", 9, 0, 1 << 33)))
    with path.open("r+b") as stream:
        stream.truncate(1 << 34)  # all of the array is there, as a hole
    with pytest.raises(InputError, match="its header has more than 134217728 bytes"):
        open_gguf(path)


def test_a_config_that_is_refused_names_the_file(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", CONFIG, WEIGHTS, fields={"llama.block_count": 1 << 31})
    with pytest.raises(InputError, match=r"m\.gguf"):
        read_weights(path, read_config(path))
    write_gguf(path, CONFIG, WEIGHTS, drop=("llama.block_count",))
    with pytest.raises(InputError, match=r"m\.gguf: .*block_count is missing"):
        read_config(path)
