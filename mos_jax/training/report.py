"""The result of a run, as a table for people."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table


def print_summary(
    summary: Mapping[str, Any], workdir: str | os.PathLike[str], console: Console
) -> None:
    """Prints what `train` returned: base against adapter, parameters, bytes, sample answers."""
    test, budget = summary.get("test"), summary["budget"]
    if test is not None:
        count = test["adapter"]["examples"]
        table = Table(
            "", "exact match", "95% interval", "loss", title=f"{summary['task']}, {count} held out"
        )
        for column in table.columns[1:]:
            column.justify = "right"
        method = summary["adapter"]["method"]
        for name, found in (("base", test["base"]), (f"base + {method}", test["adapter"])):
            interval = f"{found['accuracy_low']:.3f} to {found['accuracy_high']:.3f}"
            table.add_row(name, f"{found['accuracy']:.3f}", interval, f"{found['loss']:.4f}")
        rate, answer = test["commonest_answer_rate"], test["commonest_answer"]
        table.add_row(f"always {answer!r}", f"{rate:.3f}", "", "")
        console.print(table)
    sizes = Table("", "trained parameters", title="size")
    sizes.columns[1].justify = "right"
    sizes.add_row(f"this adapter (rank {budget['rank']})", f"{budget['trained']:,}")
    sizes.add_row(f"LoRA of the same rank, {budget['rank']}", f"{budget['lora_same_rank']:,}")
    sizes.add_row(
        f"LoRA of the same budget, rank {budget['lora_same_budget_rank']}",
        f"{budget['lora_same_budget']:,}",
    )
    console.print(sizes)
    console.print(f"On disk: {summary['adapter_bytes']:,} bytes.", highlight=False)
    for sample in () if test is None else test["samples"]:
        console.print(f"\nQ: {sample['question']}", highlight=False, markup=False)
        for label, key in (("right", "right"), ("before", "before"), ("after", "after")):
            console.print(f"   {label:7}{sample[key]!r}", highlight=False, markup=False)
    seconds = summary["seconds"]
    console.print(
        f"\n{summary['steps']} steps; first step after {seconds['to_first_step'] or 0:.0f} s, "
        f"training {seconds['training']:.0f} s, all {seconds['total']:.0f} s.",
        highlight=False,
    )
    console.print(f"The adapter is in {os.path.join(workdir, 'adapter')}.", highlight=False)
