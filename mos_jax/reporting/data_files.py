"""What a report leaves for programs: one flat record a run, and figures by arm."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

from mos_jax.analysis.sharing import Sharing
from mos_jax.reporting.results import Arm, Results
from mos_jax.reporting.scores import Difference, Score
from mos_jax.statistics.shares import wilson_interval
from mos_jax.sweeps.records import Record, flatten

# Kept out of the flat records: long, or stored under names of their own.
LEFT_OUT = ("config", "versions", "data_report", "validation_scores", "test_scores")


def flat_records(results: Results) -> list[dict[str, Any]]:
    """One flat record for each run, for results.json.

    The names of Hugging Face PEFT's method comparison come first and are used where the meaning is
    the same: `experiment_name`, `task_name`, `model_id`, `train_config` and `peft_config` (JSON
    text), `peft_type`, `num_trainable_params`, `total_time` and `train_time` (seconds),
    `file_size` (bytes), `test_accuracy`, `train_loss` (of the last step), `train_samples`,
    `train_total_tokens`, the three `accelerator_memory` figures, `package_info` and `created_at`.
    What a sweep does not measure is null. Then the sweep's own: seeds, learning rate, the 95%
    interval of the run's accuracy over items (Wilson), bytes, losses, and every field of the
    config by its dotted name.
    """
    return [_flat(arm, record) for arm in results.arms for record in (*arm.tuning, *arm.final)]


def _flat(arm: Arm, record: Record) -> dict[str, Any]:
    config, data = record["config"], record["data_report"] or {}
    scores = record["test_scores"]
    low, high = wilson_interval(sum(scores), len(scores)) if scores else (None, None)
    peft = {
        "experiment_name": record["folder"].removeprefix("runs/"),
        "peft_type": record["method"].upper(),
        "total_time": record["total_seconds"],
        "train_time": record["train_seconds"],
        "test_accuracy": record["test_accuracy"],
        "train_loss": record["train_loss"],
        "accelerator_memory_max": None,
        "accelerator_memory_reserved_99th": None,
        "accelerator_memory_reserved_avg": None,
        "file_size": record["adapter_bytes"],
        "num_trainable_params": record["trained_parameters"],
        "created_at": _created(arm, record),
        "task_name": record["task"],
        "model_id": record["base"],
        "train_config": _section(config, "training"),
        "peft_config": _section(config, "adapter"),
        "train_samples": _samples(record, data),
        "train_total_tokens": _samples(record, data, data.get("mean_tokens")),
        "package_info": json.dumps(record["versions"]),
    }
    own = {
        "test_accuracy_low": low,
        "test_accuracy_high": high,
        "test_items": len(scores) if scores else None,
    }
    rest = {name: value for name, value in record.items() if name not in LEFT_OUT}
    return peft | rest | own | config | flatten(record["data_report"] or {}, "data_report.")


def _section(config: Mapping[str, Any], name: str) -> str:
    prefix = f"{name}."
    return json.dumps(
        {k.removeprefix(prefix): v for k, v in config.items() if k.startswith(prefix)}
    )


def _samples(record: Record, data: Mapping[str, Any], each: float | None = 1.0) -> int | None:
    """Examples that training saw, from the mean number in a batch; times the tokens of `each`."""
    if data.get("examples_per_batch") is None or each is None:
        return None
    batches = record["steps"] * record["config"].get("training.accumulation", 1)
    return round(batches * data["examples_per_batch"] * each)


def _created(arm: Arm, record: Record) -> str | None:
    """When the run ended, UTC."""
    file = arm.folder / record["folder"] / "summary.json"
    if not file.exists():
        return None
    ended = datetime.datetime.fromtimestamp(int(file.stat().st_mtime), datetime.UTC)
    return ended.isoformat()


def summary_of(
    results: Results,
    scores: Mapping[str, Score],
    differences: Mapping[str, Sequence[Difference]],
    sharing: Sharing | None,
) -> dict[str, Any]:
    """The statistics by arm, for summary.json.

    Returns:
      JSON values: `arms`, by name; `runs`, by what became of them; `comparisons`, by baseline, a
      list; `sharing`, or None.
    """
    statuses = [record["status"] for record in results.records]
    return {
        "format": "mos_jax.report",
        "title": results.title,
        "baselines": list(results.baselines),
        "margin": results.section.margin or None,
        "runs": {name: statuses.count(name) for name in ("finished", "failed", "missing")},
        "arms": {arm.name: _arm_summary(arm, scores.get(arm.name)) for arm in results.arms},
        "comparisons": {
            name: [_difference(one) for one in found] for name, found in differences.items()
        },
        "commonest_answer_rate": results.fact("commonest_answer_rate"),
        "sharing": None if sharing is None else sharing.to_dict(),
    }


def _arm_summary(arm: Arm, score: Score | None) -> dict[str, Any]:
    facts = (
        "method", "rank", "trained_parameters", "used_parameters", "budget_ratio", "stored_bytes",
        "served_bytes", "adapter_bytes", "temp_bytes",
    )  # fmt: skip
    return {
        **{name: arm.fact(name) for name in facts},
        "unequal": arm.unequal,
        "learning_rate": arm.learning_rate,
        "step_seconds": arm.median("step_seconds"),
        "seeds": sorted(arm.scores),
        "seeds_planned": len(arm.final),
        "accuracy": None if score is None else score.mean,
        "accuracy_low": None if score is None else score.low,
        "accuracy_high": None if score is None else score.high,
        "items": None if score is None else score.items,
        "interval_over": None
        if score is None
        else ("items" if score.over_items_only else "seeds and items"),
        "accuracy_by_seed": {str(s): float(v.mean()) for s, v in sorted(arm.scores.items())},
    }


def _difference(one: Difference) -> dict[str, Any]:
    seen = one.mean is not None
    return {
        "arm": one.arm,
        "verdict": one.verdict,
        "non_inferior": one.non_inferior or None,
        "difference": one.mean,
        "low": one.low if seen else None,
        "high": one.high if seen else None,
        "p_corrected": one.p,
        "paired_seeds": one.pairs,
    }
