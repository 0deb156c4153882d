"""Which model a base is: a hash over its architecture and a sample of every weight."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence

import jax
import ml_dtypes
import numpy as np
from jax.experimental import multihost_utils

from mos_jax.errors import InputError
from mos_jax.models.config import DecoderConfig
from mos_jax.models.layout import Index

# Entries of each weight that enter a fingerprint, and up to twice as many.
SAMPLE = 4096
# Rounded to it before they are hashed, so that a model in fp32 and in bf16 is the same.
SAMPLE_DTYPE = np.dtype(ml_dtypes.bfloat16)


def sampled_entries(shape: Sequence[int]) -> tuple[np.ndarray, ...]:
    """The entries of a weight that are sampled: an index array for each axis."""
    size = int(np.prod(shape))
    flat = np.arange(0, size, max(1, size // SAMPLE))
    return np.unravel_index(flat, tuple(shape))


class Sampler:
    """Gathers the sample of one weight from its parts, in whatever order they come."""

    def __init__(self, shape: Sequence[int]):
        self._entries = sampled_entries(shape)
        self._values = np.zeros(self._entries[0].size, SAMPLE_DTYPE)
        self._seen = np.zeros(self._entries[0].size, bool)

    def see(self, index: Index, part: np.ndarray) -> None:
        """Takes what is sampled of the part at `index`."""
        inside = np.ones(self._seen.size, bool)
        for entries, axis in zip(self._entries, index, strict=True):
            inside &= (entries >= axis.start) & (entries < axis.stop)
        where = tuple(
            entries[inside] - axis.start for entries, axis in zip(self._entries, index, strict=True)
        )
        self._values[inside] = part[where]
        self._seen |= inside

    def sample(self) -> np.ndarray | None:
        """The sample; None while parts are missing, as where other hosts read them."""
        return self._values if self._seen.all() else None

    def fill_in(self) -> np.ndarray | None:
        """The sample with what other processes have seen; all of them call it together."""
        # The values as bits, and 0 where others know them: one of a kind goes over the wire.
        bits = np.where(self._seen, self._values.view(np.uint16), 0).astype(np.int32)
        everyone = multihost_utils.process_allgather(np.stack([bits, self._seen.astype(np.int32)]))
        self._values = everyone[:, 0].max(axis=0).astype(np.uint16).view(SAMPLE_DTYPE)
        self._seen = everyone[:, 1].any(axis=0)
        return self.sample()


def sample_array(weight: jax.Array | np.ndarray) -> np.ndarray:
    """The sample of a weight, each entry from a device of this host that holds it.

    Where processes hold different parts of the weight, all of them call it together.
    """
    shards = weight.addressable_shards if isinstance(weight, jax.Array) else []
    whole = weight.is_fully_addressable if isinstance(weight, jax.Array) else True
    if len(shards) < 2 and whole:
        return np.asarray(weight[sampled_entries(weight.shape)])
    sampler = Sampler(weight.shape)
    for shard in shards:
        axes = zip(shard.index, weight.shape, strict=True)
        sampler.see(tuple(slice(*axis.indices(size)[:2]) for axis, size in axes), shard.data)
    sample = sampler.sample() if whole else sampler.fill_in()
    if sample is None:
        raise InputError(
            f"a weight of shape {list(weight.shape)} is not whole on this host, so it has no "
            "fingerprint here"
        )
    return sample


def fingerprint(config: DecoderConfig, samples: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over the architecture and the sample of every weight, by its name."""
    digest = hashlib.sha256()
    digest.update(json.dumps(config.architecture(), sort_keys=True).encode())
    for name in sorted(samples):
        digest.update(name.encode() + samples[name].astype(SAMPLE_DTYPE).tobytes())
    return digest.hexdigest()
