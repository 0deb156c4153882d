"""The report as a whole: Markdown, a page, pictures and data files in one folder."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mos_jax.analysis.sharing import Sharing, analyse_run
from mos_jax.errors import InputError
from mos_jax.files import write_file
from mos_jax.reporting import tables, text
from mos_jax.reporting.data_files import flat_records, summary_of
from mos_jax.reporting.gallery import (
    FLAT,
    Picture,
    accuracy_name,
    change_at_end,
    draw_pictures,
    memory_curves,
)
from mos_jax.reporting.page import markdown_to_html
from mos_jax.reporting.results import Results
from mos_jax.reporting.scores import Difference, Score, arm_scores, compare_arms

# From this share of the pairs on, a flat curve of recall says that there was no more to learn.
ALL_PAIRS = 0.9
MARKDOWN, PAGE, RECORDS, SUMMARY = "report.md", "report.html", "results.json", "summary.json"


@dataclasses.dataclass(frozen=True)
class SharedRun:
    """The run whose pools are looked into.

    Attributes:
      arm: its arm.
      seed: its seed.
      found: what the analysis found, or None.
      trouble: why there is nothing, or "".
    """

    arm: str
    seed: int
    found: Sharing | None
    trouble: str = ""


def look_into_sharing(results: Results) -> SharedRun | None:
    """Analyses the first finished MoS run of a baseline, or of the first arm that has one.

    What keeps it from being done, such as a base that is not on this machine, is told in the
    report and does not stop it.
    """
    first = [results.arm(name) for name in results.baselines]
    for arm in [*first, *results.arms]:
        for record in arm.finished:
            if record["method"] == "mos":
                try:
                    found = analyse_run(arm.folder / record["folder"])
                except InputError as error:
                    trouble = tables.plain_error(results, str(error))
                    return SharedRun(arm.name, record["seed"], None, trouble)
                return SharedRun(arm.name, record["seed"], found)
    return None


def write_report(
    results: Results, out: str | os.PathLike[str], shared: SharedRun | None = None
) -> Path:
    """Writes report.md, report.html, its PNGs, results.json and summary.json.

    Args:
      results: what to report.
      out: the folder, made when missing; files of an earlier report there are replaced, and its
        pictures that are not drawn any more are removed.
      shared: the run whose pools were looked into, or None.

    Returns:
      The path of report.html.

    Raises:
      InputError: if `out` is a file, or a package that draws or renders is not installed.
    """
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--out={folder} is a file; give a folder")
    scores = arm_scores(results)
    differences = {name: compare_arms(results, name) for name in results.baselines}
    sharing = None if shared is None else shared.found
    pictures = draw_pictures(results, scores, differences, sharing)
    title = f"Report: {results.title}"
    markdown = _markdown(title, results, scores, differences, pictures, shared)
    pngs = {picture.file: picture.png() for picture in pictures}
    files = {
        MARKDOWN: markdown.encode(),
        PAGE: markdown_to_html(markdown, title, pngs).encode(),
        RECORDS: _json(flat_records(results)),
        SUMMARY: _json(summary_of(results, scores, differences, sharing)),
        **pngs,
    }
    stale = _pictures_of(folder / MARKDOWN) - set(files)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_file(folder / name, content)
    for name in stale:
        (folder / name).unlink(missing_ok=True)
    return folder / PAGE


def _json(value: Any) -> bytes:
    return (json.dumps(_finite(value), indent=1, allow_nan=False) + "\n").encode()


def _finite(value: Any) -> Any:
    """The value with null for numbers that JSON does not know, as a diverged run leaves them."""
    if isinstance(value, Mapping):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _pictures_of(report: Path) -> set[str]:
    """The files that an earlier report shows."""
    if not report.exists():
        return set()
    lines = report.read_text(encoding="utf-8").splitlines()
    shown = {line.rpartition("](")[2].removesuffix(")") for line in lines if line.startswith("![")}
    return {name for name in shown if name.endswith(".png") and "/" not in name}


def _markdown(
    title: str,
    results: Results,
    scores: Mapping[str, Score],
    differences: Mapping[str, Sequence[Difference]],
    pictures: Sequence[Picture],
    shared: SharedRun | None,
) -> str:
    def shown(part: str) -> list[str]:
        return [picture.markdown() for picture in pictures if picture.part == part]

    parts = [f"# {title}\n", text.opening(results), *_verdicts(results, differences)]
    parts += ["## What was run\n", text.what_was_run(results)]
    parts += ["## What is missing\n", text.what_is_missing(results)]
    budget = results.section.budget_rank
    heading = f"Equal budget: LoRA of rank {budget}" if budget else "Accuracy and cost"
    parts += [f"## {heading}\n", text.about_scores(scores)]
    parts += [tables.size_tables(results, scores), *shown("accuracy")]
    for place, (baseline, found) in enumerate(differences.items()):
        parts.append(f"## Against {baseline}\n")
        parts.append(tables.difference_table(found, bool(results.section.margin)))
        parts += [p.markdown() for p in pictures if p.name == f"differences-{place + 1}"]
    parts += ["## Learning rates\n", tables.rate_table(results), *shown("rates")]
    if shown("curves"):
        parts += ["## Learning curves\n", *shown("curves")]
    if shown("memory"):
        parts += ["## Memory probe\n", _memory_table(results), *shown("memory")]
    if shared is not None:
        parts.append("## How the layers share their pools\n")
        if shared.found is None:
            parts.append(f"Not looked into ({shared.arm}, seed {shared.seed}): {shared.trouble}\n")
        else:
            parts.append(text.about_sharing(shared.found, shared.arm, shared.seed))
            parts += [tables.use_table(shared.found), *shown("sharing")]
    parts += ["## How to read it\n", text.how_to_read(results) + "\n"]
    parts += [
        "## Files\n",
        f"`{RECORDS}` has one flat record for each run, under the names of PEFT's method "
        f"comparison where they mean the same; `{SUMMARY}` has the statistics by arm. `{PAGE}` is "
        "this report in one file.\n",
    ]
    return "\n".join(parts)


def _verdicts(results: Results, differences: Mapping[str, Sequence[Difference]]) -> list[str]:
    parts = []
    for baseline, found in differences.items():
        parts.append(f"## In words: {accuracy_name(results)} against {baseline}\n")
        parts.append(text.in_words(results, baseline, found))
    return parts


def _memory_table(results: Results) -> str:
    recalled, bits = memory_curves(results)
    pairs = (results.fact("data_report") or {}).get("pairs")
    rows = []
    for name, curve in bits.items():
        change = change_at_end(curve)
        known = recalled[name].mean[-1] if name in recalled else None
        reading = memory_reading(change, None if known is None or not pairs else known / pairs)
        shown = tables.NONE if change is None else f"{change:+.1%}"
        held = tables.NONE if known is None else f"{known:,.1f}"
        rows.append([name, reading, held, f"{curve.mean[-1]:.3f}", shown])
    header = [
        "arm", "what the end of the curve is", "pairs recalled",
        "bits per trained parameter", "change in the last quarter of the steps",
    ]  # fmt: skip
    return tables.markdown_table(header, rows, words=2)


def memory_reading(change: float | None, share: float | None) -> str:
    """What the end of a recall curve may be called.

    Args:
      change: relative change of the bits in the last quarter of the steps, or None if unknown.
      share: of the pairs, that are recalled at the end, or None if unknown.
    """
    if change is None:
        return "not enough evaluations to tell"
    if abs(change) > FLAT:
        return "not flat: speed of learning"
    if share is not None and share > ALL_PAIRS:
        return "flat since the pairs are used up: a lower bound of the capacity"
    return "flat: a capacity, at these steps and this rate"
