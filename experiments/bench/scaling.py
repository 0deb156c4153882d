"""How a step's cost grows with each of its sizes, and where assembly belongs: tables of numbers.

Every number is written as soon as it is known, so that a run that was interrupted goes on.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench.dense import dense_batch, dense_tokens
from experiments.bench.worker import Facts
from mos_jax.adapters.methods import create_adapter
from mos_jax.adapters.mos import MoSConfig
from mos_jax.adapters.unassembled import unassembled
from mos_jax.files import write_file
from mos_jax.models.base import Base
from mos_jax.models.config import DecoderConfig
from mos_jax.models.decoder import Decoder
from mos_jax.models.known import known_config
from mos_jax.planning.costs import (
    DEVICES,
    MESH_AXES,
    assembled,
    make_request,
    scaling_axes,
    step_costs,
    vary,
)
from mos_jax.planning.request import Request
from mos_jax.training import step
from mos_jax.training.config import ASSEMBLIES
from mos_jax.training.optimizer import make_optimizer
from mos_jax.training.step import AdapterParts, initial_state, make_train_step

Say = Callable[[str], None]
# Known bases, with rows and tokens of a batch.
BASES = {"smollm2-135m": (8, 128), "llama3.2-1b": (4, 512), "llama2-7b": (4, 512)}
PLACES = (*ASSEMBLIES, "unassembled")
# At which the places of assembly are compared. Without any, cost does not depend on r.
SETTINGS = {
    MoSConfig(2, 16, 8, 1): PLACES,
    MoSConfig(8, 64, 8, 1): ASSEMBLIES,
    MoSConfig.pure_sharing(2): PLACES,
    MoSConfig(2, 16, 1, 1): ASSEMBLIES,
}
ADAPTER_AXES = ("rank", "equivalent_rank", "shards_per_vector")


class Notes:
    """Facts by key, in a file that is written after each."""

    def __init__(self, path: Path):
        self._path = path
        self.found: dict[str, Any] = {}
        if path.is_file():
            self.found = json.loads(path.read_text(encoding="utf-8"))

    def get(self, key: str, find: Callable[[], Any], say: Say) -> Any:
        """The facts of `key`, found now unless they were found before."""
        if key not in self.found:
            start = time.process_time()
            self.put(key, find())
            say(f"{key}: {time.process_time() - start:.1f} processor seconds")
        return self.found[key]

    def put(self, key: str, facts: Any) -> None:
        """Sets the facts of `key` and writes the file."""
        self.found[key] = facts
        self._path.parent.mkdir(parents=True, exist_ok=True)
        part = self._path.with_suffix(".part")
        write_file(part, (json.dumps(self.found, indent=1, sort_keys=True) + "\n").encode())
        part.replace(self._path)


def count_scaling(request: Request, notes: Notes, say: Say) -> None:
    """Costs of the compiled step along each axis, for either place of assembly.

    Where assembly has no part in what grows, it is counted before the scan only.
    """
    for axis in scaling_axes(request):
        places = ASSEMBLIES if axis.name in ADAPTER_AXES else ASSEMBLIES[:1]
        for where in places:
            for value in axis.values:
                asked = assembled(vary(request, axis.name, value), where)
                key = f"counts/{axis.name}/{value}/{where}"
                notes.get(key, functools.partial(_costs, asked, notes), say)


def count_devices(request: Request, notes: Notes, say: Say) -> None:
    """Costs on each device along each axis of a mesh, for either place of assembly."""
    for where in ASSEMBLIES:
        for name in MESH_AXES:
            for count in DEVICES:
                asked = assembled(vary(request, name, count), where)
                key = f"devices/{name}/{count}/{where}"
                notes.get(key, functools.partial(_costs, asked, notes), say)


def _costs(asked: Request, notes: Notes) -> Facts:
    """The costs of a request; those of a step that is known already are not found again."""
    program = asked.digest()
    for facts in notes.found.values():
        if isinstance(facts, dict) and facts.get("program") == program:
            return facts
    return {"program": program, **step_costs(asked).to_dict()}


def compare_places(request: Request, notes: Notes, say: Say) -> None:
    """Costs of each place of assembly over bases and settings, and of no assembly at all."""
    for setting, places in SETTINGS.items():
        for base, (rows, width) in BASES.items():
            for where in places:
                find = functools.partial(
                    _place, request, known_config(base), setting, rows, width, where
                )
                notes.get(f"places/{base}/{setting_name(setting)}/{where}", find, say)


def setting_name(adapter: MoSConfig) -> str:
    """The sizes of a MoS in words."""
    if not adapter.subset_selection:
        return f"e={adapter.equivalent_rank} pure sharing"
    e, shards = adapter.equivalent_rank, adapter.shards_per_vector
    return f"r={adapter.rank} e={e} l={shards}"


def _place(
    request: Request, model: DecoderConfig, adapter: MoSConfig, rows: int, width: int, where: str
) -> Facts:
    config = dataclasses.replace(request.config, adapter=adapter)
    asked = make_request(config, model, rows, width)
    if where in ASSEMBLIES:
        return step_costs(assembled(asked, where)).to_dict()
    # Not a choice of a run, so it stands in for one here.
    with mock.patch.dict(step.SOURCES, inside=lambda a: functools.partial(unassembled, a)):
        return step_costs(assembled(asked, "inside")).to_dict()


def time_scaling(request: Request, base: Base, rounds: int, notes: Notes, say: Say) -> None:
    """Seconds of a step along each axis, the values of an axis in interleaved rounds."""
    for axis in scaling_axes(request):
        key = f"seconds/{axis.name}"
        if key in notes.found:
            continue
        runs = {value: _ready(vary(request, axis.name, value), base) for value in axis.values}
        notes.put(key, interleave({str(value): run for value, run in runs.items()}, rounds, say))
        say(f"{key}: done")


def time_places(request: Request, base: Base, rounds: int, notes: Notes, say: Say) -> None:
    """Seconds of a step for each place of assembly, in interleaved rounds."""
    for rank, budget, shards in ((8, 2, 2), (64, 8, 8)):
        key = f"seconds_of_places/{rank}/{budget}/{shards}"
        if key in notes.found:
            continue
        config = dataclasses.replace(request.config, adapter=MoSConfig(budget, rank, shards, 1))
        asked = dataclasses.replace(request, config=config)
        runs = {where: _ready(assembled(asked, where), base) for where in ASSEMBLIES}
        with mock.patch.dict(step.SOURCES, inside=lambda a: functools.partial(unassembled, a)):
            runs["unassembled"] = _ready(assembled(asked, "inside"), base)
        notes.put(key, interleave(runs, rounds, say))


def interleave(runs: dict[str, Callable[[], None]], rounds: int, say: Say) -> Facts:
    """Runs all in turn, once to warm up and then `rounds` times.

    Returns:
      By run `seconds` and `processor_seconds` by round, and `ratio`, the median over the rounds of
      its processor seconds to those of the first run.
    """
    found: dict[str, Any] = {name: {"seconds": [], "processor_seconds": []} for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            clock, processor = time.perf_counter(), time.process_time()
            run()
            if number:
                found[name]["seconds"].append(time.perf_counter() - clock)
                found[name]["processor_seconds"].append(time.process_time() - processor)
        say(f"round {number} of {rounds}: {', '.join(runs)}")
    first = found[next(iter(runs))]["processor_seconds"]
    for facts in found.values():
        pairs = zip(facts["processor_seconds"], first, strict=True)
        facts["ratio"] = statistics.median(a / b for a, b in pairs)
    return found


def _ready(request: Request, base: Base) -> Callable[[], None]:
    """A step of `request` on the first blocks of `base`, compiled, as a function to call."""
    config, depth = request.config, request.model.num_layers
    model = base.model if depth == base.config.num_layers else _shallow(base.model, depth)
    optimizer = make_optimizer(config.training)
    adapter = create_adapter(config.adapter, model.sites, jax.random.key(0))
    parts, trained = AdapterParts.split(adapter)
    state = initial_state(trained, optimizer, jax.random.key(1))
    tokens = dense_tokens(model.config.vocab_size, request.rows, request.width)
    batch = jax.device_put(dense_batch(tokens))
    train = make_train_step(optimizer, assembly=config.training.assembly)
    compiled = train.lower(state, parts, model, batch).compile()
    held = [state]

    def run() -> None:
        held[0], metrics = compiled(held[0], parts, model, batch)
        jax.block_until_ready((held[0], metrics))

    return run


def _shallow(model: Decoder, depth: int) -> Decoder:
    weights = {
        name: jnp.asarray(np.asarray(weight)[:depth]) if name.startswith("blocks/") else weight
        for name, weight in model.weights.items()
    }
    return Decoder(dataclasses.replace(model.config, num_layers=depth), weights, model.remat)


def places_table(found: dict[str, Any]) -> str:
    """The places of assembly as a table in Markdown; what was not counted is left out."""
    lines = [
        "| base, batch | MoS | assembled | GFLOP | GB moved | temporaries, MiB |",
        "| --- | --- | --- | ---: | ---: | ---: |",
    ]
    for base, (rows, width) in BASES.items():
        for setting in SETTINGS:
            for where in PLACES:
                facts = found.get(f"places/{base}/{setting_name(setting)}/{where}")
                if facts is None:
                    continue
                numbers = (facts["flops"] / 1e9, facts["bytes"] / 1e9, facts["temporaries"] / 2**20)
                cells = " | ".join(f"{number:,.0f}" for number in numbers)
                place = "not at all" if where == "unassembled" else where
                name = f"{base}, {rows} x {width}"
                lines.append(f"| {name} | {setting_name(setting)} | {place} | {cells} |")
    return "\n".join(lines) + "\n"
