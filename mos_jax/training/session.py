"""What a run needs, built from its configuration and checked before anything is written."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import optax

from mos_jax.adapters.adapter import Adapter
from mos_jax.adapters.lora import LoRAConfig
from mos_jax.adapters.methods import count_parameters, create_adapter
from mos_jax.adapters.sites import Sites
from mos_jax.data.load import Data, load_data
from mos_jax.models.base import Base, load_base
from mos_jax.training.config import RunConfig
from mos_jax.training.optimizer import make_optimizer
from mos_jax.training.step import AdapterParts, TrainState, initial_state, make_train_step


@dataclasses.dataclass(frozen=True)
class Session:
    """The parts of one run.

    Attributes:
      config: the resolved configuration.
      base: the frozen base.
      adapter: freshly initialised.
      data: the task, tokenised.
      optimizer: the optimiser.
    """

    config: RunConfig
    base: Base
    adapter: Adapter
    data: Data
    optimizer: optax.GradientTransformation

    @classmethod
    def create(cls, config: RunConfig) -> Session:
        """Loads base and data and builds the adapter. Raises InputError; writes nothing."""
        # The cheap things that a user may get wrong first: sites need the base, data its tokenizer.
        base = load_base(config.base.name, config.base.dtype, config.base.remat)
        sites = config.sites.select(base.sites)
        init_key, _ = _keys(config)
        adapter = create_adapter(config.adapter, sites, init_key)
        data = load_data(config.data, base.tokenizer)
        optimizer = make_optimizer(config.training, config.adapter.rate_ratios())
        return cls(config, base, adapter, data, optimizer)

    def initial(self) -> tuple[TrainState, AdapterParts]:
        """The state before the first step, and the adapter's parts."""
        parts, trained = AdapterParts.split(self.adapter)
        _, dropout_key = _keys(self.config)
        return initial_state(trained, self.optimizer, dropout_key), parts

    def train_step(self) -> Any:
        """The compiled step; see `make_train_step`."""
        section = self.config.training
        return make_train_step(self.optimizer, section.dropout, section.accumulation)

    def budget(self) -> dict[str, int]:
        """Trained parameters of this adapter, and of LoRA at the same rank and budget.

        Returns:
          `trained`, and the active `rank`; `lora_same_rank`, the parameters of LoRA of that rank;
          `lora_same_budget_rank`, the largest rank at which LoRA trains no more than the adapter,
          and `lora_same_budget`, its parameters.
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


def lora_parameters(rank: int, sites: Sites) -> int:
    """Trained parameters of LoRA of rank `rank` on these sites."""
    return sum(count_parameters(LoRAConfig(rank=rank), sites).values())


def _keys(config: RunConfig) -> tuple[jax.Array, jax.Array]:
    init_key, dropout_key = jax.random.split(jax.random.key(config.training.seed))
    return init_key, dropout_key
