"""What a sweep will cost: FLOPs from shapes, time from the speed of a product on this machine."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from mos_jax.adapters.methods import create_adapter
from mos_jax.data.load import Data
from mos_jax.models.base import Base
from mos_jax.sweeps.definition import Sweep, SweepRun
from mos_jax.training.config import RunConfig
from mos_jax.training.session import Loads, find_placement

# Of a plain product's rate, what a whole step reaches (measured with SmolLM2 on 2 CPU cores).
STEP_EFFICIENCY = 0.8


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one run.

    Attributes:
      trained: trained parameters.
      rank: largest rank of a site.
      step_flops: floating-point operations of a training step.
      flops: of the whole run, evaluations included.
    """

    trained: int
    rank: int
    step_flops: float
    flops: float


def run_cost(config: RunConfig, base: Base, data: Data, split: str) -> Cost:
    """Counts the operations of a run from its shapes alone.

    A product of [N, h] and [h, o] is 2 N h o. A training step runs each of the base's products
    forward and once backward (its weights get no gradient) and each of the adapter's twice
    backward; the assembly of factors is not counted.

    Args:
      config: the run.
      base: its base.
      data: its data.
      split: the set evaluated at the end beside the validation set, or "".
    """
    sites = config.adapted(base.sites)
    adapter = jax.eval_shape(
        lambda key: create_adapter(config.adapter, sites, key), jax.random.key(0)
    )
    factors = jax.eval_shape(lambda adapter: adapter.factors(), adapter)
    low_rank = sum(f.count() for f in factors.values())
    training = config.training
    layout, wide = data.layout, data.evaluation_layout
    step = training.accumulation * _flops(base, low_rank, layout, 2, 3)
    forward = _flops(base, low_rank, wide, 1, 1)
    batches = {name: len(data.batches(name)) for name in ("validation", split) if name}
    every = config.evaluation.every
    evaluations = 1 + ((training.steps - 1) // every if every else 0)
    evaluated = evaluations * batches["validation"] + batches.get(split, 0)
    rank = max(f.rank for f in factors.values())
    total = training.steps * step + evaluated * forward
    return Cost(adapter.count_trained(), rank, step, total)


def _flops(base: Base, low_rank: int, layout: Any, base_passes: int, adapter_passes: int) -> float:
    c = base.config
    tokens = layout.rows * layout.width
    weights = sum(layers * h * o for layers, h, o in c.site_shapes().values())
    attention = 4 * c.num_layers * tokens * layout.width * c.num_heads * c.head_dim
    head = 2 * layout.rows * layout.targets * c.d_model * c.vocab_size
    products = base_passes * (2 * tokens * weights + head) + (2 * base_passes - 1) * attention
    return float(products + adapter_passes * 2 * tokens * low_rank)


def machine_flops(size: int = 1024, repeats: int = 5) -> float:
    """Operations a second of a plain fp32 product on this machine's first device, now."""
    x = jnp.ones((size, size), jnp.float32)
    product = jax.jit(lambda x: x @ x)
    product(x).block_until_ready()
    best = min(_seconds(product, x) for _ in range(repeats))
    return 2 * size**3 / best


def _seconds(function: Any, x: jax.Array) -> float:
    start = time.perf_counter()
    function(x).block_until_ready()
    return time.perf_counter() - start


def sweep_costs(sweep: Sweep, loads: Loads) -> list[tuple[SweepRun, Cost]]:
    """Every run of a sweep with its cost. Raises InputError for data or sites that do not fit."""
    found = []
    known: dict[Any, Cost] = {}
    for run in sweep.every_run():
        key = (run.arm, run.stage)
        if key not in known:
            base = loads.base(run.config.base, find_placement(run.config))
            data = loads.data(run.config.data, base)
            known[key] = run_cost(run.config, base, data, "test" if run.stage == "final" else "")
        found.append((run, known[key]))
    return found


def print_costs(sweep: Sweep, loads: Loads, console: Console) -> None:
    """Prints the runs of a sweep with parameters, steps and estimated time."""
    costs = sweep_costs(sweep, loads)
    rate = machine_flops() * STEP_EFFICIENCY
    table = Table("arm", "stage", "rate", "seed", "rank", "trained", "steps", "minutes")
    for column in table.columns[2:]:
        column.justify = "right"
    for run, cost in costs:
        one = sweep.arm(run.arm)
        # Which rate the final runs take is known after tuning.
        open_rate = run.stage == "final" and len(one.learning_rates) > 1
        table.add_row(
            one.name + (" (unequal)" if one.unequal else ""),
            run.stage,
            "best" if open_rate else f"{run.learning_rate:g}",
            str(run.seed),
            str(cost.rank),
            f"{cost.trained:,}",
            str(run.config.training.steps),
            f"{cost.flops / rate / 60:.1f}",
        )
    console.print(table)
    minutes = sum(cost.flops for _, cost in costs) / rate / 60
    span = f"{minutes / 60:.1f} hours" if minutes >= 60 else f"{minutes:.0f} minutes"
    console.print(
        f"{len(costs)} runs, about {span} one after the other, at {rate / 1e9:.0f} "
        "GFLOP/s: a plain product's rate on this machine just now, times "
        f"{STEP_EFFICIENCY:g}; loading and compiling come on top.",
        highlight=False,
    )
