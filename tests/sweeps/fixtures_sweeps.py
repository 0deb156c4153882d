"""A sweep of runs that take no time: an executor that writes what a run would."""

import json
from pathlib import Path

from configs import smoke
from mos_jax.sweeps.combinators import arm
from mos_jax.sweeps.definition import Sweep, SweepSection
from mos_jax.sweeps.execute import record_failure

ITEMS = (
    arm("lora", method="lora", rank=2),
    arm("mos", method="mos", equivalent_rank=2, rank=3, shards_per_vector=2),
)


def tiny_sweep(items=ITEMS, training=None, **section) -> Sweep:
    config = smoke.get_config().to_dict()
    config["training"] |= {"steps": 3, **(training or {})}
    config["logging"]["tensorboard"] = False
    fields = {"learning_rates": "1e-3,1e-2", "seeds": 2, "budget_rank": 2, **section}
    return Sweep.create({**config, "sweep": vars(SweepSection(**fields))}, items)


class Pretend:
    """An executor that trains nothing.

    The validation loss of a run is its learning rate's distance from `best`; those whose folder
    holds a word of `fails` fail; after `stop_after` tasks it is interrupted.
    """

    def __init__(self, best=1e-2, fails=(), stop_after=None):
        self.best, self.fails, self.stop_after = best, fails, stop_after
        self.ran: list[str] = []

    def run(self, tasks, started, done):
        for task in tasks:
            if self.stop_after is not None and len(self.ran) == self.stop_after:
                raise KeyboardInterrupt
            started(task)
            for folder, config in zip(task.folders, task.configs, strict=True):
                self.ran.append("/".join(Path(folder).parts[-2:]))
                if any(word in folder for word in self.fails):
                    record_failure(folder, "pretended")
                else:
                    write_run(folder, config, abs(config["training"]["learning_rate"] - self.best))
            done(task)


def write_run(folder, config, loss, accuracy=0.5):
    """What a finished run leaves behind, with made-up numbers."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "error.json").unlink(missing_ok=True)
    test = {"adapter": {"loss": loss, "accuracy": accuracy}}
    summary = {
        "steps": config["training"]["steps"],
        "base_fingerprint": "f",
        "adapter": {"trained_parameters": 120, "stored_bytes": 500, "served_bytes": 480},
        "budget": {"rank": 3, "lora_same_rank": 180},
        "compiled": {"temporary_bytes": 7},
        "data": {"test_commonest_answer_rate": 0.25},
        "validation": {"loss": loss, "accuracy": accuracy},
        "adapter_bytes": 900,
        "seconds": {"median_step": 0.5, "training": 2.0, "total": 3.0},
        "versions": {"mos_jax": "0", "jax": "0"},
    }
    scores = {"validation": [1.0, 0.0]}
    if config["evaluation"]["test_at_end"]:
        summary["test"] = test
        scores["test"] = [1.0, 0.0, 1.0, 0.0]
    (folder / "scores.json").write_text(json.dumps(scores))
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n')
    (folder / "summary.json").write_text(json.dumps(summary))
