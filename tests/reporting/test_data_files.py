import json

import pytest

from mos_jax.reporting.data_files import flat_records
from mos_jax.reporting.results import load_results
from mos_jax.statistics.shares import wilson_interval

# Of the method comparison of Hugging Face PEFT, without the versions of PyTorch packages.
PEFT_COLUMNS = {
    "experiment_name", "peft_type", "total_time", "train_time", "test_accuracy", "train_loss",
    "accelerator_memory_max", "accelerator_memory_reserved_99th", "accelerator_memory_reserved_avg",
    "file_size", "num_trainable_params", "created_at", "task_name", "model_id", "train_config",
    "peft_config", "train_samples", "train_total_tokens", "package_info",
}  # fmt: skip
OWN_COLUMNS = {
    "arm", "stage", "status", "error", "seed", "routing_seed", "learning_rate", "test_accuracy_low",
    "test_accuracy_high", "stored_bytes", "served_bytes", "adapter_bytes", "temp_bytes",
    "step_seconds", "budget_ratio", "unequal", "training.steps", "base.name",
}  # fmt: skip


@pytest.fixture(scope="module")
def records(study):
    return flat_records(load_results([study]))


def test_every_run_has_one_flat_record_with_all_columns(records):
    assert len(records) == 9 * (2 + 4)
    for record in records:
        assert set(record) >= PEFT_COLUMNS | OWN_COLUMNS
        assert not any(isinstance(value, (dict, set)) for value in record.values())
        assert not any("scores" in name for name in record)
    assert json.loads(json.dumps(records)) == records


def test_columns_say_what_the_run_says(records, study):
    record = next(r for r in records if (r["arm"], r["stage"], r["seed"]) == ("MoS", "final", 1))
    scores = json.loads((study / "runs/MoS/final-lr0.002-seed1/scores.json").read_text())["test"]
    assert record["experiment_name"] == "MoS/final-lr0.002-seed1"
    assert record["peft_type"] == "MOS"
    assert record["test_accuracy"] == sum(scores) / len(scores)
    low, high = wilson_interval(sum(scores), len(scores))
    assert (record["test_accuracy_low"], record["test_accuracy_high"]) == (low, high)
    assert record["test_items"] == 256
    assert record["num_trainable_params"] == record["trained_parameters"] == 610_560
    assert record["file_size"] == record["adapter_bytes"]
    assert (record["train_time"], record["total_time"]) == (100.0, 120.0)
    assert record["train_samples"] == 40 * 12.5
    assert json.loads(record["peft_config"])["rank"] == 8
    assert json.loads(record["train_config"])["learning_rate"] == 2e-3
    assert json.loads(record["package_info"])["jax"] == "0.10.0"
    assert record["adapter.shards_per_vector"] == 2


def test_runs_that_are_missing_or_failed_measured_nothing(records):
    lacking = [record for record in records if record["status"] != "finished"]
    assert len(lacking) == 4
    for record in lacking:
        assert record["test_accuracy"] is None
        assert record["test_accuracy_low"] is None
        assert record["train_time"] is None
        assert record["created_at"] is None
        assert (record["error"] is None) == (record["status"] == "missing")
