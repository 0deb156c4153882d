"""The two comparisons, from contestants to tables and JSON."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

from rich.console import Console
from rich.table import Table

from experiments.bench.rounds import Played, Times, check_losses, play, ratio, spread
from experiments.bench.worker import Facts, Worker
from mos_jax.adapters.mos import MoSConfig
from mos_jax.errors import InputError
from mos_jax.training.config import RunConfig

Say = Callable[[str], None]
# What the ratios of seconds, and of temporary memory, are held to.
BASE_AT_MOST, LORA_AT_MOST, PEFT_AT_MOST, BYTES_AT_MOST = 1.10, 1.05, 1.0, 1.15
JOB_AT_LEAST = 2.0
# PEFT as it is installed; and with the base's products through oneDNN, see `peft_side`.
STOCK, ONEDNN = ("peft sdpa", "peft eager"), "peft sdpa onednn"

SPREAD = ("median", "min", "max")
# Where a contestant lacks the fact, its cell stays empty. `others` is the most that other programs
# took of the processors in a round that counts. What the start takes (compiling, or the
# first step with it) is in no other figure.
COLUMNS: dict[str, Callable[[Facts], str]] = {
    "median s": lambda facts: f"{facts['seconds']['median']:.3f}",
    "min": lambda facts: f"{facts['seconds']['min']:.3f}",
    "max": lambda facts: f"{facts['seconds']['max']:.3f}",
    "cpu s": lambda facts: f"{facts['processor_seconds']['median']:.2f}",
    "others": lambda facts: f"{facts['others']['max']:.0%}",
    "ex/s": lambda facts: f"{facts['examples_per_second']['median']:.2f}",
    "padding": lambda facts: f"{facts['padding_share']:.1%}",
    "start s": lambda facts: f"{facts['start_seconds']:.1f}",
    "temp MiB": lambda facts: f"{facts['temp_bytes'] / 2**20:,.0f}",
    "GFLOP": lambda facts: f"{facts['flops'] / 1e9:,.1f}",
}


def check_config(config: RunConfig) -> MoSConfig:
    """Returns the adapter's part. Raises InputError for what the other side does not do."""
    if not isinstance(config.adapter, MoSConfig) or config.adapter.rank is None:
        raise InputError(
            f"adapter.method is {config.adapter.method!r}; the benchmark needs 'mos' and a rank"
        )
    for name, value, wanted in (
        ("base.dtype", config.base.dtype, "float32"),
        ("sites.include", config.sites.include, "all-linear"),
        ("training.accumulation", config.training.accumulation, 1),
        ("training.dropout", config.training.dropout, 0),
    ):
        if value != wanted:
            raise InputError(f"{name} is {value!r}; the benchmark needs {wanted!r}")
    return config.adapter


def compare_dense(
    config: RunConfig, shape: tuple[int, int], rounds: int, threads: int, tries: int, say: Say
) -> dict[str, Any]:
    """The dense step: forward and backward to the adapter's gradients."""
    mos = check_config(config)
    base, rank, sizes = config.base.name, mos.rank, list(shape)
    with ExitStack() as stack:
        ours = stack.enter_context(
            Worker(
                "experiments.bench.dense:JaxDense",
                threads,
                base=base,
                remat=config.base.remat,
                mos=mos,
                rank=rank,
                shape=sizes,
            )
        )
        theirs = stack.enter_context(
            Worker(
                "experiments.bench.peft_side:PeftDense",
                threads,
                base=base,
                rank=rank,
                shape=sizes,
                threads=threads,
            )
        )
        facts, played = _play([ours, theirs], rounds, tries, say)
    times = played.seconds
    best = _fastest(times, STOCK)
    temp = {name: [found["temp_bytes"]] for name, found in facts.items() if "temp_bytes" in found}
    return {
        "shape": sizes,
        "contestants": _contestants(facts, played),
        "best_peft": best,
        "ratios": {
            "mos/base": ratio(times["mos"], times["base"], at_most=BASE_AT_MOST),
            "mos/lora": ratio(times["mos"], times["lora"], at_most=LORA_AT_MOST),
            f"mos/{best}": ratio(times["mos"], times[best], at_most=PEFT_AT_MOST),
            f"mos/{ONEDNN}": ratio(times["mos"], times[ONEDNN]),
            **_processor_ratios(played, ("base", "lora", best, ONEDNN)),
            "mos/base, temp bytes": ratio(temp["mos"], temp["base"], at_most=BYTES_AT_MOST),
            "mos/lora, temp bytes": ratio(temp["mos"], temp["lora"], at_most=LORA_AT_MOST),
        },
    }


def compare_job(
    config: RunConfig, steps: int, rounds: int, threads: int, tries: int, say: Say
) -> dict[str, Any]:
    """The job, in examples per second from text to updated adapter."""
    mos = check_config(config)
    resolved = config.to_dict()
    with ExitStack() as stack:
        ours = stack.enter_context(
            Worker("experiments.bench.job:OurJob", threads, config=resolved, steps=steps)
        )
        theirs = stack.enter_context(
            Worker(
                "experiments.bench.peft_side:PeftJob",
                threads,
                config=resolved,
                steps=steps,
                ranks=[mos.rank, mos.equivalent_rank],
                threads=threads,
            )
        )
        facts, played = _play([ours, theirs], rounds, tries, say)
    times = played.seconds
    planning = facts["mos"]["planning_seconds"]
    times["mos"] = [seconds + planning for seconds in times["mos"]]
    rates: Times = {
        name: [facts[name]["examples"] / second for second in seconds]
        for name, seconds in times.items()
    }
    # Held against the same active rank as it is installed; that of the same budget, and oneDNN's
    # products, are shown as well.
    prefix, onednn = f"peft r={mos.rank} ", ONEDNN.rpartition(" ")[2]
    compared = {name for name in times if name.startswith("peft")}
    best = _fastest(
        times, [name for name in compared if name.startswith(prefix) and not name.endswith(onednn)]
    )
    rest = sorted(compared - {best}, key=list(times).index)
    found = _contestants(facts, played)
    for name, values in rates.items():
        found[name]["examples_per_second"] = spread(values)
    return {
        "contestants": found,
        "best_peft": best,
        "ratios": {f"mos/{best}": ratio(rates["mos"], rates[best], at_least=JOB_AT_LEAST)}
        | {f"mos/{name}": ratio(rates["mos"], rates[name]) for name in rest}
        # Seconds of theirs to ours, as examples a second are compared.
        | {
            f"mos/{name}, processor": ratio(played.processor[name], played.processor["mos"])
            for name in (best, *(name for name in rest if name.endswith(onednn)))
        },
    }


def _play(
    workers: list[Worker], rounds: int, tries: int, say: Say
) -> tuple[dict[str, Facts], Played]:
    facts: dict[str, Facts] = {}
    contestants: list[tuple[str, Worker]] = []
    for worker in workers:
        found = worker.prepare()
        facts |= found
        contestants += [(name, worker) for name in found]
    check_losses(facts)
    say(f"losses agree: {facts['mos']['loss']:.5f}; one warm-up round and {rounds} that count")
    return facts, play(contestants, rounds, say, tries)


def _fastest(times: Times, names: Iterable[str]) -> str:
    return min(names, key=lambda name: statistics.median(times[name]))


def _processor_ratios(played: Played, names: Iterable[str]) -> dict[str, Any]:
    processor = played.processor
    return {
        f"mos/{name}, processor": ratio(processor["mos"], processor[name])
        for name in dict.fromkeys(names)
    }


def _contestants(facts: dict[str, Facts], played: Played) -> dict[str, Any]:
    measured = {
        "seconds": played.seconds,
        "processor_seconds": played.processor,
        "others": played.others,
    }
    return {
        name: found
        | {key: {**spread(by[name]), "rounds": by[name]} for key, by in measured.items()}
        for name, found in facts.items()
    }


def print_comparison(title: str, found: dict[str, Any], console: Console) -> None:
    """Prints contestants and ratios as two tables."""
    contestants = found["contestants"]
    texts = {
        name: [_text(column, facts) for column in COLUMNS.values()]
        for name, facts in contestants.items()
    }
    kept = [i for i in range(len(COLUMNS)) if any(row[i] for row in texts.values())]
    table = Table(title, *(list(COLUMNS)[i] for i in kept))
    for name, row in texts.items():
        table.add_row(name, *(row[i] for i in kept))
    ratios = Table("ratio within a round", "median", "min", "max", "bound", "")
    for name, value in found["ratios"].items():
        ratios.add_row(name, *(f"{value[key]:.3f}" for key in SPREAD), *_verdict(value))
    for shown in (table, ratios):
        shown.columns[0].no_wrap = True
        for column in shown.columns[1:]:
            column.justify = "right"
        console.print(shown)


def _text(column: Callable[[Facts], str], facts: Facts) -> str:
    try:
        return column(facts)
    except KeyError:
        return ""


def _verdict(value: dict[str, Any]) -> tuple[str, str]:
    if value["at_least"] is not None:
        bound, met = f"at least {value['at_least']}", value["median"] >= value["at_least"]
    elif value["at_most"] is not None:
        bound, met = f"at most {value['at_most']}", value["median"] <= value["at_most"]
    else:
        return "", ""
    return bound, "met" if met else "missed"
