"""Plans in words and tables, for people."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from mos_jax.planning.chips import SOURCE
from mos_jax.planning.estimate import ASSUMPTIONS, Estimate
from mos_jax.planning.outline import mesh_sizes
from mos_jax.planning.plan import Plan, size_in_words
from mos_jax.planning.search import Ranking


def print_plan(plan: Plan, notes: Sequence[str], console: Console) -> None:
    """Prints one plan: what was asked and assumed, memory, work, time, verdict."""
    request, chips = plan.request, plan.chips
    config, program = request.config, plan.program
    _say(
        console,
        f"{request.model.name}, {config.adapter.method}, "
        f"{config.base.quantize or config.base.dtype}, remat {config.base.remat}, on "
        f"{chips.name}: {chips.count} chip{'s' if chips.count > 1 else ''}, mesh "
        f"{mesh_in_words(plan)}, {config.training.accumulation} x {request.rows} rows of "
        f"{request.width} tokens and {request.targets} targets.",
    )
    for note in notes:
        _say(console, f"assumed: {note}.")
    memory = _table("memory of a chip", "bytes")
    memory.add_row("arguments", size_in_words(program.arguments if program else plan.held))
    if program is not None and program.temporaries is not None:
        memory.add_row("temporaries at the peak", size_in_words(program.temporaries))
    memory.add_section()
    if plan.needed is not None:
        memory.add_row("peak", size_in_words(plan.needed))
    memory.add_row("what programs may have", size_in_words(plan.usable))
    console.print(memory)
    if program is not None and program.counts is not None and plan.estimate is not None:
        _print_work(plan, plan.estimate, console)
    _say(console, plan.verdict())


def _print_work(plan: Plan, found: Estimate, console: Console) -> None:
    assert plan.program is not None
    counts = plan.program.counts
    assert counts is not None
    if counts.collectives:
        table = _table("collectives of a step", "number", "payload MiB", "received MiB a chip")
        for kind, of in counts.by_kind().items():
            table.add_row(
                kind,
                f"{of['count']:,}",
                f"{of['payload'] / 2**20:,.1f}",
                f"{of['received'] / 2**20:,.1f}",
            )
        console.print(table)
    table = _table("a step of a chip", "work", "ms at the chip's peak")
    received = sum(one.received for one in counts.collectives)
    table.add_row("matrix products", f"{counts.flops:.3e} FLOPs", _ms(found.compute))
    table.add_row("main memory", size_in_words(counts.bytes), _ms(found.memory))
    table.add_row("links", size_in_words(received), _ms(found.links))
    if found.compiler is not None:
        table.add_row(
            "fusions, by the compiler", f"{counts.cycles:.3e} cycles", _ms(found.compiler)
        )
    console.print(table)
    slow, fast = found.tokens_per_second
    console.print(
        f"{found.tokens:,} tokens a step, from {_ms(found.least)} ms ({found.bound}) to "
        f"{_ms(found.most)} ms: {slow:,.0f} to {fast:,.0f} tokens a second, if: "
        + "; ".join((*ASSUMPTIONS, f"chip: {SOURCE}"))
        + ".",
        highlight=False,
    )
    if counts.uncounted:
        console.print(
            f"without the operations of these custom calls: {', '.join(counts.uncounted)}.",
            highlight=False,
        )
    for loop in counts.unknown_loops:
        console.print(f"loop {loop} has no number of iterations in the program: counted once.")


def print_ranking(ranking: Ranking, console: Console) -> None:
    """Prints the settings of a search, the best first."""
    table = _table("data, fsdp, tensor", "rows", "remat", "peak", "ms", "tokens/s", "bound by")
    for plan in ranking.plans:
        config, found = plan.request.config, plan.estimate
        sizes = ", ".join(map(str, mesh_sizes(plan.request).values()))
        least = "" if plan.program else ">= "
        peak = "-" if plan.needed is None else least + size_in_words(plan.needed)
        row = (sizes, str(plan.request.rows), config.base.remat, peak)
        if found is None:
            over = plan.verdict()
            if plan.excess is not None:
                over = f"{size_in_words(plan.excess)} too much"
            table.add_row(*row, "-", "-", over)
        else:
            speed = f"{found.tokens_per_second[1]:,.0f}"
            table.add_row(*row, _ms(found.least), speed, found.bound)
    console.print(table)
    best = ranking.best
    if best is None:
        console.print("None of these fits.", highlight=False)
    else:
        mesh = ",".join(map(str, mesh_sizes(best.request).values()))
        console.print(
            f"The best that fits: --mesh={mesh} --config.data.batch_size={best.request.rows} "
            f"--config.base.remat={best.request.config.base.remat}; ms and tokens a second are the "
            "least time's, see a single plan for what it assumes.",
            highlight=False,
        )
    if ranking.untried:
        console.print(
            f"{len(ranking.untried)} settings that promise less were not compiled; --tries=N "
            "compiles more.",
            highlight=False,
        )


def _say(console: Console, words: str) -> None:
    console.print(words, highlight=False)


def mesh_in_words(plan: Plan) -> str:
    """The mesh of a plan: "data 1, fsdp 8, tensor 1"."""
    return ", ".join(f"{name} {size}" for name, size in mesh_sizes(plan.request).items())


def _table(*headings: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for number, heading in enumerate(headings):
        table.add_column(heading, overflow="fold", justify="right" if number else "left")
    return table


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:,.1f}" if seconds >= 0.01 else f"{seconds * 1000:.3g}"
