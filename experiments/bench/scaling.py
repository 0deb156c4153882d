"""How a step's cost grows with each of its sizes, and where assembly belongs: tables of numbers.

Every number is written as soon as it is known, see `notes.py`, so that a run that was interrupted
goes on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench.dense import dense_batch, dense_tokens
from experiments.bench.notes import Notes, Say
from experiments.bench.rounds import Rounds, play_facts, spread_words
from experiments.bench.worker import Facts, Worker
from mos_jax.adapters.methods import create_adapter
from mos_jax.adapters.mos import MoSConfig
from mos_jax.adapters.unassembled import unassembled
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
from mos_jax.training.session import Loads
from mos_jax.training.step import AdapterParts, initial_state, make_train_step

# Known bases, with rows and tokens of a batch.
BASES = {"smollm2-135m": (8, 128), "llama3.2-1b": (4, 512), "llama2-7b": (4, 512)}
PLACES = (*ASSEMBLIES, "unassembled")
# At which the places of assembly are compared. Without any, cost does not depend on r.
SETTINGS = {
    MoSConfig(2, 16, 1, 1): ASSEMBLIES,
    MoSConfig(2, 16, 8, 1): PLACES,
    MoSConfig(8, 64, 1, 1): ASSEMBLIES,
    MoSConfig(8, 64, 8, 1): ASSEMBLIES,
    MoSConfig.pure_sharing(2): PLACES,
}
# Of which seconds are taken, with the places that are compared. ("Not at all" at the second would
# take 30 times the operations of the branch.)
TIMED = {
    MoSConfig(2, 8, 2, 1): PLACES,
    MoSConfig(8, 64, 8, 1): ASSEMBLIES,
    MoSConfig.pure_sharing(2): PLACES,
}
# The same on a tiny base.
TIMED_QUICKLY = {MoSConfig(2, 2, 2, 1): PLACES, MoSConfig.pure_sharing(2): PLACES}
_PLACE_WORDS = {"unassembled": "not at all"}
ADAPTER_AXES = ("rank", "equivalent_rank", "shards_per_vector")


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
    """Costs on each device along each axis of a mesh; on the most also for assembly inside."""
    for where in ASSEMBLIES:
        for name in MESH_AXES:
            for count in DEVICES if where == ASSEMBLIES[0] else DEVICES[-1:]:
                asked = assembled(vary(request, name, count), where)
                key = f"devices/{name}/{count}/{where}"
                notes.get(key, functools.partial(_costs, asked, notes), say)


def _costs(asked: Request, notes: Notes) -> Facts:
    """The costs of a request; those of a step that is known already are not found again."""
    program = asked.digest()
    for key, facts in notes.found.items():
        if notes.known(key) and facts.get("program") == program:
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
    with _standing_in(where) as place:
        return step_costs(assembled(asked, place)).to_dict()


@contextlib.contextmanager
def _standing_in(where: str) -> Iterator[str]:
    """A place of assembly under the name that a run may choose; see `PLACES`."""
    if where in ASSEMBLIES:
        yield where
        return
    # Not a choice of a run, so it stands in for one here.
    with mock.patch.dict(step.SOURCES, inside=lambda a: functools.partial(unassembled, a)):
        yield "inside"


def time_places(
    request: Request,
    settings: Mapping[MoSConfig, Sequence[str]],
    how: Rounds,
    notes: Notes,
    say: Say,
) -> None:
    """Seconds of a step for each place of assembly, in interleaved rounds."""
    for setting, places in settings.items():
        config = dataclasses.replace(request.config, adapter=setting)
        asked = dataclasses.replace(request, config=config)
        runs = {where: (asked, where) for where in places}
        key = f"seconds_of_places/{request.rows} x {request.width}/{setting_name(setting)}"
        notes.get(key, functools.partial(_interleaved, runs, how, say), say)


def time_scaling(request: Request, how: Rounds, notes: Notes, say: Say) -> None:
    """Seconds of a step along each axis, the values of an axis in interleaved rounds."""
    where = request.config.training.assembly
    for axis in scaling_axes(request):
        runs = {str(value): (vary(request, axis.name, value), where) for value in axis.values}
        key = f"seconds/{axis.name}"
        notes.get(key, functools.partial(_interleaved, runs, how, say), say)


def _interleaved(runs: Mapping[str, tuple[Request, str]], how: Rounds, say: Say) -> Facts:
    with Worker("experiments.bench.scaling:Steps", how.threads, runs=runs) as worker:
        return play_facts([(name, worker) for name in worker.prepare()], how, say)


class Steps:
    """Real steps by name, on random tokens; see `worker.Side`.

    Args:
      runs: by name, a step and its place of assembly, all on one base or its first blocks.
    """

    def __init__(self, runs: Mapping[str, tuple[Request, str]]):
        sections = {request.config.base for request, _ in runs.values()}
        (section,) = sections
        base = Loads().base(section)
        self._calls: dict[str, Callable[[], None]] = {}
        for name, (request, where) in runs.items():
            with _standing_in(where) as place:
                self._calls[name] = _ready(assembled(request, place), base)

    def prepare(self) -> dict[str, Facts]:
        """Nothing more: all are compiled."""
        return {name: {} for name in self._calls}

    def run(self, contestant: str) -> float:
        """One step."""
        start = time.perf_counter()
        self._calls[contestant]()
        return time.perf_counter() - start


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
    config = dataclasses.replace(model.config, num_layers=depth)
    return Decoder(config, weights, model.remat, None, model.attention, model.logits_mib)


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
                place = _PLACE_WORDS.get(where, where)
                name = f"{base}, {rows} x {width}"
                lines.append(f"| {name} | {setting_name(setting)} | {place} | {cells} |")
    return "\n".join(lines) + "\n"


def seconds_table(found: dict[str, Any]) -> str:
    """Seconds by place of assembly as a table in Markdown: ratios to the first place."""
    lines = [
        "| batch | MoS | assembled | processor seconds, ratio | seconds, ratio | others, most |",
        "| --- | --- | --- | ---: | ---: | ---: |",
    ]
    for key, facts in sorted(found.items()):
        part, *names = key.split("/")
        if part == "seconds_of_places":
            for where in (place for place in PLACES if place in facts):
                run = facts[where]
                cells = (
                    *names, _PLACE_WORDS.get(where, where), spread_words(run["ratio"]),
                    spread_words(run["clock_ratio"]), f"{max(run['others']):.0%}",
                )  # fmt: skip
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
