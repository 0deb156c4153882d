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
LOGITS_MIB = 128.0
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

    The weight is a constant, as all of the base is: it gets no gradient.

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
    weight = jax.lax.stop_gradient(_own_part(weight, axis, mesh))
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
            if divided:
                hidden = jax.lax.pcast(hidden, TENSOR, to="varying")
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
    size = chunk_size(hidden.shape[0], weight.shape[axis], limit)
    targets = targets - first
    if size == weight.shape[axis]:
        found = _score(_product(hidden, weight, axis), targets)
        found = Chunks(*(array[None] for array in found))
    else:
        found = _in_chunks(axis, size, hidden, weight, targets)
    return found._replace(best=found.best + first)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _in_chunks(
    axis: int, size: int, hidden: jax.Array, weight: jax.Array, targets: jax.Array
) -> Chunks:
    """`_score` chunk by chunk, each of `size` entries of the weight.

    JAX's own gradient of this loop would keep four arrays of a chunk's size where two do.
    """

    def of_chunk(start: jax.Array) -> Chunks:
        logits, there, begin = _chunk(axis, size, hidden, weight, targets, start)
        found = _score(logits, there)
        return found._replace(best=found.best + begin)

    return jax.lax.map(of_chunk, _starts(weight.shape[axis], size))


def _in_chunks_forward(
    axis: int, size: int, hidden: jax.Array, weight: jax.Array, targets: jax.Array
) -> tuple[Chunks, tuple[jax.Array, ...]]:
    found = _in_chunks(axis, size, hidden, weight, targets)
    return found, (hidden, weight, targets, found.total)


def _in_chunks_backward(
    axis: int, size: int, kept: tuple[jax.Array, ...], gradient: Chunks
) -> tuple[jax.Array, None, None]:
    hidden, weight, targets, totals = kept

    def add_chunk(so_far: jax.Array, scanned: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        start, total, of_total, of_target = scanned
        logits, there, _ = _chunk(axis, size, hidden, weight, targets, start)
        part = jnp.exp(logits - total[:, None]) * of_total[:, None]
        part = part + jnp.where(_is_target(there, size), of_target[:, None], jnp.float32(0))
        numbers = (((1,), (axis,)), ((), ()))
        rows = jax.lax.dot_general(
            part.astype(hidden.dtype),
            _slice(axis, size, weight, start)[0],
            numbers,
            preferred_element_type=jnp.float32,
        )
        return so_far + rows, None

    # Chunks are summed in fp32. Zeros made of `hidden`, so that within `shard_map` they count as
    # differing between devices, as the sum does.
    nothing = jnp.where(jnp.zeros((), bool), hidden.astype(jnp.float32), jnp.float32(0))
    starts = _starts(weight.shape[axis], size)
    scanned = (starts, totals, gradient.total, gradient.target)
    summed, _ = jax.lax.scan(add_chunk, nothing, scanned)
    return summed.astype(hidden.dtype), None, None


_in_chunks.defvjp(_in_chunks_forward, _in_chunks_backward)


def _starts(vocabulary: int, size: int) -> jax.Array:
    return jnp.arange(0, vocabulary, size, dtype=jnp.int32)


def _slice(
    axis: int, size: int, weight: jax.Array, start: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """A chunk of the weight and where it begins: the last one reaches back over the one before."""
    begin = jnp.minimum(start, jnp.int32(weight.shape[axis] - size))
    return jax.lax.dynamic_slice_in_dim(weight, begin, size, axis), begin


def _chunk(
    axis: int,
    size: int,
    hidden: jax.Array,
    weight: jax.Array,
    targets: jax.Array,
    start: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Logits of a chunk, which of them are the targets (-1: none), and where the chunk begins.

    Entries that the chunk before has are -inf, and no targets.
    """
    part, begin = _slice(axis, size, weight, start)
    logits = _product(hidden, part, axis)
    new = begin + jnp.arange(size, dtype=jnp.int32) >= start
    there = jnp.where(targets >= start, targets - begin, jnp.int32(-1))
    return jnp.where(new[None, :], logits, -jnp.inf), there, begin


def _score(logits: jax.Array, targets: jax.Array) -> Chunks:
    """The numbers of one chunk, each [N]; targets that are not in it match none of its entries."""
    # A sum of masked entries and not a gather, whose gradient would be an array of its own.
    is_target = _is_target(targets, logits.shape[1])
    return Chunks(
        jax.nn.logsumexp(logits, axis=1),
        jnp.sum(jnp.where(is_target, logits, jnp.float32(0)), axis=1),
        jax.lax.stop_gradient(jnp.max(logits, axis=1)),
        jnp.argmax(logits, axis=1).astype(jnp.int32),
    )


def _is_target(targets: jax.Array, size: int) -> jax.Array:
    return jnp.arange(size, dtype=jnp.int32)[None, :] == targets[:, None]


def _own_part(weight: jax.Array, axis: int, mesh: Mesh | None) -> jax.Array:
    """The weight, on a mesh divided along the vocabulary alone."""
    return constrain(weight, mesh, *((TENSOR, None) if axis == 0 else (None, TENSOR)))


@functools.partial(jax.named_call, name="head")
def _product(hidden: jax.Array, weight: jax.Array, axis: int) -> jax.Array:
    numbers = (((1,), (1 - axis,)), ((), ()))
    return jax.lax.dot_general(hidden, weight, numbers, preferred_element_type=jnp.float32)
