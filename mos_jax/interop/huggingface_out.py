"""A model as a Hugging Face folder: config.json, safetensors, tokenizer, a card.

Axis legend: L blocks, h = d_in, o = d_out.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mos_jax.errors import InputError
from mos_jax.files import check_folder, check_space, fresh_folder, write_file
from mos_jax.interop.card import card_lines
from mos_jax.interop.safetensors_out import (
    DTYPES,
    Tensor,
    check_dtype,
    split_shards,
    write_shards,
)
from mos_jax.interop.tokenizer_files import (
    GENERATION_FILE,
    generation_file,
    special_ids,
    to_json,
    tokenizer_files,
)
from mos_jax.models.base import Base
from mos_jax.models.huggingface import norm_offset, tensor_names
from mos_jax.models.huggingface_config import config_to_huggingface
from mos_jax.models.layout import CHUNK
from mos_jax.models.quantized import dequantize

CONFIG_FILE = "config.json"
MAX_SHARD_BYTES = 5_000_000_000


@dataclasses.dataclass(frozen=True)
class ModelFolder:
    """What a model's folder consists of.

    Attributes:
      shards: names of the files of weights, with their tensors.
      dtype: of the tensors; norms may be in float32.
      files: all other files, by name.
    """

    shards: Mapping[str, list[Tensor]]
    dtype: str
    files: Mapping[str, bytes]

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.bytes for tensors in self.shards.values() for tensor in tensors)

    @property
    def bytes(self) -> int:
        """Bytes of the folder, but for headers and index of the weights."""
        return self.weight_bytes + sum(map(len, self.files.values()))


def plan_model(
    base: Base,
    *,
    dtype: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    card: Mapping[str, Mapping[str, Any]] | None = None,
) -> ModelFolder:
    """Works out what `write_model` would write, without writing anything; see there."""
    dtype = check_dtype(base.dtype if dtype is None else dtype)
    tensors = list(_tensors(base, dtype))
    config = config_to_huggingface(base.config) | special_ids(base.tokenizer)
    files = {
        CONFIG_FILE: to_json(config | {"torch_dtype": dtype}),
        GENERATION_FILE: generation_file(base.tokenizer),
        **tokenizer_files(base.tokenizer),
        "README.md": _readme(base, dtype, card).encode(),
    }
    return ModelFolder(split_shards(tensors, max_shard_bytes), dtype, files)


def write_model(
    path: str | os.PathLike[str],
    base: Base,
    *,
    dtype: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    card: Mapping[str, Mapping[str, Any]] | None = None,
    overwrite: bool = False,
) -> ModelFolder:
    """Writes a base, merged or not, as a folder that transformers loads.

    Tensors are written one by one: beyond the base, one block of one weight is in memory. The
    folder is written beside its place and then renamed. Read back, the weights are the same to the
    bit if `dtype` is the base's or a wider one: norm weights, which are fp32 in memory, are written
    in float32 where `dtype` would round them. Quantised weights are written as the numbers that
    they stand for.

    Args:
      path: the folder.
      base: the model.
      dtype: "float32", "bfloat16" or "float16", of the tensors; None = that of the base.
      max_shard_bytes: largest size of one file of weights; several get an index.
      card: sections of the README, each JSON values by name.
      overwrite: replace an earlier model at `path`, with all that is in its folder.

    Returns:
      What was written.

    Raises:
      InputError: for an unknown dtype, a shard size below 1, a value that `dtype` does not hold (by
        tensor), a disk without enough room; if the folder holds something and `overwrite` is not
        set, what it holds is no model, or it is the one that the base was read from.
    """
    path = Path(path)
    check_model_destination(path, base, overwrite)
    plan = plan_model(base, dtype=dtype, max_shard_bytes=max_shard_bytes, card=card)
    check_space(path, plan.bytes)
    with fresh_folder(path) as fresh:
        write_shards(fresh, plan.shards)
        for name, content in plan.files.items():
            write_file(fresh / name, content)
    return plan


def check_model_destination(path: Path, base: Base, overwrite: bool) -> None:
    """Raises InputError if `path` holds what must not be replaced by a model."""
    check_folder(path, overwrite, CONFIG_FILE, "model")
    source = base.tokenizer.folder
    if source is not None and source.resolve() == path.resolve():
        raise InputError(f"{path} is the folder of the base itself; choose another folder")


def _tensors(base: Base, dtype: str) -> Iterator[Tensor]:
    """The tensors of the folder, block by block."""
    config, weights = base.config, base.model.weights
    names, offset = tensor_names(config), norm_offset(config)
    stacked = [name for name in config.weight_shapes() if name.startswith("blocks/")]
    rest = [name for name in config.weight_shapes() if name not in stacked]
    order: list[tuple[str, int | None]] = [(name, None) for name in rest if name != "head"]
    order += [(name, layer) for layer in range(config.num_layers) for name in stacked]
    order += [(name, None) for name in rest if name == "head"]
    for name, layer in order:
        weight = weights[name]
        shape = weight.shape if layer is None else weight.shape[1:]
        is_norm = name.endswith("norm")
        # Projections are [o, h] in the file.
        transposed = len(shape) == 2 and name != "embed"
        yield Tensor(
            names[name].format(layer),
            tuple(shape[::-1] if transposed else shape),
            _norm_dtype(np.asarray(weight) - np.float32(offset), dtype) if is_norm else dtype,
            _pieces(weight, layer, transposed, offset if is_norm else 0.0),
        )


def _norm_dtype(values: np.ndarray, dtype: str) -> str:
    """`dtype` if it holds the values of a norm exactly, else float32."""
    with np.errstate(over="ignore"):
        same = np.array_equal(values.astype(DTYPES[dtype][1]).astype(np.float32), values)
    return dtype if same else "float32"


def _pieces(
    weight: Any, layer: int | None, transposed: bool, offset: float
) -> Callable[[], Iterator[np.ndarray]]:
    def pieces() -> Iterator[np.ndarray]:
        # One block at a time leaves the device, quantised ones as numbers.
        one = dequantize(weight if layer is None else weight[layer], np.float32)
        host = np.asarray(one)
        host = host.T if transposed else host
        if offset:
            host = host - np.float32(offset)
        rows = max(1, CHUNK // (host.shape[1] if host.ndim == 2 else 1))
        for start in range(0, host.shape[0], rows):
            yield host[start : start + rows]

    return pieces


def _readme(base: Base, dtype: str, card: Mapping[str, Mapping[str, Any]] | None) -> str:
    source = base.name.removesuffix(" (merged)")
    lines = [
        "---",
        f"base_model: {json.dumps(source)}",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags:",
        "- mos_jax",
        "---",
        "",
        f"# {' '.join(base.name.split())}",
        "",
        f"A {base.config.family} model of {base.config.num_parameters:,} parameters in {dtype}, "
        "written by mos_jax.",
    ]
    for title, values in (card or {}).items():
        lines += ["", f"## {title}", "", *card_lines(values)]
    lines += [
        "",
        "## Use",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model = AutoModelForCausalLM.from_pretrained("<this folder>")',
        'tokenizer = AutoTokenizer.from_pretrained("<this folder>")',
        "```",
    ]
    return "\n".join(lines) + "\n"
