"""How the layers of a MoS adapter share their pools: who uses what, and do they agree on it?

A pool is one array for all layers, so its gradient is a sum of one term for each layer. Here the
terms are kept apart: the gradient of the loss with respect to the assembled factors A and B is
taken once, and the part that belongs to one layer is sent back through the assembly (a scatter-add)
on its own. Two layers that pull a shard in opposite directions have gradients of cosine -1 there.

Axis legend: L adapted layers, S shards of a pool, w width of a shard.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mos_jax.adapters.adapter import Adapter
from mos_jax.adapters.low_rank import Factors
from mos_jax.adapters.mos import MoS
from mos_jax.adapters.pools import SIDES
from mos_jax.data.batches import Batch
from mos_jax.errors import InputError
from mos_jax.evaluation.loss import summed_loss
from mos_jax.finished import load_finished
from mos_jax.models.decoder import Decoder

KINDS = tuple(f"pool_{side}" for side in SIDES)
# Batches of the training set that the gradient is averaged over.
BATCHES = 4


@dataclasses.dataclass(frozen=True)
class Pull:
    """How the layers' gradients of some pools relate.

    Attributes:
      norms: fp64 [L], Euclidean norm of each layer's part of the gradient.
      cosines: fp64 [L, L], in [-1, 1]. Entry (i, j) is the cosine between the gradients of layers
        i and j, both restricted to the shards that both layers use; NaN where they have no shard
        in common, or one of them has no gradient there. The diagonal is 1 for every layer that has
        a gradient.
      agreement: over the shards that at least two layers use, the norm of the sum of the layers'
        gradients divided by the sum of their norms, each summed over those shards: 1 when all
        layers pull alike, 0 when they cancel. NaN when no shard is shared.
      orthogonal: what `agreement` would be if the gradients, with the norms they have, stood at
        right angles. Below it layers work against each other, above it together.
    """

    norms: np.ndarray
    cosines: np.ndarray
    agreement: float
    orthogonal: float

    def pairs(self) -> np.ndarray:
        """The cosines of all pairs of different layers that share a shard, fp64 [pairs]."""
        upper = self.cosines[np.triu_indices(len(self.norms), 1)]
        return upper[np.isfinite(upper)]

    def to_dict(self) -> dict[str, float | int | None]:
        """JSON values: the pairs in figures, agreement, and its value at right angles."""
        pairs = self.pairs()
        return {
            "pairs": len(pairs),
            "mean_cosine": _json_number(pairs.mean() if len(pairs) else float("nan")),
            "share_below_0": _json_number((pairs < 0).mean() if len(pairs) else float("nan")),
            "agreement": _json_number(self.agreement),
            "agreement_if_orthogonal": _json_number(self.orthogonal),
        }


@dataclasses.dataclass(frozen=True)
class Sharing:
    """What `analyse` found.

    Attributes:
      layers: the blocks of the model that the L entries of every axis stand for.
      counts: by path of the pool (`"pool_a/q_proj"`), int [S, L]; see `usage_counts`.
      pulls: by path of the pool, and over all pools of A and of B under "pool_a" and "pool_b".
      loss: of the batches, nats for each target token.
      targets: how many target tokens the gradient is averaged over.
    """

    layers: tuple[int, ...]
    counts: dict[str, np.ndarray]
    pulls: dict[str, Pull]
    loss: float
    targets: int

    def to_dict(self) -> dict[str, Any]:
        """JSON values: figures by pool, and norms by layer."""
        return {
            "layers": list(self.layers),
            "loss": self.loss,
            "targets": self.targets,
            "use": {path: describe_use(counts) for path, counts in self.counts.items()},
            "pulls": {path: pull.to_dict() for path, pull in self.pulls.items()},
            "norms": {kind: self.pulls[kind].norms.tolist() for kind in KINDS},
        }


def _json_number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def adapted_layers(adapter: Adapter) -> tuple[int, ...]:
    """The blocks of the model that at least one site type of the adapter is in, in order."""
    blocks = {block for name in adapter.sites for block in adapter.sites[name].blocks}
    return tuple(sorted(blocks))


def usage_counts(adapter: MoS) -> dict[str, np.ndarray]:
    """How often each layer reads each shard.

    Returns:
      By path of the pool, int64 [S, L]: entry (s, k) is the number of positions of layer k's
      tables at which shard s stands. A column sums to the r l positions of a layer's table, for
      each site type that reads the pool.
    """
    layers, tables = adapted_layers(adapter), adapter.tables()
    counts = {}
    for side in SIDES:
        for pool in adapter.pools(side):
            found = np.zeros((pool.layout.num_shards, len(layers)), np.int64)
            for name in pool.blocks:
                table, ranks = tables[f"table_{side}/{name}"], adapter.site_ranks[name]
                for block, entries, rank in zip(
                    adapter.sites[name].blocks, table, ranks, strict=True
                ):
                    np.add.at(found[:, layers.index(block)], entries[:rank].reshape(-1), 1)
            counts[f"pool_{side}/{pool.name}"] = found
    return counts


def describe_use(counts: np.ndarray) -> dict[str, float | int]:
    """A pool's use in figures, from its [S, L] counts.

    Returns:
      `shards`; `idle`, read by no layer; `private`, read by exactly one; `mean_layers` and
      `most_layers`, layers that read a shard that is not idle.
    """
    readers = (counts > 0).sum(axis=1)
    used = readers[readers > 0]
    return {
        "shards": len(counts),
        "idle": int((readers == 0).sum()),
        "private": int((readers == 1).sum()),
        "mean_layers": float(used.mean()) if len(used) else 0.0,
        "most_layers": int(readers.max(initial=0)),
    }


def factor_gradients(
    model: Decoder, factors: Factors, batches: Sequence[Batch]
) -> tuple[float, Factors, int]:
    """The gradient of the mean loss with respect to the assembled factors.

    Args:
      model: the base.
      factors: of all layers at once.
      batches: of equal shapes; the mean is over all their target tokens.

    Returns:
      The loss (nats for each target token), the gradient in the form of the factors, and the
      number of target tokens.
    """

    def loss_of(factors: Factors, model: Decoder, batch: Batch) -> jax.Array:
        return summed_loss(model, factors, batch)

    compute = jax.jit(jax.value_and_grad(loss_of))
    total: Any = None
    for batch in batches:
        found = compute(factors, model, batch)
        total = found if total is None else jax.tree.map(jnp.add, total, found)
    targets = float(sum(batch.loss_weights.sum() for batch in batches))
    if total is None or targets == 0:
        raise InputError("there is no target token to take a gradient of; give a batch with some")
    loss, gradient = jax.tree.map(lambda value: value / targets, total)
    return float(loss), gradient, int(targets)


def pool_gradients(adapter: MoS, gradient: Factors) -> dict[str, np.ndarray]:
    """Each layer's part of the gradient of the pools.

    Args:
      adapter: the adapter.
      gradient: of the loss with respect to `adapter.factors()`.

    Returns:
      By path of the pool, fp32 [L, S, w]: entry k is the gradient that would reach the pool if
      only layer k's factors depended on it. The sum over k is the gradient of the pool.
    """
    graphdef, trained, *rest = nnx.split(adapter, nnx.Param, ...)
    layers = adapted_layers(adapter)
    masks = {
        name: jnp.asarray([[block == k for block in adapter.sites[name].blocks] for k in layers])
        for name in adapter.sites
    }

    @jax.jit
    def by_layer(trained: nnx.State, frozen: list[nnx.State], gradient: Factors) -> nnx.State:
        def factors_of(trained: nnx.State) -> Factors:
            return nnx.merge(graphdef, trained, *frozen).factors()

        _, pull_back = jax.vjp(factors_of, trained)

        def of_layer(here: Mapping[str, jax.Array]) -> nnx.State:
            def keep(mask: jax.Array, part: jax.Array) -> jax.Array:
                column = mask.reshape((-1,) + (1,) * (part.ndim - 1))
                return jnp.where(column, part, 0.0)

            kept = {
                name: jax.tree.map(lambda part, mask=here[name]: keep(mask, part), parts)
                for name, parts in gradient.items()
            }
            return pull_back(kept)[0]

        return jax.lax.map(of_layer, masks)

    return {
        "/".join(map(str, path)): np.asarray(variable[...])
        for path, variable in nnx.to_flat_state(by_layer(trained, rest, gradient))
        if path[0] in KINDS
    }


def compare_layers(gradients: Sequence[np.ndarray], counts: Sequence[np.ndarray]) -> Pull:
    """Norms, cosines and agreement of the layers' gradients of some pools taken together.

    Args:
      gradients: of each pool, [L, S, w].
      counts: of each pool, [S, L].
    """
    size = len(gradients[0])
    inner = np.zeros((size, size))
    # Entry (i, j): squared norm of layer i's gradient on the shards that layer j uses too.
    common = np.zeros((size, size))
    of_sums = sums_of = orthogonal = 0.0
    for gradient, count in zip(gradients, counts, strict=True):
        exact = gradient.astype(np.float64)
        flat = exact.reshape(size, -1)
        inner += flat @ flat.T
        squares = (exact**2).sum(axis=2)
        used = count > 0
        common += squares @ used
        shared = used.sum(axis=1) > 1
        of_sums += float(np.linalg.norm(exact.sum(axis=0), axis=1)[shared].sum())
        sums_of += float(np.sqrt(squares)[:, shared].sum())
        orthogonal += float(np.sqrt(squares.sum(axis=0))[shared].sum())
    with np.errstate(divide="ignore", invalid="ignore"):
        cosines = np.clip(inner / np.sqrt(common * common.T), -1.0, 1.0)
    return Pull(
        np.sqrt(np.diag(inner)),
        cosines,
        of_sums / sums_of if sums_of else float("nan"),
        orthogonal / sums_of if sums_of else float("nan"),
    )


def analyse(model: Decoder, adapter: MoS, batches: Sequence[Batch]) -> Sharing:
    """Counts the use of the pools and takes their gradients apart by layer.

    Args:
      model: the base that the adapter belongs to.
      adapter: the adapter.
      batches: of equal shapes.

    Raises:
      InputError: if the batches hold no target token.
    """
    factors = jax.jit(lambda adapter: adapter.factors())(adapter)
    loss, gradient, targets = factor_gradients(model, factors, batches)
    parts, counts = pool_gradients(adapter, gradient), usage_counts(adapter)
    groups = {path: [path] for path in counts}
    groups |= {kind: [path for path in counts if path.startswith(f"{kind}/")] for kind in KINDS}
    pulls = {
        name: compare_layers([parts[path] for path in paths], [counts[path] for path in paths])
        for name, paths in groups.items()
    }
    return Sharing(adapted_layers(adapter), counts, pulls, loss, targets)


def analyse_run(folder: str | os.PathLike[str], batches: int = BATCHES) -> Sharing:
    """`analyse` on the adapter of a finished run and the first batches it was trained on.

    Args:
      folder: the run's folder, with `adapter/` in it.
      batches: how many batches of the training set.

    Raises:
      InputError: if there is no adapter, its base or data cannot be loaded, or it is not MoS.
    """
    finished = load_finished(Path(folder) / "adapter")
    if not isinstance(finished.adapter, MoS):
        raise InputError(f"{folder} holds an adapter of {finished.method!r}; only mos has pools")
    card: Any = finished.card
    training = card.metadata.get("config", {}).get("training", {})
    source = finished.data(None, "train", None).source(training.get("seed", 0))
    return analyse(finished.base.model, finished.adapter, [source[step] for step in range(batches)])
