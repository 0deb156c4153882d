"""K runs in one step beside K steps: what the programs say, and what a clock says.

What XLA tells of a program counts the body of a loop once. So its figures are taken from bases of
two depths with all loops unrolled, and drawn on to the depth of the whole base: every block adds
the same. What is counted in the traced program needs no such help.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from experiments.bench.dense import count_flops, matrix_products
from experiments.bench.report import Say
from experiments.bench.rounds import LOSS_TOLERANCE, ratio, spread
from experiments.bench.worker import Facts, Run, Worker
from mos_jax.adapters.methods import create_adapter
from mos_jax.errors import InputError, RunEnded
from mos_jax.models.config import DecoderConfig
from mos_jax.models.decoder import Decoder
from mos_jax.training.config import RunConfig
from mos_jax.training.optimizer import make_optimizer, make_stackable_optimizer
from mos_jax.training.session import Loads, Session
from mos_jax.training.stacking import Group, stack_batches
from mos_jax.training.step import (
    AdapterParts,
    initial_state,
    make_stacked_step,
    make_train_step,
)

DEPTHS = (8, 12)


def members(config: RunConfig, runs: int) -> list[RunConfig]:
    """Runs that differ in seed and learning rate."""
    section = config.training
    return [
        dataclasses.replace(
            config,
            training=dataclasses.replace(
                section, seed=number, learning_rate=section.learning_rate * (1 + number / 10)
            ),
        )
        for number in range(runs)
    ]


@dataclasses.dataclass(frozen=True)
class Program:
    """A training step with the shapes of its arguments; runs 0 is the ordinary step of one run.

    Attributes:
      step: as `make_train_step` or `make_stacked_step` return it.
      arguments: shapes and dtypes.
      weights: bytes of the base's matrices by shape: one block's, and the head's.
    """

    step: Any
    arguments: tuple[Any, ...]
    weights: dict[tuple[int, ...], int]

    @classmethod
    def build(cls, config: RunConfig, base: DecoderConfig, batch: Any, runs: int = 0) -> Program:
        """The step of `config` on a base of these sizes; nothing is computed."""
        weights = {
            name: jax.ShapeDtypeStruct(
                shape, jnp.float32 if name.endswith("norm") else jnp.dtype(config.base.dtype)
            )
            for name, shape in base.weight_shapes().items()
        }
        model = jax.eval_shape(lambda arrays: Decoder(base, arrays, config.base.remat), weights)
        sites, section = config.adapted(model.sites), config.training
        build = make_stackable_optimizer if runs else make_optimizer
        optimizer = build(section, config.adapter.rate_ratios())
        adapter = jax.eval_shape(
            lambda key: create_adapter(config.adapter, sites, key), jax.random.key(0)
        )
        parts, trained = AdapterParts.split(adapter)
        state = jax.eval_shape(
            lambda trained, key: initial_state(trained, optimizer, key), trained, jax.random.key(0)
        )
        arguments = [state, parts, model, jax.tree.map(_shape_of, batch)]
        make: Callable[..., jax.stages.Wrapped] = make_train_step
        if runs:
            make = make_stacked_step
            for place in (0, 1, 3):
                arguments[place] = jax.tree.map(
                    lambda leaf: jax.ShapeDtypeStruct((runs, *leaf.shape), leaf.dtype),
                    arguments[place],
                )
        step = make(optimizer, section.dropout, section.accumulation)
        matrices = {
            weight.shape[-2:]: weight.dtype.itemsize * weight.shape[-1] * weight.shape[-2]
            for name, weight in weights.items()
            if not name.endswith("norm")
        }
        return cls(step, tuple(arguments), matrices)

    def traced(self) -> Facts:
        """Counted in the traced program.

        Returns:
          `flops` of all matrix products; `weight_bytes`, how much of the base they read. A
          product of the base's matrix with a leading axis of runs would not be found.
        """
        jaxpr = jax.make_jaxpr(self.step)(*self.arguments)
        read = sum(
            times * self.weights.get(operand.aval.shape, 0)
            for equation, times in matrix_products(jaxpr)
            for operand in equation.invars
        )
        return {"flops": count_flops(jaxpr), "weight_bytes": read}

    def compiled(self, unroll: bool = False) -> Facts:
        """What XLA says of the compiled program, which is not run."""
        unrolled = functools.partial(jax.lax.scan, unroll=True)
        with mock.patch.object(jax.lax, "scan", unrolled if unroll else jax.lax.scan):
            # Lowered anew: the traced function is remembered with its loops as they were.
            jax.clear_caches()
            compiled = self.step.lower(*self.arguments).compile()
        cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
        return {
            "flops": cost["flops"],
            "bytes_accessed": cost["bytes accessed"],
            "temporary_bytes": memory.temp_size_in_bytes,
            "argument_bytes": memory.argument_size_in_bytes,
        }


def _shape_of(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def parse_size(text: str) -> tuple[int, int]:
    """Rows and tokens from "4x208". Raises InputError."""
    rows, _, width = text.partition("x")
    if not (rows.isdigit() and width.isdigit() and int(rows) and int(width)):
        raise InputError(f"--sizes: {text!r} must be rows x tokens, such as 4x208")
    return int(rows), int(width)


def resized(config: RunConfig, size: tuple[int, int]) -> RunConfig:
    """The run with batches of `size`: rows and tokens of each."""
    data = dataclasses.replace(config.data, batch_size=size[0], sequence_length=size[1])
    return dataclasses.replace(config, data=data)


def compare_programs(config: RunConfig, size: tuple[int, int], runs: int, say: Say) -> Facts:
    """Figures of one step of one run, and of `runs` stacked ones.

    Returns:
      `separate` (one run) and `stacked`, each with `traced`, `compiled` (its temporaries and
      arguments) and, where the base is deep enough, `unrolled` (XLA's counts, drawn on to the
      depth of the base).
    """
    session = Session.create(resized(config, size))
    batch, base = session.data.source(0)[0], session.base.config
    found = {}
    for name, count in (("separate", 0), ("stacked", runs)):
        say(f"{size[0]} x {size[1]}: compiling {name}")
        program = Program.build(config, base, batch, count)
        found[name] = {"traced": program.traced(), "compiled": program.compiled()}
        if base.num_layers > DEPTHS[1]:
            low, high = (
                Program.build(
                    config, dataclasses.replace(base, num_layers=depth), batch, count
                ).compiled(unroll=True)
                for depth in DEPTHS
            )
            share = (base.num_layers - DEPTHS[0]) / (DEPTHS[1] - DEPTHS[0])
            found[name]["unrolled"] = {
                key: low[key] + share * (high[key] - low[key])
                for key in ("flops", "bytes_accessed")
            }
    return found


def compare_clock(
    config: RunConfig,
    size: tuple[int, int],
    runs: int,
    steps: int,
    rounds: int,
    threads: int,
    say: Say,
) -> Facts:
    """Examples per second of `runs` runs, separate and stacked.

    Returns:
      `separate` and `stacked`, each with what `StackedSide.prepare` tells, by round `seconds`,
      `processor_seconds` and `others`, and `examples_per_second`; and `speed_up`, the ratio of
      their times within a round. That of processor seconds says more where other programs run.
    """
    with Worker(
        "experiments.bench.stacked:StackedSide",
        threads,
        config=resized(config, size).to_dict(),
        runs=runs,
        steps=steps,
    ) as worker:
        found: dict[str, Any] = worker.prepare()
        done: dict[str, list[Run]] = {name: [] for name in found}
        for number in range(rounds):
            # Either goes first in turn.
            for name in sorted(found, reverse=bool(number % 2)):
                done[name].append(worker.run(name))
                run = done[name][-1]
                say(f"round {number + 1}: {name} {run.seconds:.2f} s, others {run.others or 0:.0%}")
    for name, facts in found.items():
        facts["seconds"] = [run.seconds for run in done[name]]
        facts["processor_seconds"] = [run.processor for run in done[name]]
        facts["others"] = [run.others for run in done[name]]
        facts["examples_per_second"] = spread([facts["examples"] / s for s in facts["seconds"]])
    losses = (facts["losses"] for facts in found.values())
    apart = max(abs(a - b) for a, b in zip(*losses, strict=True))
    if apart > LOSS_TOLERANCE:
        raise RunEnded(f"losses of the first step differ by {apart}")
    return {
        **found,
        "speed_up": {
            key: ratio(found["separate"][key], found["stacked"][key])
            for key in ("seconds", "processor_seconds")
            if None not in found["separate"][key]
        },
    }


def print_stacked(entry: Facts, runs: int, console: Console) -> None:
    """Prints what was found at one size of a batch, as a table of ratios."""
    title = f"{runs} runs of {entry['rows']} x {entry['width']} tokens"
    table = Table("", f"{runs} steps", "one stacked step", "ratio", title=title)
    for column in table.columns[1:]:
        column.justify = "right"
    if "programs" in entry:
        alone, together = entry["programs"]["separate"], entry["programs"]["stacked"]
        for label, part, key, unit, times in (
            ("matrix products, GFLOP", "traced", "flops", 1e9, runs),
            ("base weights read by them, MiB", "traced", "weight_bytes", 2**20, runs),
            ("XLA's operations, GFLOP", "unrolled", "flops", 1e9, runs),
            ("XLA's bytes accessed, MiB", "unrolled", "bytes_accessed", 2**20, runs),
            ("temporaries, MiB", "compiled", "temporary_bytes", 2**20, 1),
        ):
            if part in alone:
                before, after = times * alone[part][key], together[part][key]
                cells = (f"{before / unit:,.1f}", f"{after / unit:,.1f}", f"{after / before:.3f}")
                table.add_row(label, *cells)
    if "clock" in entry:
        sides = [entry["clock"][name] for name in ("separate", "stacked")]
        speeds = (f"{side['examples_per_second']['median']:.2f}" for side in sides)
        table.add_row("examples/s, median", *speeds, "")
        for key, found in entry["clock"]["speed_up"].items():
            label = f"speed-up within a round, {key.replace('_', ' ')}"
            shown = f"{found['median']:.2f} ({found['min']:.2f} to {found['max']:.2f})"
            table.add_row(label, "", "", shown)
        shares = (f"{max(other or 0.0 for other in side['others']):.0%}" for side in sides)
        table.add_row("processors busy for others, at most", *shares, "")
    console.print(table)


class StackedSide:
    """Real steps on real batches; see `worker.Side`."""

    def __init__(self, config: dict[str, Any], runs: int, steps: int):
        configs = members(RunConfig.from_mapping(config), runs)
        loads = Loads()
        self._group = Group.create(configs, loads)
        self._sessions = [Session.create(config, loads) for config in configs]
        self._sources = [s.data.source(s.config.training.seed) for s in self._sessions]
        self._model = self._sessions[0].base.model
        self._steps = steps
        self._stacked, self._stacked_parts = self._group.initial()
        self._separate = [session.initial() for session in self._sessions]
        self._steppers = {
            "stacked": self._group.train_step(),
            # Their rates differ, so each is a program of its own.
            **{f"separate {n}": s.train_step() for n, s in enumerate(self._sessions)},
        }

    def prepare(self) -> dict[str, Facts]:
        """Compiles all, and takes the first step."""
        facts = {}
        for name in ("separate", "stacked"):
            start = time.perf_counter()
            losses = self._advance(name, 0)
            seconds = time.perf_counter() - start
            batches = [source[step] for source in self._sources for step in range(self._steps)]
            examples = sum(
                len(set(row[row >= 0].tolist())) for b in batches for row in b.loss_examples
            )
            facts[name] = {
                "loss": losses[0],
                "losses": losses,
                "start_seconds": seconds,
                "examples": examples,
            }
        return facts

    def _advance(self, name: str, step: int) -> list[float]:
        batches = [source[step] for source in self._sources]
        if name == "stacked":
            self._stacked, metrics = self._steppers[name](
                self._stacked, self._stacked_parts, self._model, stack_batches(batches)
            )
            return [float(loss) for loss in metrics["loss"]]
        losses = []
        for number, (batch, (state, parts)) in enumerate(zip(batches, self._separate, strict=True)):
            stepper = self._steppers[f"separate {number}"]
            state, metrics = stepper(state, parts, self._model, batch)
            self._separate[number] = state, parts
            losses.append(metrics["loss"])
        return [float(loss) for loss in losses]

    def run(self, contestant: str) -> float:
        """The steps of all runs."""
        start = time.perf_counter()
        for step in range(self._steps):
            self._advance(contestant, step)
        return time.perf_counter() - start
