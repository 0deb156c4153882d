"""The dense step: forward and backward to the adapter's gradients, loss on every position.

Three contestants in JAX: `base`, the frozen base's forward pass and gradient of its input, which
is the floor for any adapter; `lora`; and `mos`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from numpy.typing import NDArray

from experiments.bench.worker import Facts
from mos_jax.adapters.adapter import Adapter, AdapterConfig
from mos_jax.adapters.lora import LoRAConfig
from mos_jax.adapters.methods import create_adapter
from mos_jax.data.batches import Batch
from mos_jax.evaluation.loss import summed_loss
from mos_jax.models.base import load_base
from mos_jax.models.decoder import Decoder
from mos_jax.training.step import AdapterParts


def dense_tokens(vocabulary: int, rows: int, width: int) -> NDArray[np.int32]:
    """Random tokens, the same on both sides: the time does not depend on them."""
    return np.random.default_rng(0).integers(0, vocabulary, (rows, width), np.int32)


def dense_batch(tokens: NDArray[np.int32]) -> Batch:
    """Whole rows of one text each, logits everywhere, every token but the first a target."""
    columns = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    weights = np.ones(tokens.shape, np.float32)
    weights[:, -1] = 0
    return Batch(
        tokens=tokens,
        positions=columns,
        segments=np.ones_like(tokens),
        loss_positions=columns,
        loss_targets=np.roll(tokens, -1, axis=1),
        loss_weights=weights,
        loss_examples=np.zeros_like(tokens),
    )


class JaxDense:
    """The side of the three; see `worker.Side`."""

    def __init__(self, base: str, remat: str, mos: AdapterConfig, rank: int, shape: list[int]):
        self._base = load_base(base, "float32", remat)
        tokens = dense_tokens(self._base.config.vocab_size, *shape)
        self._batch = jax.device_put(dense_batch(tokens))
        self._adapters = {"lora": LoRAConfig(rank=rank), "mos": mos}
        self._calls: dict[str, tuple[Any, tuple[Any, ...]]] = {}

    def prepare(self) -> dict[str, Facts]:
        """Compiles the three."""
        model = self._base.model
        embedded = model.embed_tokens(self._batch.tokens)
        found = {"base": self._compile("base", _base_loss, embedded, model, self._batch)}
        for name, config in self._adapters.items():
            adapter = create_adapter(config, self._base.sites, jax.random.key(0))
            found[name] = self._compile(name, *_adapter_loss(adapter), model, self._batch)
            found[name]["trained_parameters"] = adapter.count_trained()
        return found

    def _compile(self, name: str, loss: Any, *arguments: Any) -> Facts:
        step = jax.value_and_grad(loss)
        start = time.perf_counter()
        compiled = jax.jit(step).lower(*arguments).compile()
        seconds = time.perf_counter() - start
        self._calls[name] = compiled, arguments
        memory: Any = compiled.memory_analysis()
        return {
            "start_seconds": seconds,
            "temp_bytes": memory.temp_size_in_bytes,
            "flops": count_flops(jax.make_jaxpr(step)(*arguments)),
            "loss": float(compiled(*arguments)[0]),
        }

    def run(self, contestant: str) -> float:
        """One step."""
        compiled, arguments = self._calls[contestant]
        start = time.perf_counter()
        jax.block_until_ready(compiled(*arguments))
        return time.perf_counter() - start


class _Embedded:
    """A base whose tokens are embedded already, so that the loss can be differentiated by them."""

    def __init__(self, model: Decoder, embedded: jax.Array):
        self._model, self._embedded = model, embedded
        self.score = model.score

    def hidden(self, tokens: jax.Array, factors: None, **options: Any) -> jax.Array:
        return self._model.transform(self._embedded, factors, **options)


def _mean_loss(model: Any, factors: Any, batch: Batch) -> jax.Array:
    return summed_loss(cast(Decoder, model), factors, batch) / jnp.sum(batch.loss_weights)


def _base_loss(embedded: jax.Array, model: Decoder, batch: Batch) -> jax.Array:
    return _mean_loss(_Embedded(model, embedded), None, batch)


def _adapter_loss(adapter: Adapter) -> tuple[Any, nnx.State, AdapterParts]:
    parts, trained = AdapterParts.split(adapter)

    def loss(trained: nnx.State, parts: AdapterParts, model: Decoder, batch: Batch) -> jax.Array:
        return _mean_loss(model, parts.merge(trained).factors(), batch)

    return loss, trained, parts


def count_flops(jaxpr: Any) -> int:
    """Operations of all matrix products of a jaxpr as traced, those of a scan times its length.

    (XLA's own count takes the body of a loop once.)
    """
    total = 0
    for equation, times in matrix_products(jaxpr):
        (contracted, _), _ = equation.params["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        width = math.prod(shape[axis] for axis in contracted)
        total += times * 2 * equation.outvars[0].aval.size * width
    return total


def matrix_products(jaxpr: Any, times: int = 1) -> Iterator[tuple[Any, int]]:
    """All matrix products of a jaxpr, each with how often it runs."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation, times
        inner = times * equation.params["length"] if equation.primitive.name == "scan" else times
        for value in jax.tree.leaves(equation.params, is_leaf=_is_jaxpr):
            if _is_jaxpr(value):
                yield from matrix_products(value, inner)


def _is_jaxpr(value: Any) -> bool:
    return hasattr(value, "eqns") or hasattr(value, "jaxpr")
