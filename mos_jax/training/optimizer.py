"""The optimiser: AdamW with clipping, warm-up and decay."""

from __future__ import annotations

import optax

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


def make_optimizer(config: TrainingSection) -> optax.GradientTransformation:
    """AdamW (arXiv 1711.05101) after clipping by the global norm."""
    adamw = optax.adamw(
        make_schedule(config),
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
    )
    if config.clip_norm == 0:
        return adamw
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)
