"""Whether two sets of factors make the same model."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from mos_jax.adapters.low_rank import Factors
from mos_jax.errors import InputError
from mos_jax.models.decoder import Decoder

# Tokens on which what was written or merged is compared: two rows, as of a batch.
PROBE_ROWS, PROBE_LENGTH = 2, 32


def probe_tokens(vocab_size: int) -> np.ndarray:
    """Ids spread over a whole vocabulary, int32 [2, 32]; which ones does not matter."""
    ids = np.linspace(0, vocab_size - 1, PROBE_ROWS * PROBE_LENGTH).astype(np.int32)
    return ids.reshape(PROBE_ROWS, PROBE_LENGTH)


def probe_logits(model: Decoder, factors: Factors | None = None) -> np.ndarray:
    """The logits of the probe tokens, fp32 [2, 32, V], on the host.

    For comparing models that are not in memory at the same time.

    Raises:
      InputError: if the factors do not fit the base.
    """
    tokens = jnp.asarray(probe_tokens(model.config.vocab_size))
    return np.asarray(_logits(model, tokens, None if factors is None else dict(factors)))


def largest_difference(a: np.ndarray, b: np.ndarray) -> float:
    """The largest absolute difference of two sets of logits; nan where either has one."""
    with np.errstate(invalid="ignore"):  # inf - inf
        return float(np.max(np.abs(a - b)))


def largest_logit_difference(
    model: Decoder,
    tokens: jax.Array | np.ndarray,
    factors_a: Factors | None,
    factors_b: Factors | None,
) -> float:
    """Runs a base with two sets of factors and compares.

    Args:
      model: the base.
      tokens: int32 [B, S]. Both sets of logits, fp32 [B, S, V], are in memory at once.
      factors_a: factors of any sites, or None for the untouched base.
      factors_b: likewise.

    Returns:
      The largest absolute difference of two logits (nats); nan where either model gives nan.

    Raises:
      InputError: if the tokens are not int32 [B, S] of the vocabulary, or the factors do not fit
        the base.
    """
    host, vocabulary = np.asarray(tokens), model.config.vocab_size
    if host.ndim != 2 or host.dtype != np.int32 or host.size == 0:
        raise InputError(
            f"tokens must be int32 [B, S] with at least one token, got {host.dtype} "
            f"{list(host.shape)}"
        )
    # JAX would clamp them without a word.
    if host.min() < 0 or host.max() >= vocabulary:
        raise InputError(
            f"tokens must lie between 0 and {vocabulary - 1}, got {host.min()} to {host.max()}"
        )
    a, b = (None if f is None else dict(f) for f in (factors_a, factors_b))
    return float(_largest_difference(model, jnp.asarray(host), a, b))


@jax.jit
def _logits(model: Decoder, tokens: jax.Array, factors: Factors | None) -> jax.Array:
    return model(tokens, factors)


@jax.jit
def _largest_difference(
    model: Decoder, tokens: jax.Array, a: Factors | None, b: Factors | None
) -> jax.Array:
    return jnp.max(jnp.abs(model(tokens, a) - model(tokens, b)))
