"""What the check of an accelerator found, as tables."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

MIB = 2**20


def print_found(found: dict[str, Any], console: Console) -> None:
    """Prints parity, times and costs, see `experiments/check_accelerator.py`."""
    table = Table("result", "base", "attention", "difference", "tolerance", "", title="parity")
    for one in found["compared"]:
        tolerance = "" if one["tolerance"] is None else f"{one['tolerance']:.0e}"
        verdict = "" if one["tolerance"] is None else "within" if one["within"] else "BEYOND"
        words = (one["name"], one["dtype"], one["attention"])
        table.add_row(*words, f"{one['difference']:.1e}", tolerance, verdict)
    console.print(table)
    step, (rows, width) = found["step"], found["batch"]
    seconds = step["seconds"]
    console.print(
        f"step of {rows} x {width} tokens: {seconds['median']:.4f} s ({seconds['min']:.4f} to "
        f"{seconds['max']:.4f}), {step['tokens_per_second']:,.0f} tokens/s; compiled in "
        f"{step['compile_seconds']:.1f} s; temporaries {step['temporary_bytes'] / MIB:,.0f} MiB",
        highlight=False,
    )
    said = ", ".join(f"{name} {value / MIB:,.0f} MiB" for name, value in step["memory"].items())
    console.print(f"the device says: {said or 'nothing of its memory'}", highlight=False)
    if found["costs"]:
        costs = Table("step", "GFLOP", "GB moved", "temporaries, MiB", title="compiled costs")
        for name, cost in found["costs"].items():
            numbers = (cost["flops"] / 1e9, cost["bytes"] / 1e9, cost["temporaries"] / MIB)
            costs.add_row(name, *(f"{number:,.1f}" for number in numbers))
        for column in costs.columns[1:]:
            column.justify = "right"
        console.print(costs)
        calls = sorted({call for cost in found["costs"].values() for call in cost["uncounted"]})
        if calls:
            console.print(f"without the operations of: {', '.join(calls)}", highlight=False)
