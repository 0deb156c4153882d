"""The training step, a pure function of pytrees."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from mos_jax.adapters.adapter import Adapter
from mos_jax.data.batches import Batch
from mos_jax.distributed.partition import Placement
from mos_jax.evaluation.loss import summed_loss
from mos_jax.models.decoder import Decoder, FactorsSource


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a step reads and writes.

    Attributes:
      step: int32 [], optimiser steps done.
      trained: the adapter's `nnx.Param`s.
      optimizer: optax state.
      key: of dropout; the key of a step is this one folded with its number.
    """

    step: jax.Array
    trained: nnx.State
    optimizer: optax.OptState
    key: jax.Array


@dataclasses.dataclass(frozen=True)
class AdapterParts:
    """An adapter split into what trains and what does not; `merge` puts it together again."""

    graphdef: nnx.GraphDef
    frozen: nnx.State

    @classmethod
    def split(cls, adapter: Adapter) -> tuple[AdapterParts, nnx.State]:
        """Returns the parts and the trained arrays."""
        graphdef, trained, *rest = nnx.split(adapter, nnx.Param, ...)
        return cls(graphdef, rest[0]), trained

    def merge(self, trained: nnx.State) -> Adapter:
        """The adapter with these trained arrays."""
        return nnx.merge(self.graphdef, trained, self.frozen)


jax.tree_util.register_dataclass(AdapterParts, data_fields=["frozen"], meta_fields=["graphdef"])


def initial_state(
    trained: nnx.State, optimizer: optax.GradientTransformation, key: jax.Array
) -> TrainState:
    """The state before the first step."""
    return TrainState(jnp.int32(0), trained, optimizer.init(trained), key)


TrainStep = Callable[..., tuple[TrainState, dict[str, jax.Array]]]

# What the base is given, by `TrainingSection.assembly`.
SOURCES: dict[str, Callable[[Adapter], FactorsSource]] = {
    "before": lambda adapter: adapter.factors(),
    "inside": lambda adapter: adapter.factors,
}


def make_train_step(
    optimizer: optax.GradientTransformation,
    dropout: float = 0.0,
    accumulation: int = 1,
    placement: Placement | None = None,
    assembly: str = "before",
) -> jax.stages.Wrapped:
    """`pure_train_step` for compilation; the state is donated.

    With a placement, state, parts, model and batch lie on its mesh, and the new state lies where
    the old one did.
    """
    step = pure_train_step(optimizer, dropout, accumulation, assembly)
    if placement is None:
        return jax.jit(step, donate_argnums=0)

    def placed_step(
        state: TrainState, parts: AdapterParts, model: Decoder, batch: Batch
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        advanced, metrics = step(state, parts, model, batch)
        advanced = jax.lax.with_sharding_constraint(advanced, placement.shardings(advanced))
        return advanced, jax.lax.with_sharding_constraint(metrics, placement.everywhere)

    return jax.jit(placed_step, donate_argnums=0)


def make_stacked_step(
    optimizer: optax.GradientTransformation,
    dropout: float = 0.0,
    accumulation: int = 1,
    assembly: str = "before",
) -> jax.stages.Wrapped:
    """One step of K runs that share a base, for compilation.

    It is `pure_train_step` mapped over a leading axis K of state, frozen arrays, batch and
    metrics; the model has no such axis, so each of its weights enters one product with the tokens
    of all runs. Nothing is summed over K: a run does not notice its neighbours. The states are
    donated.
    """
    step = pure_train_step(optimizer, dropout, accumulation, assembly)
    return jax.jit(jax.vmap(step, in_axes=(0, 0, None, 0)), donate_argnums=0)


def pure_train_step(
    optimizer: optax.GradientTransformation,
    dropout: float = 0.0,
    accumulation: int = 1,
    assembly: str = "before",
) -> TrainStep:
    """Builds the step `(state, parts, model, batch) -> (state, metrics)`, a pure function.

    With `accumulation` A above 1, `batch` has a leading axis A; gradients of the A batches are
    summed in a scan and divided by the number of all their targets, so the step equals that of one
    batch that holds them all. Metrics: `loss` (nats per target token) and `gradient_norm`, both
    fp32 []. `assembly`: see `TrainingSection`.
    """

    def train_step(
        state: TrainState, parts: AdapterParts, model: Decoder, batch: Batch
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(state.key, state.step)

        def loss_of(trained: nnx.State, micro: Batch, index: jax.Array) -> jax.Array:
            noise = (jax.random.fold_in(key, index), dropout) if dropout else None
            factors = SOURCES[assembly](parts.merge(trained))
            return summed_loss(model, factors, micro, noise)

        def accumulate(carry: Any, scanned: Any) -> tuple[Any, None]:
            micro, index = scanned
            found = jax.value_and_grad(loss_of)(state.trained, micro, index)
            return jax.tree.map(jnp.add, carry, found), None

        if accumulation == 1:
            loss, gradient = jax.value_and_grad(loss_of)(state.trained, batch, jnp.int32(0))
        else:
            zeros = (jnp.float32(0), jax.tree.map(jnp.zeros_like, state.trained))
            indices = jnp.arange(accumulation, dtype=jnp.int32)
            (loss, gradient), _ = jax.lax.scan(accumulate, zeros, (batch, indices))
        targets = jnp.maximum(jnp.sum(batch.loss_weights), 1.0)
        gradient = jax.tree.map(lambda g: g / targets, gradient)
        updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.trained)
        metrics = {"loss": loss / targets, "gradient_norm": optax.tree.norm(gradient)}
        advanced = TrainState(
            state.step + 1,
            optax.apply_updates(state.trained, updates),
            optimizer_state,
            state.key,
        )
        return advanced, metrics

    return train_step
