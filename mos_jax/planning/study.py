"""Many plans in one table: models, slices and adapters beside each other."""

from __future__ import annotations

import dataclasses
import datetime
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mos_jax.errors import InputError
from mos_jax.files import fresh_file
from mos_jax.planning.chips import SOURCE
from mos_jax.planning.compiling import Compiler
from mos_jax.planning.estimate import ASSUMPTIONS
from mos_jax.planning.plan import GIB, make_plan
from mos_jax.planning.request import Request


@dataclasses.dataclass(frozen=True)
class Cell:
    """One plan of a study.

    Attributes:
      adapter: what it is called in the table.
      request: the step.
      notes: what was assumed for it.
    """

    adapter: str
    request: Request
    notes: tuple[str, ...]

    @property
    def name(self) -> str:
        """Model, slice and adapter, as in the table."""
        return f"{self.request.model.name} {self.request.topology} {self.adapter}"


def run_study(
    cells: Sequence[Cell],
    compiler: Compiler,
    out: Path,
    report: Path,
    command: str,
    remarks: Sequence[str] = (),
    known_only: bool = False,
    which: str = "all",
    told: Callable[[str], None] = lambda words: None,
) -> None:
    """Plans all cells and writes them as JSON and as a page, anew after every cell.

    What `out` holds already stays: a cell until it is planned anew, and others for good. Every cell
    says what it was made with: the day, the versions, and a digest of the step's code.

    Args:
      cells: in the order in which they are compiled.
      compiler: what it compiled before costs nothing.
      out: JSON file, of an earlier call or not there yet.
      report: Markdown file.
      command: what was called, for the page.
      remarks: what else the page should say.
      known_only: whether cells that would cost a compile are left out.
      which: "all" of the cells; "missing", those that `out` does not hold; or "outdated", those
        that it holds and that other code made.
      told: is called with a line for every cell.

    Raises:
      InputError: if `out` is something else; it stays as it is.
    """
    held, _ = _stored(out)
    common = {
        "command": command,
        "chips": SOURCE,
        "assumptions": list(ASSUMPTIONS),
        "remarks": list(remarks),
    }

    def write(made: dict[str, dict[str, Any]]) -> None:
        # Read again, since another call may have added its own meanwhile.
        found, wanted = _stored(out)
        found |= made
        names = dict.fromkeys([*wanted, *(cell.name for cell in cells)])
        missing = [name for name in names if name not in found]
        values = {**common, "cells": found, "missing": missing}
        with fresh_file(out) as file:
            file.write_text(json.dumps(values, indent=1) + "\n")
        with fresh_file(report) as file:
            file.write_text(page(values))

    for cell in cells:
        if not _wanted(held.get(cell.name), which, compiler):
            continue
        if known_only and not compiler.known(cell.request):
            told(f"{cell.name}: not compiled")
            continue
        plan = make_plan(cell.request, compiler)
        made = {
            "date": datetime.date.today().isoformat(),
            "versions": compiler.versions,
            "code": _code(compiler),
        }
        values = {"adapter_name": cell.adapter, "made": made, "assumed": list(cell.notes)}
        told(f"{cell.name}: {plan.verdict()}")
        write({cell.name: values | plan.to_dict()})
    write({})


def _code(compiler: Compiler) -> str:
    return compiler.code[:16]


def _wanted(cell: dict[str, Any] | None, which: str, compiler: Compiler) -> bool:
    """Whether a cell, as `out` holds it or None, is planned."""
    if which == "all" or cell is None:
        return which != "outdated"
    return which == "outdated" and cell["made"].get("code") != _code(compiler)


def _stored(out: Path) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Cells of an earlier call, and the names of those that it missed."""
    if not out.exists():
        return {}, []
    try:
        values = json.loads(out.read_text())
        page(values)
        return dict(values["cells"]), list(values["missing"])
    except (AttributeError, LookupError, OSError, TypeError, ValueError) as error:
        raise InputError(
            f"{out} holds no plans that can be added to ({type(error).__name__}: {error}); give "
            "another file, or delete it"
        ) from error


def page(values: dict[str, Any]) -> str:
    """The Markdown page of a study, from its JSON values."""
    cells = dict(sorted(values["cells"].items(), key=_place))
    assumed = sorted({note for cell in cells.values() for note in cell["assumed"]})
    lines = [
        "# Plans: training steps compiled for TPU slices without a TPU",
        "",
        f"    {values['command']}",
        "",
        "Every row is the training step itself, compiled by the TPU compiler from shapes alone; no "
        "chip has run it. docs/planner.md says how to read it.",
        "",
        *_origins(cells),
        *(f"- Assumed: {note}." for note in assumed),
        "- Bytes are of one chip. The peak is what the compiler accepts or refuses a program for; "
        "a refused one has no program, so no work to count.",
        *(f"- {remark}" for remark in values["remarks"]),
        f'- Time: {"; ".join(values["assumptions"])}; chip: {values["chips"]}. "fusions" is the '
        "compiler's own estimate, in cycles, of all but waiting for links.",
        "",
        "| model | slice | data, fsdp, tensor | adapter | arguments | temporaries | peak GiB | of "
        "| verdict | TFLOPs | received MiB | ms, least to most | fusions ms | tokens/s |",
        "|---|---|---|---|---:|---:|---:|---:|---|---:|---:|---:|---:|---:|",
        *(_row(cell) for cell in cells.values()),
        "",
        *_comparison(list(cells.values())),
    ]
    if values["missing"]:
        lines += ["", f"Not compiled yet: {'; '.join(values['missing'])}."]
    return "\n".join(lines).rstrip() + "\n"


def _place(item: tuple[str, dict[str, Any]]) -> tuple[Any, ...]:
    """Models from the smallest on, their slices likewise, and adapters beside each other."""
    _, cell = item
    model = [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", cell["model"])]
    adapter = cell["adapter"]
    slices = cell["topology"].partition(":")[0], cell["chips"]
    return model, *slices, adapter["method"] != "mos", adapter["rank"]


def _origins(cells: dict[str, dict[str, Any]]) -> list[str]:
    """A line for each way in which cells were made: the day, the versions and the code."""
    groups: dict[str, list[str]] = {}
    for name, cell in cells.items():
        groups.setdefault(json.dumps(cell["made"]), []).append(name)
    lines = []
    for key, names in groups.items():
        made = json.loads(key)
        versions = ", ".join(f"{name} {of}" for name, of in made["versions"].items())
        # Cells that an earlier code planned know its commit, and have a note on it.
        code = f"digest {made['code']}" if "code" in made else f"commit {made['commit']}"
        rows = "all rows" if len(groups) == 1 else "; ".join(names)
        note = f" {made['note']}" if "note" in made else ""
        lines.append(
            f"- Made on {made['date']} with {versions}, from the code of {code}: {rows}.{note}"
        )
    return lines


def _row(cell: dict[str, Any]) -> str:
    of = cell["bytes"]
    sizes = ", ".join(str(size) for size in cell["mesh"].values())
    verdict = "fits"
    if of["needed"] is None:
        verdict = cell["verdict"].replace("|", "\\|")
    elif not cell["fits"]:
        verdict = f"{(of['needed'] - of['usable']) / GIB:,.2f} GiB too much"
    parts = [cell["model"], cell["topology"], sizes, cell["adapter_name"]]
    parts += [_gib(of.get("arguments", of["held"])), _gib(of.get("temporaries"))]
    parts += [_gib(of["needed"]), _gib(of["usable"]), verdict]
    if "seconds" in cell:
        received = sum(kind["received"] for kind in cell["collectives"].values())
        seconds, speed = cell["seconds"], cell["tokens_per_second"]
        parts += [
            f"{cell['flops'] / 1e12:,.2f}",
            f"{received / 2**20:,.0f}",
            f"{seconds['least'] * 1e3:,.0f} to {seconds['most'] * 1e3:,.0f}",
            "" if seconds["compiler"] is None else f"{seconds['compiler'] * 1e3:,.0f}",
            f"{speed['at_most_time']:,.0f} to {speed['at_least_time']:,.0f}",
        ]
    else:
        parts += [""] * 5
    return f"| {' | '.join(parts)} |"


def _comparison(cells: Sequence[dict[str, Any]]) -> list[str]:
    """The adapters beside each other, of every model and slice that has several."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for cell in cells:
        if "seconds" in cell:
            key = (cell["model"], cell["topology"], json.dumps(cell["mesh"]))
            groups.setdefault(key, []).append(cell)
    several = [group for group in groups.values() if len(group) > 1]
    lines = [_compared(cell) for group in several for cell in group]
    if not lines:
        return []
    return [
        "## Beside each other",
        "",
        "Collectives of a step by kind: how many, and MiB that each chip receives.",
        "",
        "| model | slice | adapter | arguments MiB | temporaries MiB | peak MiB | all-gather "
        "| all-reduce | reduce-scatter | others | TFLOPs |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
        *lines,
    ]


def _compared(cell: dict[str, Any]) -> str:
    of, kinds = cell["bytes"], dict(cell["collectives"])
    named = [kinds.pop(kind, None) for kind in ("all-gather", "all-reduce", "reduce-scatter")]
    rest = {key: sum(kind[key] for kind in kinds.values()) for key in ("count", "received")}
    parts = [cell["model"], cell["topology"], cell["adapter_name"]]
    parts += [f"{of[name] / 2**20:,.1f}" for name in ("arguments", "temporaries", "needed")]
    parts += [
        f"{kind['count']:,}: {kind['received'] / 2**20:,.1f}" if kind and kind["count"] else "-"
        for kind in (*named, rest)
    ]
    parts.append(f"{cell['flops'] / 1e12:,.3f}")
    return f"| {' | '.join(parts)} |"


def _gib(size: int | None) -> str:
    return "" if size is None else f"{size / GIB:,.2f}"
