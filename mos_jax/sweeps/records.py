"""One flat record for each run of a sweep, whatever became of it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mos_jax.errors import InputError
from mos_jax.sweeps.definition import Sweep, SweepRun
from mos_jax.sweeps.execute import ERROR_FILE, status_of
from mos_jax.sweeps.runner import final_runs, load_sweep
from mos_jax.sweeps.tuning import choose_rates

Record = dict[str, Any]


def read_records(workdir: str | os.PathLike[str]) -> list[Record]:
    """The records of every run that the sweep in `workdir` is to have, tuning first.

    A run that is missing or failed has a record too, with `status` and `error`; what it did not
    measure is None. Keys: arm, stage, status, error, folder, method, seed, routing_seed,
    learning_rate, steps, base, task, unequal; trained_parameters, used_parameters, rank,
    budget_ratio, stored_bytes, served_bytes, adapter_bytes (on disk); validation_loss,
    validation_accuracy, test_loss, test_accuracy, commonest_answer_rate, train_loss (last step);
    step_seconds (median), train_seconds, total_seconds, temp_bytes (of the compiled step);
    validation_scores, test_scores (per item, in the order of the data's sets); `config`, flat by
    dotted names; `versions`.

    Raises:
      InputError: if `workdir` holds no sweep, or a file of a run cannot be read.
    """
    root = Path(workdir)
    sweep = load_sweep(root)
    runs = [*sweep.tuning(), *final_runs(sweep, choose_rates(sweep, root))]
    return [_record(sweep, run, root) for run in runs]


def _record(sweep: Sweep, run: SweepRun, root: Path) -> Record:
    folder = root / run.folder
    status = status_of(folder)
    config = run.config.to_dict()
    record: Record = {
        "arm": run.arm,
        "stage": run.stage,
        "status": status,
        "error": _read(folder / ERROR_FILE)["error"] if status == "failed" else None,
        "folder": run.folder,
        "method": run.config.adapter.method,
        "seed": run.seed,
        "routing_seed": config["adapter"].get("routing_seed"),
        "learning_rate": run.learning_rate,
        "steps": run.config.training.steps,
        "base": run.config.base.name,
        "task": run.config.data.task,
        "unequal": sweep.arm(run.arm).unequal,
    }
    found = _measured(folder, sweep.section.budget_rank) if status == "finished" else {}
    return record | {name: found.get(name) for name in MEASURED} | {"config": flatten(config)}


MEASURED = (
    "trained_parameters", "used_parameters", "rank", "budget_ratio", "stored_bytes",
    "served_bytes", "adapter_bytes", "validation_loss", "validation_accuracy", "test_loss",
    "test_accuracy", "commonest_answer_rate", "train_loss", "step_seconds", "train_seconds",
    "total_seconds", "temp_bytes", "validation_scores", "test_scores", "versions",
    "base_fingerprint", "routing_checksum", "data_report",
)  # fmt: skip


def _measured(folder: Path, budget_rank: int) -> Record:
    summary = _read(folder / "summary.json")
    try:
        scores = _read(folder / "scores.json")
        adapter, budget, seconds = (summary[name] for name in ("adapter", "budget", "seconds"))
        test = summary.get("test", {}).get("adapter", {})
        unit = budget["lora_same_rank"] // budget["rank"]
        trained = adapter["trained_parameters"]
        return {
            "trained_parameters": trained,
            "used_parameters": adapter.get("used_parameters", trained),
            "rank": budget["rank"],
            "budget_ratio": trained / (budget_rank * unit) if budget_rank else None,
            "stored_bytes": adapter["stored_bytes"],
            "served_bytes": adapter["served_bytes"],
            "adapter_bytes": summary["adapter_bytes"],
            "validation_loss": summary["validation"]["loss"],
            "validation_accuracy": summary["validation"]["accuracy"],
            "test_loss": test.get("loss"),
            "test_accuracy": test.get("accuracy"),
            "commonest_answer_rate": summary["data"].get("test_commonest_answer_rate"),
            "train_loss": _last_loss(folder),
            "step_seconds": seconds["median_step"],
            "train_seconds": seconds["training"],
            "total_seconds": seconds["total"],
            "temp_bytes": summary["compiled"].get("temporary_bytes"),
            "validation_scores": scores["validation"],
            "test_scores": scores.get("test"),
            "versions": summary["versions"],
            "base_fingerprint": summary["base_fingerprint"],
            "routing_checksum": adapter.get("routing_checksum"),
            "data_report": summary["data"],
        }
    except KeyError as error:
        raise InputError(f"{folder}: summary.json or scores.json lacks {error}") from None


def read_curve(workdir: str | os.PathLike[str], record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl of a record's run; empty where there is none."""
    file = Path(workdir) / record["folder"] / "metrics.jsonl"
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, by dotted names."""
    flat: dict[str, Any] = {}
    for name, value in nested.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _last_loss(folder: Path) -> float | None:
    file = folder / "metrics.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return json.loads(lines[-1])["loss"] if lines else None


def _read(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{file} is missing, though its run counts as finished") from None
    except ValueError as error:
        raise InputError(f"{file} is not JSON ({error}); delete its folder and run again") from None
