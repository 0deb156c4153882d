"""The training step of a run on devices that need not exist, from shapes alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, cast

import jax
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding

from mos_jax.adapters.methods import create_adapter
from mos_jax.data.batches import Batch
from mos_jax.distributed.table import array_lines, base_lines, batch_lines
from mos_jax.models.base import Base, outline_model
from mos_jax.models.decoder import Decoder
from mos_jax.models.placing import Shardings
from mos_jax.models.sharding import DATA, FSDP, TENSOR
from mos_jax.planning.request import Request
from mos_jax.training.optimizer import make_optimizer
from mos_jax.training.session import Session, find_placement


@dataclasses.dataclass(frozen=True)
class StepOutline:
    """A step before it is compiled.

    Attributes:
      session: of the run, its arrays shapes and its data left out.
      arguments: state, parts, model and batch: trees of `jax.ShapeDtypeStruct`, each with its
        sharding.
    """

    session: Session
    arguments: tuple[Any, ...]

    def lower(self) -> jax.stages.Lowered:
        """The step that training runs, lowered for the devices of its arguments."""
        return self.session.train_step().lower(*self.arguments)


def outline_step(request: Request, devices: Sequence[jax.Device]) -> StepOutline:
    """The training step of `request` on `devices`, which may be those of a described topology.

    Nothing is allocated: base, adapter, optimiser state and batch are shapes.

    Raises:
      InputError: if the mesh does not fit the devices, the batch the mesh, or the adapter the base.
    """
    config, model = request.config, request.model
    placement = find_placement(config, devices)
    # Without a mesh everything is on the first device, which must be said: it is not JAX's own.
    alone = SingleDeviceSharding(devices[0])
    base = config.base
    shardings: Shardings = lambda name, shape: alone  # noqa: E731
    if placement is not None:
        shardings = placement.weights(base.quantize)
    decoder = outline_model(
        model,
        base.dtype,
        base.remat,
        base.quantize,
        shardings,
        None if placement is None else placement.mesh,
        base.attention,
        base.logits_mib,
    )
    session = _session(request, decoder)
    state, parts = _initial(session)
    session = dataclasses.replace(session, placement=placement)
    batch = outline_batch(request)
    if placement is None:
        state, parts, batch = jax.tree.map(lambda leaf: _at(leaf, alone), (state, parts, batch))
    else:
        state, parts = (
            jax.tree.map(_at, tree, placement.shardings(tree)) for tree in (state, parts)
        )
        batch = jax.tree.map(_at, batch, placement.batch_shardings(batch))
    return StepOutline(session, (state, parts, decoder, batch))


def _session(request: Request, decoder: Decoder) -> Session:
    config = request.config
    adapter = jax.eval_shape(
        lambda key: create_adapter(config.adapter, config.adapted(decoder.sites), key),
        jax.random.key(0),
    )
    return Session(
        config,
        # Neither tokenizer nor data have a part in the compiled step.
        Base(config.base.name, decoder, cast(Any, None)),
        adapter,
        cast(Any, None),
        make_optimizer(config.training, config.adapter.rate_ratios()),
    )


def _initial(session: Session) -> Any:
    return jax.eval_shape(
        lambda adapter: dataclasses.replace(session, adapter=adapter).initial(), session.adapter
    )


def held_bytes(request: Request) -> int:
    """Bytes that each chip holds between steps: its part of base, adapter, optimiser and a batch.

    By the rules of placement alone. No step needs less, but for arrays that it does not look at.
    """
    config, sizes = request.config, mesh_sizes(request)
    base, above = config.base, int(config.mesh.shard_above_mib * 2**20)
    decoder = outline_model(request.model, base.dtype, base.remat, base.quantize)
    state, parts = _initial(_session(request, decoder))
    lines = base_lines(request.model, base.dtype, base.quantize, sizes)
    lines += array_lines("adapter", (state, parts), sizes, above)
    lines += batch_lines(outline_batch(request), sizes)
    return sum(line.held for line in lines)


def mesh_sizes(request: Request) -> dict[str, int]:
    """Sizes of the axes of a request's mesh."""
    mesh = request.config.mesh
    return {DATA: mesh.data, FSDP: mesh.fsdp, TENSOR: mesh.tensor}


def outline_batch(request: Request) -> Batch:
    """The shapes of one step's batch: [B, S] and [B, M], with accumulation [A, B, ...]."""
    accumulation = request.config.training.accumulation
    leading = (request.rows,) if accumulation == 1 else (accumulation, request.rows)

    def of(width: int, dtype: type = np.int32) -> Any:
        return jax.ShapeDtypeStruct((*leading, width), dtype)

    width, targets = request.width, request.targets
    return Batch(
        tokens=of(width),
        positions=of(width),
        segments=of(width),
        loss_positions=of(targets),
        loss_targets=of(targets),
        loss_weights=of(targets, np.float32),
        loss_examples=of(targets),
    )


def _at(leaf: Any, sharding: Sharding) -> Any:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
