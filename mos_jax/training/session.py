"""What a run needs, built from its configuration and checked before anything is written."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax

from mos_jax.adapters.adapter import Adapter
from mos_jax.adapters.lora import LoRAConfig
from mos_jax.adapters.methods import count_parameters, create_adapter
from mos_jax.adapters.sites import Sites
from mos_jax.adapters.storage import adapter_arrays, load_adapter
from mos_jax.data.batches import Batch
from mos_jax.data.config import DataConfig
from mos_jax.data.load import Data, load_data
from mos_jax.data.loader import BatchSource
from mos_jax.distributed.mesh import make_mesh, resolve_sizes
from mos_jax.distributed.partition import Placement, check_rows
from mos_jax.errors import InputError
from mos_jax.models.base import Base, load_base
from mos_jax.training.config import BaseSection, RunConfig
from mos_jax.training.optimizer import make_optimizer
from mos_jax.training.step import AdapterParts, TrainState, initial_state, make_train_step


class Loads:
    """Loads bases and data, and remembers the last of each for the next run of one process."""

    def __init__(self, load: Callable[..., Base] = load_base) -> None:
        """Loads with `load`: `load_base`, or `outline_base` where nothing shall be run."""
        self._load = load
        self._base: tuple[tuple[BaseSection, Placement | None], Base] | None = None
        self._data: tuple[str, Data] | None = None

    def base(self, section: BaseSection, placement: Placement | None = None) -> Base:
        """The base of `section`, on one device or placed on a mesh. Raises InputError."""
        key = section, placement
        if self._base is None or self._base[0] != key:
            # Let go first: two bases would not fit where one does.
            self._base = self._data = None
            base = self._load(
                section.name,
                section.dtype,
                section.remat,
                section.quantize,
                placement and placement.weights(section.quantize),
                placement and placement.mesh,
                section.attention,
                section.logits_mib,
            )
            self._base = key, base
        return self._base[1]

    def data(self, config: DataConfig, base: Base) -> Data:
        """The data of `config`, tokenised for `base`, the one loaded last. Raises InputError."""
        key = json.dumps(dataclasses.asdict(config), sort_keys=True)
        if self._data is None or self._data[0] != key:
            self._data = key, load_data(config, base.tokenizer)
        return self._data[1]


@dataclasses.dataclass(frozen=True)
class Session:
    """The parts of one run.

    Attributes:
      config: the resolved configuration.
      base: the frozen base.
      adapter: freshly initialised, or that of `training.start`.
      data: the task, tokenised.
      optimizer: the optimiser.
      placement: where everything lies on a mesh; None: one device.
    """

    config: RunConfig
    base: Base
    adapter: Adapter
    data: Data
    optimizer: optax.GradientTransformation
    placement: Placement | None = None

    @classmethod
    def create(cls, config: RunConfig, loads: Loads | None = None) -> Session:
        """Loads base and data and builds the adapter. Raises InputError; writes nothing.

        Args:
          config: the run.
          loads: where base and data come from; a shared one spares runs in a row the loading.
        """
        loads = Loads() if loads is None else loads
        placement = find_placement(config)
        # The cheap things that a user may get wrong first: sites need the base, data its tokenizer.
        base = loads.base(config.base, placement)
        sites = config.adapted(base.sites)
        init_key, _ = _keys(config)
        if start := config.training.start:
            own = None if base.is_outline else base.fingerprint
            adapter = load_adapter(start, sites=base.sites, base_fingerprint=own)
        else:
            adapter = create_adapter(config.adapter, sites, init_key)
        data = loads.data(config.data, base)
        optimizer = make_optimizer(config.training, config.adapter.rate_ratios())
        return cls(config, base, adapter, data, optimizer, placement)

    def initial(self) -> tuple[TrainState, AdapterParts]:
        """The state before the first step, and the adapter's parts."""
        parts, trained = AdapterParts.split(self.adapter)
        _, dropout_key = _keys(self.config)
        return self.place(initial_state(trained, self.optimizer, dropout_key), parts)

    def place(self, state: TrainState, parts: AdapterParts) -> tuple[TrainState, AdapterParts]:
        """Moves a state and an adapter's parts to where they lie on the mesh, if there is one."""
        if self.placement is None:
            return state, parts
        return self.placement.place(state), self.placement.place(parts)

    def source(self) -> BatchSource:
        """The training batches by step, of which this process makes the rows that it holds."""
        section, rows = self.config.training, None
        if self.placement is not None and jax.process_count() > 1:
            rows = self.placement.own_rows(self.data.layout.rows).tolist()
        return self.data.source(section.seed, section.accumulation, rows=rows)

    def place_batch(self, batch: Batch) -> Batch:
        """Moves a batch of `source` to the device, or its rows to every device; waits for none."""
        if self.placement is None:
            return jax.device_put(batch)
        several = jax.process_count() > 1
        return self.placement.place_batch(batch, self.data.layout.rows if several else None)

    def whole(self, adapter: Adapter) -> Adapter:
        """The adapter with arrays that every process can read; all processes call it together."""
        several = self.placement is not None and jax.process_count() > 1
        return self.placement.whole(adapter) if self.placement and several else adapter

    def train_step(self) -> Any:
        """The compiled step; see `make_train_step`."""
        section = self.config.training
        return make_train_step(
            self.optimizer,
            section.dropout,
            section.accumulation,
            self.placement,
            section.assembly,
        )

    def facts(self) -> dict[str, str]:
        """What the files of several processes must agree on, by what they hold.

        The evaluation sets as well: of batches that differ in number or shape, one process would
        come to a collective that the others never join.
        """
        data = self.data
        found = {
            "base": self.base.fingerprint,
            "texts of all sets": data.fingerprint,
            "training batches": self.source().fingerprint,
        }
        for split in ("validation", "test"):
            examples = data.tokens[split].examples
            if examples:
                source = BatchSource(examples, data.evaluation_layout, data.pad)
                found[f"{split} batches"] = source.fingerprint
        if self.config.training.start:
            found["training.start"] = _digest(self.adapter)
        return found

    def budget(self) -> dict[str, int]:
        """Trained parameters of this adapter, and of LoRA at the same rank and budget.

        Returns:
          `trained`, and the active `rank`, the largest; `lora_same_rank`, the parameters of LoRA of
          that rank; `lora_same_budget_rank`, the largest rank at which LoRA trains no more than
          the adapter, and `lora_same_budget`, its parameters.
        """
        sites = self.adapter.sites
        trained = self.adapter.count_trained()
        rank = max(factor.rank for factor in self._factor_shapes().values())
        unit = lora_parameters(1, sites)
        return {
            "trained": trained,
            "rank": rank,
            "lora_same_rank": rank * unit,
            "lora_same_budget_rank": trained // unit,
            "lora_same_budget": trained // unit * unit,
        }

    def _factor_shapes(self) -> dict[str, Any]:
        return jax.eval_shape(lambda adapter: adapter.factors(), self.adapter)


def find_placement(
    config: RunConfig, devices: Sequence[jax.Device] | None = None
) -> Placement | None:
    """Where a run lies on the mesh that its config asks for; None: on one device.

    Args:
      config: the run.
      devices: those of the mesh; default: all that JAX has. They may be described ones, such as
        those of a `jax.experimental.topologies.TopologyDescription`, to compile for.

    Raises:
      InputError: if the mesh does not fit the devices, or the batch the mesh.
    """
    section = config.mesh
    count = jax.device_count() if devices is None else len(devices)
    sizes = resolve_sizes(section.data, section.fsdp, section.tensor, count)
    mesh = make_mesh(sizes, devices)
    if mesh is None:
        if jax.process_count() > 1:
            raise InputError(
                f"{jax.process_count()} processes with {count} devices need a mesh over all of "
                "them, or each would train for itself: set --config.mesh.data=-1 or "
                "--config.mesh.fsdp=-1"
            )
        return None
    check_rows(config.data.batch_size, sizes)
    return Placement(mesh, int(section.shard_above_mib * 2**20))


def lora_parameters(rank: int, sites: Sites) -> int:
    """Trained parameters of LoRA of rank `rank` on these sites."""
    return sum(count_parameters(LoRAConfig(rank=rank), sites).values())


def _digest(adapter: Adapter) -> str:
    """Names an adapter's arrays: equal exactly when all of them are, by name, type and bits."""
    digest = hashlib.blake2b(digest_size=16)
    for name, array in sorted(adapter_arrays(adapter).items()):
        digest.update(repr((name, array.dtype.name, array.shape)).encode() + array.tobytes())
    return digest.hexdigest()


def _keys(config: RunConfig) -> tuple[jax.Array, jax.Array]:
    init_key, dropout_key = jax.random.split(jax.random.key(config.training.seed))
    return init_key, dropout_key
