"""What a training step costs, read off its compiled program, and how that grows with its sizes.

Nothing is run and no weight exists, so that a 7B base is as cheap to ask about as a small one. All
numbers are those of one device. Loops count as often as they run. Axis legend: N tokens, d model
width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mos_jax.adapters.mos import MoSConfig
from mos_jax.errors import InputError
from mos_jax.models.config import DecoderConfig
from mos_jax.models.head import score_targets
from mos_jax.planning.counting import count_program
from mos_jax.planning.hlo import read_program
from mos_jax.planning.outline import outline_step
from mos_jax.planning.request import Request
from mos_jax.training.config import RunConfig

# Meshes of one axis, by its name, on so many devices.
DEVICES = (1, 2, 4, 8)
MESH_AXES = ("data", "fsdp", "tensor")


@dataclasses.dataclass(frozen=True)
class Costs:
    """What one run of a compiled step takes on each device.

    Attributes:
      flops: operations of its matrix products.
      bytes: read from and written to main memory, as far as the program says.
      temporaries: bytes of its temporary arrays, at the same time.
      arguments: bytes of its arguments: base, adapter, optimiser state, batch.
      received: bytes that come from other devices.
      collectives: by kind, how many of them run.
      uncounted: custom calls whose operations are not in `flops`.
    """

    flops: float
    bytes: float
    temporaries: int
    arguments: int
    received: int
    collectives: Mapping[str, int]
    uncounted: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return dataclasses.asdict(self)


def make_request(
    config: RunConfig, model: DecoderConfig, rows: int, width: int, topology: str = ""
) -> Request:
    """A step on `rows` rows of `width` tokens, every one of them a target."""
    data = dataclasses.replace(config.data, batch_size=rows)
    config = dataclasses.replace(config, data=data)
    return Request(config, model, width, width, topology)


def step_costs(request: Request) -> Costs:
    """Compiles the step of `request` for the devices that JAX has here, and reads it.

    Raises:
      InputError: if the mesh needs other devices than there are, the batch does not fit it, or the
        adapter does not fit the base.
    """
    mesh = request.config.mesh
    count = mesh.data * mesh.fsdp * mesh.tensor
    devices = jax.devices()
    if not 0 < count <= len(devices):
        raise InputError(f"the mesh has {count} devices, there are {len(devices)}")
    compiled = outline_step(request, devices[:count]).lower().compile()
    memory: Any = compiled.memory_analysis()
    counts = count_program(read_program(compiled.as_text() or ""), count)
    kinds = counts.by_kind()
    return Costs(
        flops=counts.flops,
        bytes=counts.bytes,
        temporaries=memory.temp_size_in_bytes,
        arguments=memory.argument_size_in_bytes,
        received=sum(kind["received"] for kind in kinds.values()),
        collectives={name: kind["count"] for name, kind in kinds.items()},
        uncounted=counts.uncounted,
    )


def compile_loss(model: DecoderConfig, tokens: int, limit: float, dtype: str = "float32") -> Any:
    """The loss of `tokens` targets and its gradient by the hidden states, without the blocks.

    Args:
      model: whose head it is.
      tokens: N, all of them targets.
      limit: bytes of logits that may exist at one time, see `chunk_size`; 0: any.
      dtype: of hidden states and head.

    Returns:
      The compiled function of hidden states [N, d], targets int32 [N] and the head's weight
      ([V, d], or [d, V] where it is not tied), to the summed loss in nats and the gradient [N, d].
    """
    tied = model.tied_embeddings
    shape = (model.vocab_size, model.d_model) if tied else (model.d_model, model.vocab_size)

    def loss(hidden: jax.Array, targets: jax.Array, weight: jax.Array) -> jax.Array:
        nats, _ = score_targets(hidden, targets, weight, 0 if tied else 1, None, limit)
        return jnp.sum(nats)

    arguments = (
        jax.ShapeDtypeStruct((tokens, model.d_model), jnp.dtype(dtype)),
        jax.ShapeDtypeStruct((tokens,), jnp.int32),
        jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)),
    )
    return jax.jit(jax.value_and_grad(loss)).lower(*arguments).compile()


@dataclasses.dataclass(frozen=True)
class Axis:
    """One size of a step that is varied while the others stay.

    Attributes:
      name: its field.
      label: in words.
      values: that it takes, in rising order.
    """

    name: str
    label: str
    values: tuple[int, ...]


def scaling_axes(request: Request) -> list[Axis]:
    """The sizes that a step of MoS has, each at its own value, halves and doubles of it."""
    adapter = _mos(request)
    depth = request.model.num_layers
    return [
        Axis("rank", "active rank r", _doubles(adapter.rank or 1, 4)),
        Axis("equivalent_rank", "equivalent rank e", _doubles(adapter.equivalent_rank, 3, 1)),
        Axis("shards_per_vector", "shards per vector l", _doubles(adapter.shards_per_vector, 3, 1)),
        Axis("num_layers", "blocks L", tuple(sorted({depth // 3, 2 * depth // 3, depth} - {0}))),
        Axis("width", "tokens of a row", _doubles(request.width, 3, 1)),
        Axis("rows", "rows of a batch", _doubles(request.rows, 3, 1)),
    ]


def _doubles(value: int, count: int, below: int = 0) -> tuple[int, ...]:
    halves = [value // 2**i for i in range(below, 0, -1) if value % 2**i == 0]
    return tuple(halves + [value * 2**i for i in range(count)])


def vary(request: Request, name: str, value: int) -> Request:
    """`request` with one size changed: that of an `Axis`, or an axis of the mesh."""
    config = request.config
    if name in MESH_AXES:
        mesh = dataclasses.replace(config.mesh, **{**dict.fromkeys(MESH_AXES, 1), name: value})
        return dataclasses.replace(request, config=dataclasses.replace(config, mesh=mesh))
    if name == "width":
        return dataclasses.replace(request, width=value, targets=value)
    if name == "num_layers":
        model = dataclasses.replace(request.model, num_layers=value)
        return dataclasses.replace(request, model=model)
    if name == "rows":
        data = dataclasses.replace(config.data, batch_size=value)
        return dataclasses.replace(request, config=dataclasses.replace(config, data=data))
    adapter = dataclasses.replace(_mos(request), **{name: value})  # type: ignore[arg-type]
    return dataclasses.replace(request, config=dataclasses.replace(config, adapter=adapter))


def assembled(request: Request, where: str) -> Request:
    """`request` with another `training.assembly`."""
    training = dataclasses.replace(request.config.training, assembly=where)
    return dataclasses.replace(
        request, config=dataclasses.replace(request.config, training=training)
    )


def _mos(request: Request) -> MoSConfig:
    adapter = request.config.adapter
    if not isinstance(adapter, MoSConfig) or adapter.rank is None:
        raise InputError(
            f"adapter.method is {adapter.method!r}; sizes are varied of 'mos' with a rank"
        )
    return adapter


def straight(values: Sequence[float], costs: Sequence[float], tolerance: float = 1e-3) -> bool:
    """Whether costs grow along a straight line: equal slopes between neighbours."""
    slopes = [
        (b - a) / (y - x) for x, y, a, b in zip(values, values[1:], costs, costs[1:], strict=False)
    ]
    largest = max(map(abs, slopes), default=0.0)
    return all(abs(slope - slopes[0]) <= tolerance * largest for slope in slopes)
