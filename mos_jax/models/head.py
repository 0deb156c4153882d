"""From hidden states to logits, and to what a loss asks of logits.

A loss needs three numbers of the V logits of a token: their logsumexp, the target's, and which one
is largest. So they are computed in chunks of the vocabulary, and again chunk by chunk in the
backward pass, where all of them at one time would be large: for each chunk its own three numbers,
of which those of the whole vocabulary follow. (Of the same kind: Cut Cross-Entropy, arXiv
2411.09009.)

Axis legend: N tokens, d model width, V vocabulary, C entries of a chunk, K chunks.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from mos_jax.models.sharding import ROWS, TENSOR, constrain, fit_spec

# By default. Measured: see docs/fastest_step.md.
LOGITS_MIB = 64.0
# Chunks are whole multiples of this: what the matrix units of accelerators work in.
_LANES = 128


class Chunks(NamedTuple):
    """Of each of K chunks of the vocabulary and each token, [K, N].

    Attributes:
      total: fp32, logsumexp of the logits.
      target: fp32, the target's logit; 0 where it is in another chunk.
      largest: fp32, the largest logit; a constant in gradients.
      best: int32, the first token that has it.
    """

    total: jax.Array
    target: jax.Array
    largest: jax.Array
    best: jax.Array


def head_logits(hidden: jax.Array, weight: jax.Array, axis: int, mesh: Mesh | None) -> jax.Array:
    """The logits of tokens.

    Args:
      hidden: [N, d].
      weight: [V, d] or [d, V].
      axis: which one of its axes is V.
      mesh: of devices that divide N and V between them, or None.

    Returns:
      fp32 [N, V].
    """
    hidden = constrain(hidden, mesh, ROWS, None)
    logits = _product(hidden, _own_part(weight, axis, mesh), axis)
    return constrain(logits, mesh, ROWS, TENSOR)


def chunk_size(tokens: int, vocabulary: int, limit: float) -> int:
    """C: the vocabulary in as few chunks as keep N C fp32 logits within `limit` bytes.

    All of it if that is within the limit, or if the limit is 0; else a multiple of 128, and never
    less than that.
    """
    if limit <= 0 or tokens * vocabulary * 4 <= limit:
        return vocabulary
    most = max(int(limit / (4 * tokens * _LANES)), 1) * _LANES
    # As many chunks as that takes, and then of even size, so that the last one repeats little.
    chunks = math.ceil(vocabulary / most)
    return min(vocabulary, math.ceil(vocabulary / (chunks * _LANES)) * _LANES)


def score_targets(
    hidden: jax.Array,
    targets: jax.Array,
    weight: jax.Array,
    axis: int,
    mesh: Mesh | None,
    limit: float,
) -> tuple[jax.Array, jax.Array]:
    """Negative log likelihood and correctness of targets.

    Args:
      hidden: [N, d].
      targets: int32 [N].
      weight: [V, d] or [d, V].
      axis: which one of its axes is V.
      mesh: of devices that divide N and V between them, or None.
      limit: bytes of logits that may be on a device at one time, see `chunk_size`; 0: any.

    Returns:
      fp32 [N], nats; and bool [N], whether the target has the largest logit, the first of several.
    """
    weight = _own_part(weight, axis, mesh)
    if mesh is None:
        found = _score_chunks(hidden, targets, weight, jnp.int32(0), axis, limit)
    else:
        rows = fit_spec(hidden.shape, (ROWS, None), mesh.shape)
        # What each device holds of the vocabulary, it scores for its own rows.
        wanted = (TENSOR, None) if axis == 0 else (None, TENSOR)
        part = fit_spec(weight.shape, wanted, mesh.shape)
        divided = part[axis]
        starts = jnp.arange(mesh.shape[TENSOR] if divided else 1, dtype=jnp.int32)
        starts = starts * (weight.shape[axis] // starts.size)

        def own(
            hidden: jax.Array, targets: jax.Array, weight: jax.Array, start: jax.Array
        ) -> Chunks:
            return _score_chunks(hidden, targets, weight, start[0], axis, limit)

        found = jax.shard_map(
            own,
            mesh=mesh,
            in_specs=(rows, PartitionSpec(rows[0]), part, PartitionSpec(divided)),
            out_specs=PartitionSpec(divided, rows[0]),
        )(hidden, targets, weight, starts)
    first = jnp.argmax(found.largest, axis=0)[None, :]
    best = jnp.take_along_axis(found.best, first, axis=0)[0]
    return jax.nn.logsumexp(found.total, axis=0) - jnp.sum(found.target, axis=0), best == targets


def _score_chunks(
    hidden: jax.Array,
    targets: jax.Array,
    weight: jax.Array,
    first: jax.Array,
    axis: int,
    limit: float,
) -> Chunks:
    """What each chunk of `weight`, whose entry 0 is token `first`, knows of every token."""
    vocabulary, dtype = weight.shape[axis], hidden.dtype
    size = chunk_size(hidden.shape[0], vocabulary, limit)
    targets = targets - first

    if size == vocabulary:
        found = _score(_product(hidden, weight, axis), targets)
        return Chunks(*(array[None] for array in found))._replace(best=found.best[None] + first)

    # In fp32 outside, so that the gradients of the chunks are summed in it.
    hidden = hidden.astype(jnp.float32)

    def of_chunk(start: jax.Array) -> Chunks:
        # The last chunk reaches back over the one before and leaves out what it finds there.
        begin = jnp.minimum(start, jnp.int32(vocabulary - size))
        part = jax.lax.dynamic_slice_in_dim(weight, begin, size, axis)
        logits = _product(hidden.astype(dtype), part, axis)
        new = begin + jnp.arange(size, dtype=jnp.int32) >= start
        logits = jnp.where(new[None, :], logits, -jnp.inf)
        found = _score(logits, jnp.where(targets >= start, targets - begin, -1))
        return found._replace(best=found.best + first + begin)

    starts = jnp.arange(0, vocabulary, size, dtype=jnp.int32)
    # A scan has no common parts to find, so none need be hidden from XLA.
    return jax.lax.map(jax.checkpoint(of_chunk, prevent_cse=False), starts)


def _score(logits: jax.Array, targets: jax.Array) -> Chunks:
    """The numbers of one chunk, each [N]; targets that are not in it match none of its entries."""
    index = jnp.arange(logits.shape[1], dtype=jnp.int32)
    # A sum of masked entries and not a gather, whose gradient would be an array of its own.
    is_target = index[None, :] == targets[:, None]
    zero = jnp.zeros((), jnp.float32)
    return Chunks(
        jax.nn.logsumexp(logits, axis=1),
        jnp.sum(jnp.where(is_target, logits, zero), axis=1),
        jax.lax.stop_gradient(jnp.max(logits, axis=1)),
        jnp.argmax(logits, axis=1).astype(jnp.int32),
    )


def _own_part(weight: jax.Array, axis: int, mesh: Mesh | None) -> jax.Array:
    """The weight, on a mesh divided along the vocabulary alone."""
    return constrain(weight, mesh, *((TENSOR, None) if axis == 0 else (None, TENSOR)))


@functools.partial(jax.named_call, name="head")
def _product(hidden: jax.Array, weight: jax.Array, axis: int) -> jax.Array:
    numbers = (((1,), (1 - axis,)), ((), ()))
    return jax.lax.dot_general(hidden, weight, numbers, preferred_element_type=jnp.float32)
