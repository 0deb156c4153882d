"""The optimiser: AdamW with clipping, warm-up and decay."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from mos_jax.training.config import TrainingSection


def make_schedule(config: TrainingSection) -> optax.Schedule:
    """Learning rate of step i (from 0): linear warm-up, then the configured decay to `steps`."""
    warmup = round(config.warmup_share * config.steps)
    rest = max(1, config.steps - warmup)
    peak = config.learning_rate
    if config.schedule == "linear":
        decay = optax.linear_schedule(peak, 0.0, rest)
    elif config.schedule == "cosine":
        decay = optax.cosine_decay_schedule(peak, rest)
    else:
        decay = optax.constant_schedule(peak)
    if warmup == 0:
        return decay
    # The first step already moves: a rate of exactly 0 would waste it.
    rise = optax.linear_schedule(peak / warmup, peak, max(1, warmup - 1))
    return optax.join_schedules([rise, decay], [warmup])


def make_optimizer(
    config: TrainingSection,
    ratios: Mapping[str, float] = MappingProxyType({}),
    schedule: optax.Schedule | None = None,
) -> optax.GradientTransformation:
    """AdamW (arXiv 1711.05101) after clipping by the global norm.

    Args:
      config: the section.
      ratios: learning rates of parts of the adapter as multiples of the section's; see
        `AdapterConfig.rate_ratios`.
      schedule: the rate of step i (from 0); by default `make_schedule(config)`.
    """
    adamw = optax.adamw(
        make_schedule(config) if schedule is None else schedule,
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
    )
    clip = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    scale = [scale_parts(ratios)] if ratios else []
    parts = [*clip, adamw, *scale]
    return optax.chain(*parts) if len(parts) > 1 else adamw


def make_stackable_optimizer(
    config: TrainingSection, ratios: Mapping[str, float] = MappingProxyType({})
) -> optax.GradientTransformation:
    """`make_optimizer` with the peak rate in its state, where a stacked step finds one per run.

    The update is then the same function for all rates; only `init` reads the section's.
    """
    unit = dataclasses.replace(config, learning_rate=1.0)
    return optax.chain(make_optimizer(unit, ratios), scale_by_kept_rate(config.learning_rate))


class KeptRate(NamedTuple):
    """State of `scale_by_kept_rate`: fp32 []."""

    rate: jax.Array


def scale_by_kept_rate(rate: float) -> optax.GradientTransformation:
    """Multiplies updates by the number in its state, at first `rate`."""

    def init(_params: Any) -> KeptRate:
        return KeptRate(jnp.float32(rate))

    def update(updates: Any, state: KeptRate, _params: Any = None) -> tuple[Any, KeptRate]:
        return jax.tree.map(lambda update: update * state.rate, updates), state

    return optax.GradientTransformation(init, update)


def scale_parts(ratios: Mapping[str, float]) -> optax.GradientTransformation:
    """Multiplies the updates of an adapter's parts, named by the first word of their path.

    After AdamW this is a learning rate of their own, since its updates are proportional to the
    rate, weight decay included.
    """

    def scale(updates: nnx.State, _params: Any = None) -> nnx.State:
        flat = dict(nnx.to_flat_state(updates))
        for path, variable in flat.items():
            ratio = ratios.get(str(path[0]), 1.0)
            if ratio != 1.0:
                flat[path] = variable.replace(variable.get_value() * ratio)
        return nnx.from_flat_state(flat)

    return optax.stateless(scale)
