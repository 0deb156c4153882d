"""Runs as one: their states, frozen arrays and batches with a leading axis, one base for all.

Axis legend: K runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from mos_jax.adapters.adapter import Adapter
from mos_jax.data.batches import Batch
from mos_jax.errors import InputError
from mos_jax.training.checkpoint import state_from_tree
from mos_jax.training.config import RunConfig
from mos_jax.training.optimizer import make_stackable_optimizer
from mos_jax.training.resuming import differences
from mos_jax.training.session import Loads, Session
from mos_jax.training.step import AdapterParts, TrainState, make_stacked_step

# What the runs of one step may have of their own. Not every method has a routing seed.
MAY_DIFFER = ("training.seed", "training.learning_rate", "adapter.routing_seed")


def check_stackable(configs: Sequence[RunConfig]) -> None:
    """Raises InputError unless the runs differ in fields of `MAY_DIFFER` and in nothing else."""
    if not configs:
        raise InputError("no runs to stack; give at least one config")
    mesh = configs[0].mesh
    if (mesh.data, mesh.fsdp, mesh.tensor) != (1, 1, 1):
        raise InputError(
            f"stacked runs take their steps on one device, but mesh.data={mesh.data}, mesh.fsdp="
            f"{mesh.fsdp}, mesh.tensor={mesh.tensor}; set all three to 1, or train the runs one "
            "by one"
        )
    first = configs[0].to_dict()
    for number, config in enumerate(configs[1:], start=1):
        for name, (ours, theirs) in differences(first, config.to_dict()).items():
            if name not in MAY_DIFFER:
                raise InputError(
                    f"runs 0 and {number} cannot be stacked: {name} is {ours!r} and {theirs!r}; "
                    f"only {', '.join(MAY_DIFFER)} may differ"
                )
    marks = [mark(config) for config in configs]
    for number, own in enumerate(marks):
        if own in marks[:number]:
            raise InputError(
                f"runs {marks.index(own)} and {number} are the same: {own}; stack each once"
            )


def mark(config: RunConfig) -> dict[str, Any]:
    """What tells a run from the others of its group, as JSON values."""
    resolved = config.to_dict()
    found = {}
    for name in MAY_DIFFER:
        section, field = name.split(".")
        if field in resolved[section]:
            found[name] = resolved[section][field]
    return found


@dataclasses.dataclass(frozen=True)
class Group:
    """K runs that take their steps together.

    Attributes:
      sessions: one each, on the same base and data; their optimisers keep the rate in the state.
    """

    sessions: tuple[Session, ...]

    @classmethod
    def create(cls, configs: Sequence[RunConfig], loads: Loads | None = None) -> Self:
        """Loads base and data once and builds all adapters. Raises InputError; writes nothing."""
        check_stackable(configs)
        loads = Loads() if loads is None else loads
        sessions = []
        for config in configs:
            session = Session.create(config, loads)
            optimizer = make_stackable_optimizer(config.training, config.adapter.rate_ratios())
            sessions.append(dataclasses.replace(session, optimizer=optimizer))
        return cls(tuple(sessions))

    def __len__(self) -> int:
        """Returns K."""
        return len(self.sessions)

    def initial(self) -> tuple[TrainState, AdapterParts]:
        """The states before the first step and the adapters' parts, every array [K, ...]."""
        return _stack_runs([session.initial() for session in self.sessions])

    def train_step(self) -> jax.stages.Wrapped:
        """The compiled step; see `make_stacked_step`."""
        section = self.sessions[0].config.training
        optimizer = self.sessions[0].optimizer
        return make_stacked_step(optimizer, section.dropout, section.accumulation, section.assembly)

    def adapter(self, number: int, state: TrainState, parts: AdapterParts) -> Adapter:
        """The adapter of run `number`."""
        # Its own definition, which holds its own configuration, with its slice of the arrays.
        own, _ = AdapterParts.split(self.sessions[number].adapter)
        frozen = unstack(parts.frozen, number)
        return AdapterParts(own.graphdef, frozen).merge(unstack(state.trained, number))

    def restore(self, tree: dict[str, Any]) -> tuple[TrainState, AdapterParts]:
        """From what `state_as_tree` made of stacked runs.

        Raises:
          InputError: if an adapter's arrays are not those of its configuration.
        """
        return _stack_runs(
            [
                state_from_tree(unstack(tree, number), session.adapter)
                for number, session in enumerate(self.sessions)
            ]
        )


def _stack_runs(runs: Sequence[tuple[TrainState, AdapterParts]]) -> tuple[TrainState, AdapterParts]:
    states = [state for state, _ in runs]
    # The definitions differ in the routing seed, which no computation reads.
    parts = AdapterParts(runs[0][1].graphdef, stack([parts.frozen for _, parts in runs]))
    return stack(states), parts


def stack(trees: Sequence[Any]) -> Any:
    """Trees of arrays as one, every leaf [K, ...]."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def unstack(tree: Any, number: int) -> Any:
    """Tree `number` of stacked ones."""
    return jax.tree.map(lambda leaf: leaf[number], tree)


def stack_batches(batches: Sequence[Batch]) -> Batch:
    """The batches of K runs, on the host: every array [K, ...]."""
    return Batch._make(map(np.stack, zip(*batches, strict=True)))


@jax.jit
def silence(state: TrainState, failed: jax.Array) -> tuple[TrainState, jax.Array]:
    """Sets the arrays of runs that failed to zero and looks which runs are finite.

    A run that diverged would otherwise put values into checkpoints that none may hold; zeros are
    also cheap to compute with.

    Args:
      state: of K runs.
      failed: bool [K].

    Returns:
      The state, and bool [K]: whether all trained arrays and the optimiser's are finite, of runs
      that did not fail. The others count as finite.
    """

    def quiet(leaf: jax.Array) -> jax.Array:
        return jnp.where(_across(failed, leaf), jnp.zeros((), leaf.dtype), leaf)

    trained, optimizer = jax.tree.map(quiet, (state.trained, state.optimizer))
    finite = [
        jnp.all(jnp.isfinite(leaf), axis=tuple(range(1, leaf.ndim)))
        for leaf in jax.tree.leaves((trained, optimizer))
        if jnp.issubdtype(leaf.dtype, jnp.floating)
    ]
    kept = TrainState(state.step, trained, optimizer, state.key)
    return kept, jnp.all(jnp.stack(finite), axis=0)


def _across(mask: jax.Array, leaf: jax.Array) -> jax.Array:
    return mask.reshape(mask.shape + (1,) * (leaf.ndim - 1))
