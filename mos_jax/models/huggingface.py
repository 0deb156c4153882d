"""Reader of Hugging Face model folders.

A folder has `config.json` and either `model.safetensors` or several `*.safetensors` files listed in
`model.safetensors.index.json`. Weights come out under the names and shapes of
`DecoderConfig.weight_shapes`: layers stacked, projections transposed to [d_in, d_out].
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from mos_jax.errors import InputError, naming
from mos_jax.models.config import DecoderConfig
from mos_jax.models.huggingface_config import config_from_huggingface
from mos_jax.models.layout import (
    ByteFile,
    Slot,
    TensorReader,
    WeightReader,
    match_tensors,
    parts,
    read_all,
    weight_readers,
)
from mos_jax.reading import missing_file, read_json

_BLOCK = "model.layers.{}."
_NAMES = {
    "embed": "model.embed_tokens.weight",
    "head": "lm_head.weight",
    "final_norm": "model.norm.weight",
    "blocks/attn_norm": _BLOCK + "input_layernorm.weight",
    "blocks/mlp_norm": _BLOCK + "post_attention_layernorm.weight",
    "blocks/q_norm": _BLOCK + "self_attn.q_norm.weight",
    "blocks/k_norm": _BLOCK + "self_attn.k_norm.weight",
    "blocks/q_bias": _BLOCK + "self_attn.q_proj.bias",
    "blocks/k_bias": _BLOCK + "self_attn.k_proj.bias",
    "blocks/v_bias": _BLOCK + "self_attn.v_proj.bias",
    "blocks/q_proj": _BLOCK + "self_attn.q_proj.weight",
    "blocks/k_proj": _BLOCK + "self_attn.k_proj.weight",
    "blocks/v_proj": _BLOCK + "self_attn.v_proj.weight",
    "blocks/o_proj": _BLOCK + "self_attn.o_proj.weight",
    "blocks/gate_proj": _BLOCK + "mlp.gate_proj.weight",
    "blocks/up_proj": _BLOCK + "mlp.up_proj.weight",
    "blocks/down_proj": _BLOCK + "mlp.down_proj.weight",
}
# With norms behind the sublayers, "post_attention_layernorm" is what it says.
_POST_NORM_NAMES = {
    "blocks/attn_post_norm": _BLOCK + "post_attention_layernorm.weight",
    "blocks/mlp_norm": _BLOCK + "pre_feedforward_layernorm.weight",
    "blocks/mlp_post_norm": _BLOCK + "post_feedforward_layernorm.weight",
}
_DTYPES = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_INDEX = "model.safetensors.index.json"
_TEXT_PREFIX, _IMAGE_PREFIXES = "language_model.", ("vision_tower.", "multi_modal_projector.")


def tensor_names(config: DecoderConfig) -> dict[str, str]:
    """Returns a folder's name of each weight of `config`, `{}` standing for the layer's number.

    "head" is always among them: some folders hold a head that equals the embedding.
    """
    names = _NAMES | (_POST_NORM_NAMES if config.post_norms else {})
    return {name: names[name] for name in ("head", *config.weight_shapes())}


def norm_offset(config: DecoderConfig) -> float:
    """Returns what a folder's norm weights lack of the factor: Gemma's files hold it less 1."""
    return 1.0 if config.family == "gemma3" else 0.0


def read_config(path: os.PathLike[str] | str) -> DecoderConfig:
    """Returns the config of a model folder, named after the folder.

    Raises:
        InputError: No such folder, or `config_from_huggingface` refuses its config.json.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise InputError(f"model folder {path} does not exist or is not a folder")
    file = folder / "config.json"
    with naming(file):
        return config_from_huggingface(read_json(file), folder.resolve().name)


@contextlib.contextmanager
def open_weights(
    path: os.PathLike[str] | str, config: DecoderConfig
) -> Iterator[dict[str, WeightReader]]:
    """Opens the weights of a model folder, to be read part by part.

    `rotary_emb.inv_freq` tensors of old checkpoints are skipped: they follow from the config. So
    are the image encoder and its projector of a Gemma 3 that has them. An
    `lm_head.weight` in a model whose config ties the embeddings is accepted when it equals the
    embedding, and refused otherwise, since it is then unclear which of the two is meant.

    Args:
        path: Folder with config.json and safetensors files (float32, float16 or bfloat16).
        config: What `read_config` says of it.

    Yields:
        A reader of each weight by name, shaped as in `config.weight_shapes()`.

    Raises:
        InputError: A file is missing, damaged or foreign; a tensor is missing, not expected, or of
            another shape or type.
    """
    folder = Path(path)
    with contextlib.ExitStack() as stack:
        tensors = _open_tensors(folder, stack)
        if config.family == "gemma3":
            tensors = _language_model(tensors)
        found = {
            name: tensor.shape
            for name, tensor in tensors.items()
            if not name.endswith("rotary_emb.inv_freq")
        }
        for name in found:
            kind = tensors[name].type
            if kind not in _DTYPES:
                raise InputError(
                    f"{folder}: tensor {name} has type {kind}; only {', '.join(_DTYPES)} are read"
                )
        names = tensor_names(config)
        tied_head = config.tied_embeddings and found.pop(names["head"], None) is not None
        matched = match_tensors(folder, config, names, found)
        if tied_head:
            _check_tied(folder, tensors)

        def open_tensor(slot: Slot) -> TensorReader:
            read = tensors[slot.source].read
            offset = norm_offset(config) if slot.target.endswith("norm") else 0.0
            if not offset:
                return read
            return lambda *part: read(*part).astype(np.float32) + np.float32(offset)

        yield weight_readers(folder, matched, config.weight_shapes(), open_tensor)


def read_weights(
    path: os.PathLike[str] | str, config: DecoderConfig, dtype: Any = "float32"
) -> dict[str, np.ndarray]:
    """Returns the weights of a model folder, whole and on the host.

    Args:
        path: As for `open_weights`.
        config: What `read_config` says of it.
        dtype: "float32" or "bfloat16"; norm weights are float32 either way.

    Returns:
        Weights by name, shaped as `config.weight_shapes()`.

    Raises:
        InputError: As `open_weights`, or a value is not finite.
    """
    with open_weights(path, config) as readers:
        return read_all(readers, dtype)


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """Where one tensor lies in a safetensors file."""

    file: ByteFile
    type: str
    shape: tuple[int, ...]
    offset: int

    def read(self, rows: slice, columns: slice) -> np.ndarray:
        """A part of it; see `TensorReader`."""
        kind = _DTYPES[self.type]
        width = 1 if len(self.shape) == 1 else self.shape[1]
        span = slice(columns.start * kind.itemsize, columns.stop * kind.itemsize)
        values = self.file.read(self.offset, width * kind.itemsize, rows, span).view(kind)
        return values[:, 0] if len(self.shape) == 1 else values


def _open_tensors(folder: Path, stack: contextlib.ExitStack) -> dict[str, _Tensor]:
    """Returns where every tensor lies, by name; the files stay open as long as `stack`."""
    index, single = folder / _INDEX, folder / "model.safetensors"
    if index.is_file():
        listed = _read_index(folder, index)
        files = [folder / name for name in sorted(set(listed.values()))]
    elif single.is_file():
        listed, files = None, [single]
    else:
        raise missing_file(folder, f"{folder} has neither model.safetensors nor {_INDEX}")
    tensors: dict[str, _Tensor] = {}
    for file in files:
        if not file.is_file():
            raise InputError(f"{file} is missing; {_INDEX} lists it")
        for name, tensor in _read_header(file, stack).items():
            if listed is not None and listed.get(name) != file.name:
                raise InputError(f"{file} has tensor {name}, which {_INDEX} does not place there")
            tensors[name] = tensor
    for name in (name for name in listed or () if name not in tensors):
        raise InputError(f"{folder}: tensor {name} is missing; {_INDEX} lists it")
    return tensors


def _language_model(tensors: dict[str, _Tensor]) -> dict[str, _Tensor]:
    """Returns the tensors of the language model of a Gemma 3 with an image encoder.

    Its prefix is left out, and so are the tensors of the image part; any others stay. Of a model
    for text alone these are all tensors.
    """
    if not any(name.startswith(_TEXT_PREFIX) for name in tensors):
        return tensors
    return {
        name.removeprefix(_TEXT_PREFIX): tensor
        for name, tensor in tensors.items()
        if not name.startswith(_IMAGE_PREFIXES)
    }


def _read_header(path: Path, stack: contextlib.ExitStack) -> dict[str, _Tensor]:
    """Returns where the tensors of one file lie; it stays open as long as `stack`."""
    try:
        # Checks the file: sizes, types, and that the tensors fill it without a gap or an overlap.
        with safe_open(path, framework="numpy") as checked:
            names = list(checked.keys())
        file = stack.enter_context(ByteFile(path))
        length = int.from_bytes(file.read(0, 8, slice(0, 1), slice(0, 8)).tobytes(), "little")
        header = json.loads(file.read(8, length, slice(0, 1), slice(0, length)).tobytes())
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is not a whole safetensors file: {error}") from error
    if not all(isinstance(header[name], dict) for name in names):
        # The library also takes an entry's values in a list, without their names.
        raise InputError(f"{path} is not a whole safetensors file: an entry is no object")
    return {
        name: _Tensor(
            file,
            header[name]["dtype"],
            tuple(header[name]["shape"]),
            8 + length + header[name]["data_offsets"][0],
        )
        for name in names
    }


def _read_index(folder: Path, index: Path) -> dict[str, str]:
    """Returns the file name of each tensor, every one a plain name inside the folder."""
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise InputError(f"{index} has no weight_map from tensor to file")
    for tensor, file in listed.items():
        plain = isinstance(file, str) and PurePosixPath(file).name == file and "\\" not in file
        if not plain or not file.endswith(".safetensors"):
            raise InputError(
                f"{index} places tensor {tensor} in {file!r}; "
                f"it must be the name of a .safetensors file in {folder}"
            )
    return listed


def _check_tied(folder: Path, tensors: Mapping[str, _Tensor]) -> None:
    embed, head = tensors[_NAMES["embed"]], tensors[_NAMES["head"]]
    same = head.shape == embed.shape
    for index in parts(embed.shape, 0) if same else ():
        same = same and np.array_equal(embed.read(*index), head.read(*index))
    if not same:
        raise InputError(
            f"{folder}: config.json ties the embeddings, but {_NAMES['head']} differs from "
            f"{_NAMES['embed']}; set tie_word_embeddings to false if the head is its own"
        )
