"""Reader of Hugging Face model folders.

A folder has `config.json` and either `model.safetensors` or several `*.safetensors` files listed in
`model.safetensors.index.json`. Weights come out under the names and shapes of
`DecoderConfig.weight_shapes`: layers stacked, projections transposed to [d_in, d_out].
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from mos_jax.errors import InputError
from mos_jax.models.config import DecoderConfig
from mos_jax.models.huggingface_config import config_from_huggingface
from mos_jax.models.layout import CHUNK, allocate_weights, fill, match_tensors, read_json

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
_DTYPES = ("F32", "F16", "BF16")
_INDEX = "model.safetensors.index.json"


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
    return config_from_huggingface(read_json(folder / "config.json"), folder.resolve().name)


def read_weights(
    path: os.PathLike[str] | str, config: DecoderConfig, dtype: Any = "float32"
) -> dict[str, np.ndarray]:
    """Returns the weights of a model folder.

    `rotary_emb.inv_freq` tensors of old checkpoints are skipped: they follow from the config. An
    `lm_head.weight` in a model whose config ties the embeddings is accepted when it equals the
    embedding, and refused otherwise, since it is then unclear which of the two is meant.

    Args:
        path: Folder with config.json and safetensors files (float32, float16 or bfloat16).
        config: What `read_config` says of it.
        dtype: "float32" or "bfloat16"; norm weights are float32 either way.

    Returns:
        Weights by name, shaped as `config.weight_shapes()`.

    Raises:
        InputError: A file is missing, damaged or foreign; a tensor is missing, not expected, of
            another shape or type, or not finite.
    """
    folder = Path(path)
    with contextlib.ExitStack() as stack:
        tensors = _open_tensors(folder, stack)
        found = {
            name: tuple(tensor.get_shape())
            for name, tensor in tensors.items()
            if not name.endswith("rotary_emb.inv_freq")
        }
        for name in found:
            kind = tensors[name].get_dtype()
            if kind not in _DTYPES:
                raise InputError(
                    f"{folder}: tensor {name} has type {kind}; only {', '.join(_DTYPES)} are read"
                )
        names = tensor_names(config)
        tied_head = config.tied_embeddings and found.pop(names["head"], None) is not None
        matched = match_tensors(folder, config, names, found)
        if tied_head:
            _check_tied(folder, tensors)
        # Only now: sizes of a damaged config could ask for any amount of memory.
        weights = allocate_weights(config, dtype)
        for slot in matched:
            offset = norm_offset(config) if slot.target.endswith("norm") else 0.0
            fill(weights, slot, _row_reader(tensors[slot.source], offset), folder)
    return weights


def _row_reader(tensor: Any, offset: float) -> Callable[[int, int], np.ndarray]:
    if not offset:
        return lambda start, stop: tensor[start:stop]
    return lambda start, stop: tensor[start:stop].astype(np.float32) + np.float32(offset)


def _open_tensors(folder: Path, stack: contextlib.ExitStack) -> dict[str, Any]:
    """Returns a lazy slice of every tensor by name; the files stay open as long as `stack`."""
    index, single = folder / _INDEX, folder / "model.safetensors"
    if index.is_file():
        listed = _read_index(folder, index)
        files = [folder / name for name in sorted(set(listed.values()))]
    elif single.is_file():
        listed, files = None, [single]
    else:
        pickled = sorted(p.name for s in ("*.bin", "*.pt", "*.pth") for p in folder.glob(s))
        hint = (
            f"; {pickled[0]} is a pickle, which can run code when read: convert it to safetensors "
            "(save_pretrained of transformers writes it)"
            if pickled
            else ""
        )
        raise InputError(f"{folder} has neither model.safetensors nor {_INDEX}{hint}")
    tensors: dict[str, Any] = {}
    for file in files:
        if not file.is_file():
            raise InputError(f"{file} is missing; {_INDEX} lists it")
        try:
            opened = stack.enter_context(safe_open(file, framework="numpy"))
            names = list(opened.keys())
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file} is not a whole safetensors file: {error}") from error
        for name in names:
            if listed is not None and listed.get(name) != file.name:
                raise InputError(f"{file} has tensor {name}, which {_INDEX} does not place there")
            tensors[name] = opened.get_slice(name)
    for name in (name for name in listed or () if name not in tensors):
        raise InputError(f"{folder}: tensor {name} is missing; {_INDEX} lists it")
    return tensors


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


def _check_tied(folder: Path, tensors: Mapping[str, Any]) -> None:
    embed, head = tensors[_NAMES["embed"]], tensors[_NAMES["head"]]
    rows, width = embed.get_shape()
    same = head.get_shape() == [rows, width]
    step = max(1, CHUNK // width)
    for start in range(0, rows if same else 0, step):
        stop = min(start + step, rows)
        same = same and np.array_equal(embed[start:stop], head[start:stop])
    if not same:
        raise InputError(
            f"{folder}: config.json ties the embeddings, but {_NAMES['head']} differs from "
            f"{_NAMES['embed']}; set tie_word_embeddings to false if the head is its own"
        )
