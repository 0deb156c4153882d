"""Reader of GGUF model files.

The header is parsed here, with every length checked against the size of the file, and tensors are
read by offset: a damaged file is refused before any of its data is used, and the metadata of a
large vocabulary takes a fraction of a second. The `gguf` package turns quantised blocks into
numbers.

The architecture "llama" stores the rows of the query and key projections so that RoPE acts on
neighbouring pairs (2i, 2i+1); here it acts on halves (i, i + head_dim / 2), so `open_weights`
reorders them. The other architectures store halves.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import gguf
import numpy as np

from mos_jax.errors import InputError, naming
from mos_jax.models.config import DecoderConfig
from mos_jax.models.gguf_config import ROPE_FACTORS, config_from_gguf
from mos_jax.models.layout import (
    ByteFile,
    Slot,
    TensorReader,
    WeightReader,
    match_tensors,
    read_all,
    weight_readers,
)
from mos_jax.reading import MAX_TEXT_BYTES, open_regular, refuse_pickle

_BLOCK = "blk.{}."
_NAMES = {
    "embed": "token_embd.weight",
    "head": "output.weight",
    "final_norm": "output_norm.weight",
    "blocks/attn_norm": _BLOCK + "attn_norm.weight",
    "blocks/mlp_norm": _BLOCK + "ffn_norm.weight",
    "blocks/attn_post_norm": _BLOCK + "post_attention_norm.weight",
    "blocks/mlp_post_norm": _BLOCK + "post_ffw_norm.weight",
    "blocks/q_norm": _BLOCK + "attn_q_norm.weight",
    "blocks/k_norm": _BLOCK + "attn_k_norm.weight",
    "blocks/q_bias": _BLOCK + "attn_q.bias",
    "blocks/k_bias": _BLOCK + "attn_k.bias",
    "blocks/v_bias": _BLOCK + "attn_v.bias",
    "blocks/q_proj": _BLOCK + "attn_q.weight",
    "blocks/k_proj": _BLOCK + "attn_k.weight",
    "blocks/v_proj": _BLOCK + "attn_v.weight",
    "blocks/o_proj": _BLOCK + "attn_output.weight",
    "blocks/gate_proj": _BLOCK + "ffn_gate.weight",
    "blocks/up_proj": _BLOCK + "ffn_up.weight",
    "blocks/down_proj": _BLOCK + "ffn_down.weight",
}
# Types of tensors that the tests read. `gguf.dequantize` knows more (IQ2_XXS to IQ4_XS, TQ1_0,
# MXFP4 and so on), which are read as well.
GGUF_TYPES = (
    "F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1",
    "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K",
)  # fmt: skip
_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}


@dataclasses.dataclass(frozen=True)
class GGUFTensor:
    """Where one tensor lies in a file.

    Attributes:
        shape: Slowest axis first, the reverse of the file's order: [d_out, d_in].
        type: How its values are stored.
        offset: Its first byte, counted from the start of the file.
        row_bytes: Bytes of one row (of all of it, if it has one axis).
    """

    shape: tuple[int, ...]
    type: gguf.GGMLQuantizationType
    offset: int
    row_bytes: int


@dataclasses.dataclass(frozen=True)
class GGUFFile:
    """The header of a GGUF file.

    Attributes:
        path: The file.
        fields: Metadata by key: int, float, bool, str, or a list of one of these.
        tensors: Every tensor by name; they lie within the file and do not overlap.
    """

    path: Path
    fields: dict[str, Any]
    tensors: dict[str, GGUFTensor]


class _Header:
    """Reads values off the start of a file; InputError at the first that is not all there."""

    def __init__(self, file: BinaryIO, path: Path):
        self.file, self.path = file, path
        self.size = os.fstat(file.fileno()).st_size

    def fail(self, problem: str) -> InputError:
        return InputError(f"{self.path} is not a whole GGUF file: {problem}")

    def take(self, count: int) -> bytes:
        # Compared first: a damaged length must not become an allocation of that size, nor a header
        # of gigabytes as many Python objects.
        if self.file.tell() + count > MAX_TEXT_BYTES < self.size:
            raise self.fail(f"its header has more than {MAX_TEXT_BYTES} bytes")
        if count > self.size - self.file.tell():
            raise self.fail(f"it ends inside the header, after {self.size} bytes")
        return self.file.read(count)

    def number(self, code: str) -> Any:
        layout = "<" + code
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def string(self) -> str:
        start = self.file.tell()
        try:
            return self.take(self.number("Q")).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.fail(f"the string at byte {start} is not UTF-8") from error

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind != _ARRAY:
            raise self.fail(f"unknown value type {kind} before byte {self.file.tell()}")
        kind, count = self.number("I"), self.number("Q")
        if kind == _STRING:
            return [self.string() for _ in range(count)]
        if kind not in _SCALARS:
            raise self.fail(f"unknown array type {kind} before byte {self.file.tell()}")
        layout = "<" + _SCALARS[kind]
        return [
            item
            for (item,) in struct.iter_unpack(layout, self.take(count * struct.calcsize(layout)))
        ]

    def tensor(self) -> tuple[str, GGUFTensor]:
        """Returns a tensor's name, and it with its offset still counted from the data's start."""
        name, axes = self.string(), self.number("I")
        if not 1 <= axes <= 4:
            raise self.fail(f"tensor {name!r} has {axes} axes")
        shape = tuple(self.number("Q") for _ in range(axes))[::-1]
        code, offset = self.number("I"), self.number("Q")
        try:
            kind = gguf.GGMLQuantizationType(code)
        except ValueError as error:
            raise self.fail(f"tensor {name!r} has unknown type {code}") from error
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        if shape[-1] % block:
            raise self.fail(
                f"tensor {name!r} has rows of {shape[-1]}, not whole {kind.name} blocks"
            )
        return name, GGUFTensor(shape, kind, offset, shape[-1] // block * block_bytes)


def open_gguf(path: os.PathLike[str] | str) -> GGUFFile:
    """Returns the header of a GGUF file (version 2 or 3, little-endian).

    Raises:
        InputError: The file is missing, foreign, cut short or otherwise damaged.
    """
    path = Path(path)
    refuse_pickle(path)
    try:
        with open_regular(path) as file:
            return _read_header(_Header(file, path))
    except OSError as error:
        raise InputError(f"cannot read GGUF file {path}: {error.strerror}") from error


def _read_header(header: _Header) -> GGUFFile:
    magic = header.file.read(4)
    if magic != b"GGUF":
        raise header.fail(f"it begins with {magic!r} instead of b'GGUF'")
    version = header.number("I")
    if version not in _VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        shown = f"big-endian version {swapped}" if swapped in _VERSIONS else f"version {version}"
        raise header.fail(f"{shown} is not supported; versions 2 and 3, little-endian, are")
    num_tensors, num_fields = header.number("Q"), header.number("Q")
    fields: dict[str, Any] = {}
    for _ in range(num_fields):
        key = header.string()
        if key in fields:
            raise header.fail(f"key {key!r} occurs twice")
        kind = header.number("I")
        if key == "general.alignment" and _SCALARS.get(kind) != "I":
            raise header.fail(f"general.alignment has type {kind}, not that of a 32-bit number")
        fields[key] = header.value(kind)
    relative: dict[str, GGUFTensor] = {}
    for _ in range(num_tensors):
        name, tensor = header.tensor()
        if name in relative:
            raise header.fail(f"tensor {name!r} occurs twice")
        relative[name] = tensor
    alignment = fields.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise header.fail(f"general.alignment = {alignment!r} must be a whole number, 1 or more")
    data = -(-header.file.tell() // alignment) * alignment
    tensors: dict[str, GGUFTensor] = {}
    before, taken = "", 0
    for name, tensor in sorted(relative.items(), key=lambda item: item[1].offset):
        if tensor.offset % alignment:
            raise header.fail(
                f"tensor {name!r} begins at {tensor.offset}, no multiple of {alignment}"
            )
        if tensor.offset < taken:
            raise header.fail(f"tensors {before!r} and {name!r} overlap")
        end = data + tensor.offset + math.prod(tensor.shape[:-1]) * tensor.row_bytes
        if end > header.size:
            raise header.fail(
                f"tensor {name!r} ends at byte {end}, but the file has {header.size}; "
                "was the download cut short?"
            )
        before, taken = name, end - data
        tensors[name] = dataclasses.replace(tensor, offset=data + tensor.offset)
    return GGUFFile(header.path, fields, tensors)


def tensor_names(config: DecoderConfig) -> dict[str, str]:
    """Returns a file's name of each weight of `config`, `{}` standing for the layer's number."""
    return {name: _NAMES[name] for name in ("head", *config.weight_shapes())}


def _header(source: os.PathLike[str] | str | GGUFFile) -> GGUFFile:
    return source if isinstance(source, GGUFFile) else open_gguf(source)


def read_config(source: os.PathLike[str] | str | GGUFFile) -> DecoderConfig:
    """Returns the config of a GGUF file.

    Args:
        source: The file's path, or its header if that is already read.

    Raises:
        InputError: As `open_gguf` and `config_from_gguf`.
    """
    header = _header(source)
    factors = None
    if ROPE_FACTORS in header.tensors:
        tensor = header.tensors[ROPE_FACTORS]
        with ByteFile(header.path) as file:
            read = _tensor_reader(file, ROPE_FACTORS, tensor)
            factors = read(slice(0, tensor.shape[0]), slice(0, tensor.shape[-1])).reshape(-1)
    with naming(header.path):
        return config_from_gguf(header.fields, header.tensors, factors)


@contextlib.contextmanager
def open_weights(
    source: os.PathLike[str] | str | GGUFFile, config: DecoderConfig
) -> Iterator[dict[str, WeightReader]]:
    """Opens the weights of a GGUF file, to be read part by part.

    Args:
        source: The file's path, or its header if that is already read. Its tensors may have any of
            `GGUF_TYPES`, and others that `gguf.dequantize` knows.
        config: What `read_config` says of it.

    Yields:
        A reader of each weight by name, shaped as in `config.weight_shapes()`: quantised blocks
        turned into numbers, queries and keys in the order of half-rotation RoPE.

    Raises:
        InputError: As `open_gguf`; a tensor is missing, not expected, or of another shape.
    """
    header = _header(source)
    pairs = header.fields.get("general.architecture") == "llama"
    shapes = {name: tensor.shape for name, tensor in header.tensors.items() if name != ROPE_FACTORS}
    matched = match_tensors(header.path, config, tensor_names(config), shapes)
    with ByteFile(header.path) as file:

        def open_tensor(slot: Slot) -> TensorReader:
            read = _tensor_reader(file, slot.source, header.tensors[slot.source])
            if pairs and slot.target in ("blocks/q_proj", "blocks/k_proj"):
                return _halves_reader(read, config.head_dim, slot.shape[0])
            return read

        yield weight_readers(header.path, matched, config.weight_shapes(), open_tensor)


def read_weights(
    path: os.PathLike[str] | str, config: DecoderConfig, dtype: Any = "float32"
) -> dict[str, np.ndarray]:
    """Returns the weights of a GGUF file, whole and on the host.

    Args:
        path: As for `open_weights`.
        config: What `read_config` says of it.
        dtype: "float32" or "bfloat16"; norm weights are float32 either way.

    Returns:
        Weights by name, shaped as `config.weight_shapes()`.

    Raises:
        InputError: As `open_weights`; a tensor is of a type that cannot be read, or not finite.
    """
    with open_weights(path, config) as readers:
        return read_all(readers, dtype)


def _tensor_reader(file: ByteFile, name: str, tensor: GGUFTensor) -> TensorReader:
    block, block_bytes = gguf.GGML_QUANT_SIZES[tensor.type]

    def read(rows: slice, columns: slice) -> np.ndarray:
        if len(tensor.shape) == 1:
            # A tensor of one axis is a single row of bytes.
            return read_table(slice(0, 1), rows)[0]
        return read_table(rows, columns)

    def read_table(rows: slice, columns: slice) -> np.ndarray:
        # Whole blocks, of which the columns are then cut out.
        first, last = columns.start // block, -(-columns.stop // block)
        span = slice(first * block_bytes, last * block_bytes)
        data = file.read(tensor.offset, tensor.row_bytes, rows, span)
        try:
            # Damaged scales overflow to infinity, which `WeightReader.read` reports.
            with np.errstate(over="ignore", invalid="ignore"):
                values = gguf.dequantize(data, tensor.type)
        except NotImplementedError as error:
            raise InputError(
                f"{file.path}: tensor {name} has type {tensor.type.name}, which cannot be read; "
                f"convert the file to one of {', '.join(GGUF_TYPES)}"
            ) from error
        return values[:, columns.start - first * block : columns.stop - first * block]

    return read


def _halves_reader(read: TensorReader, head_dim: int, rows: int) -> TensorReader:
    """Returns `read` with each head's rows (2i, 2i+1) moved to (i, i + head_dim / 2)."""
    halves = np.arange(rows).reshape(-1, head_dim // 2, 2).swapaxes(1, 2).reshape(-1)

    def read_halves(wanted: slice, columns: slice) -> np.ndarray:
        # Rows move only within their head: read the heads that the range touches.
        first, last = (
            wanted.start // head_dim * head_dim,
            -(-wanted.stop // head_dim) * head_dim,
        )
        return read(slice(first, last), columns)[halves[wanted] - first]

    return read_halves
