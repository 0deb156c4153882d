"""The loss, a pure function of pytrees.

Axis legend: B rows, S tokens of a row, M loss positions of a row.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mos_jax.adapters.strictness import strict
from mos_jax.data.batches import Batch
from mos_jax.models.decoder import Decoder, FactorsSource
from mos_jax.models.projection import Dropout


@strict
def token_losses(
    model: Decoder, factors: FactorsSource, batch: Batch, dropout: Dropout | None = None
) -> tuple[jax.Array, jax.Array]:
    """Negative log likelihood and correctness of every target.

    Logits are computed where there is a target and nowhere else; see `Decoder.score`.

    Returns:
      fp32 [B, M], nats; and bool [B, M], whether the target is the most likely token.
    """
    hidden = model.hidden(
        jnp.asarray(batch.tokens),
        factors,
        positions=jnp.asarray(batch.positions),
        segments=jnp.asarray(batch.segments),
        dropout=dropout,
    )
    chosen = jnp.take_along_axis(hidden, jnp.asarray(batch.loss_positions)[:, :, None], axis=1)
    return model.score(chosen, jnp.asarray(batch.loss_targets))


@strict
def summed_loss(
    model: Decoder, factors: FactorsSource, batch: Batch, dropout: Dropout | None = None
) -> jax.Array:
    """Weighted sum of the negative log likelihood over all targets, fp32 [], nats."""
    losses, _ = token_losses(model, factors, batch, dropout)
    return jnp.sum(losses * batch.loss_weights)
