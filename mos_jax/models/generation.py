"""Batched generation with a key-value cache and one compiled decode step.

Axis legend: B rows, S padded prompt length, T slots, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mos_jax.errors import InputError
from mos_jax.models.choosing import Controls, choose
from mos_jax.models.decoder import Decoder, FactorsSource
from mos_jax.models.kv_cache import Cache
from mos_jax.models.sharding import readable

# Prompts are padded to a multiple of this many tokens and slots likewise, so that few shapes, and
# few compilations, serve all lengths.
LENGTH_MULTIPLE = 32


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Build it with `create`, which checks the values.

    Attributes:
      max_new_tokens: tokens to generate at most, the end token included.
      temperature: 0 is greedy; otherwise logits are divided by it.
      top_p: sample from the smallest set of tokens whose probability reaches it (nucleus
        sampling, arXiv 1904.09751); 1 is all.
      seed: of the sampling noise; unused when greedy. A row's noise is a function of it, of the
        row's index and of the token's position.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    @classmethod
    def create(
        cls,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> Sampling:
        """Checks the values and builds it. Raises InputError."""
        if isinstance(max_new_tokens, bool) or max_new_tokens < 1:
            raise InputError(f"max_new_tokens must be an integer >= 1, got {max_new_tokens!r}")
        if not 0 <= temperature < float("inf"):
            raise InputError(f"temperature must be a finite number >= 0, got {temperature!r}")
        if not 0 < top_p <= 1:
            raise InputError(f"top_p must be above 0 and at most 1, got {top_p!r}")
        return cls(max_new_tokens, temperature, top_p, seed)


def generate(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    stop: Sequence[int],
    sampling: Sampling | None = None,
    factors: FactorsSource = None,
) -> list[list[int]]:
    """Continues every prompt.

    Args:
      model: the base.
      prompts: token ids of each row; not empty.
      stop: ids that end a row.
      sampling: default greedy, 64 tokens.
      factors: of the adapter, `adapter.factors()`; None for the base alone; or a callable of a
        block's index that is a pytree, such as `bank.for_rows(names)`, one name for each prompt.

    Returns:
      For each prompt, the new ids, without the stop id.

    Raises:
      InputError: for an empty prompt, a token id outside the vocabulary, a text that would grow
        beyond the positions the model knows, or a callable that is no pytree.
    """
    sampling = sampling if sampling is not None else Sampling.create()
    if not prompts:
        return []
    longest = _check_prompts(model, prompts, sampling)
    if callable(factors) and any(leaf is factors for leaf in jax.tree.leaves(factors)):
        raise InputError(
            "factors that are called must be a pytree here, such as bank.for_rows(names) or "
            f"jax.tree_util.Partial(LoRA.factors, adapter), got {factors!r}"
        )
    length = _round_up(longest)
    slots = _round_up(longest + sampling.max_new_tokens)
    tokens = np.zeros((len(prompts), length), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    lengths = jnp.asarray([len(prompt) for prompt in prompts], jnp.int32)
    controls = _controls(sampling, len(prompts))

    hidden, cache = _prefill(model, jnp.asarray(tokens), lengths, factors, slots)
    current = _choose(model, hidden, lengths, controls)
    stopping = set(stop)
    rows: list[list[int]] = [[] for _ in prompts]
    done = np.zeros(len(prompts), bool)
    for step in range(sampling.max_new_tokens):
        for row, token in enumerate(np.asarray(current).tolist()):
            if not done[row]:
                done[row] = token in stopping
                if not done[row]:
                    rows[row].append(token)
        if done.all() or step + 1 == sampling.max_new_tokens:
            break
        current, cache = _decode(
            model,
            current,
            lengths + step,
            cache,
            factors,
            controls,
        )
    return rows


def _check_prompts(model: Decoder, prompts: Sequence[Sequence[int]], sampling: Sampling) -> int:
    for row, prompt in enumerate(prompts):
        if not len(prompt):
            raise InputError(f"prompt {row} is empty; give at least one token")
        if min(prompt) < 0 or max(prompt) >= model.config.vocab_size:
            raise InputError(
                f"prompt {row} holds a token id outside 0..{model.config.vocab_size - 1}"
            )
    longest = max(map(len, prompts))
    if longest + sampling.max_new_tokens > model.config.max_positions:
        raise InputError(
            f"a prompt of {longest} tokens and max_new_tokens={sampling.max_new_tokens} exceed the "
            f"{model.config.max_positions} positions of {model.config.name}"
        )
    return longest


def _controls(sampling: Sampling, rows: int) -> Controls:
    # Rows that begin alike shall not go on alike, so the row is a part of the seed.
    seed = np.stack([np.full(rows, sampling.seed & 0xFFFFFFFF), np.arange(rows)], axis=1)
    return Controls(
        jnp.full(rows, sampling.temperature, jnp.float32),
        jnp.full(rows, sampling.top_p, jnp.float32),
        jnp.zeros(rows, jnp.int32),
        jnp.asarray(seed.astype(np.uint32)),
    )


def _round_up(length: int) -> int:
    return -(-length // LENGTH_MULTIPLE) * LENGTH_MULTIPLE


@functools.partial(jax.jit, static_argnames="slots")
def _prefill(
    model: Decoder, tokens: jax.Array, lengths: jax.Array, factors: FactorsSource, slots: int
) -> tuple[jax.Array, Cache]:
    # Filler behind a short prompt enters slots that the row's own next tokens overwrite before
    # any later position can see them.
    batch = tokens.shape[0]
    start = jnp.zeros(batch, jnp.int32)
    hidden, cache = model.extend(tokens, start, model.empty_cache(batch, slots), factors)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    return last, cache


@jax.jit
def _choose(
    model: Decoder, hidden: jax.Array, positions: jax.Array, controls: Controls
) -> jax.Array:
    """Picks the token at `positions`, int32 [B], of every row: hidden [B, d] -> int32 [B]."""
    return readable(choose(model.logits(hidden), positions, controls), model.mesh)


@functools.partial(jax.jit, donate_argnames="cache")
def _decode(
    model: Decoder,
    current: jax.Array,
    positions: jax.Array,
    cache: Cache,
    factors: FactorsSource,
    controls: Controls,
) -> tuple[jax.Array, Cache]:
    hidden, cache = model.extend(current[:, None], positions, cache, factors)
    chosen = choose(model.logits(hidden[:, 0]), positions + 1, controls)
    return readable(chosen, model.mesh), cache
