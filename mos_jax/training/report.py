"""The result of a run, as a table for people."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from mos_jax.evaluation.compare import print_comparison, print_samples


def print_summary(
    summary: Mapping[str, Any], workdir: str | os.PathLike[str], console: Console
) -> None:
    """Prints what `train` returned: base against adapter, parameters, bytes, sample answers."""
    test, budget = summary.get("test"), summary["budget"]
    if test is not None:
        print_comparison(test, summary["adapter"]["method"], console)
    sizes = Table("", "trained parameters", title="size")
    sizes.columns[1].justify = "right"
    sizes.add_row(f"this adapter (rank {budget['rank']})", f"{budget['trained']:,}")
    sizes.add_row(f"LoRA of the same rank, {budget['rank']}", f"{budget['lora_same_rank']:,}")
    if budget["lora_same_budget_rank"]:
        sizes.add_row(
            f"LoRA of the same budget, rank {budget['lora_same_budget_rank']}",
            f"{budget['lora_same_budget']:,}",
        )
    console.print(sizes)
    console.print(f"On disk: {summary['adapter_bytes']:,} bytes.", highlight=False)
    if test is not None:
        print_samples(test, console)
    seconds = summary["seconds"]
    console.print(
        f"\n{summary['steps']} steps; first step after {seconds['to_first_step'] or 0:.0f} s, "
        f"training {seconds['training']:.0f} s, all {seconds['total']:.0f} s.",
        highlight=False,
    )
    console.print(f"The adapter is in {os.path.join(workdir, 'adapter')}.", highlight=False)
