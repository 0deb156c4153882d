"""Sweeps that never ran: folders as a sweep leaves them, with numbers drawn from a seed.

python -m tests.reporting.demo FOLDER [--memory]

makes one to look at; `python experiments/report.py --workdir=FOLDER --nosharing` reports it.
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np

from mos_jax.sweeps.combinators import arm
from mos_jax.sweeps.definition import Sweep, SweepSection
from mos_jax.sweeps.runner import FORMAT, SWEEP_FILE, final_runs
from mos_jax.sweeps.tuning import choose_rates
from mos_jax.training.config import default_config

STEPS, EVERY = 40, 10
MOS = {"method": "mos", "equivalent_rank": 2, "rank": 8, "shards_per_vector": 2, "private_rank": 1}
# By arm: overrides, test accuracy, trained parameters, unequal.
STUDY = {
    "LoRA e=2": ({"method": "lora", "rank": 2}, 0.44, 610_560),
    "LoRA e=8": ({"method": "lora", "rank": 8}, 0.52, 2_442_240),
    "MoS": (MOS, 0.53, 610_560),
    "-ss": ({**MOS, "subset_selection": False, "rank": None}, 0.46, 610_560),
    "-pd": ({**MOS, "pair_dissociation": False}, 0.50, 610_560),
    "-vs": ({**MOS, "shards_per_vector": 1}, 0.51, 610_560),
    "-sp": ({**MOS, "private_rank": 0}, 0.49, 610_560),
    "pure sharing": (
        {
            "method": "mos",
            "equivalent_rank": 2,
            "rank": None,
            "subset_selection": False,
            "pair_dissociation": False,
        },
        0.43,
        610_560,
    ),
    "LoRA e=1": ({"method": "lora", "rank": 1}, 0.41, 305_280),
}
SMALL = {name: STUDY[name] for name in ("LoRA e=2", "MoS", "LoRA e=8")}


def tiny_config(section, task="jsonl"):
    config = default_config("lora", rank=2)
    config.base.name = "tiny-random"
    config.data.task = task
    if task == "jsonl":
        config.data.train_path = "unread.jsonl"
    config.training.steps = STEPS
    return {**config.to_dict(), "sweep": section}


def make_sweep(folder, arms=SMALL, *, rates="2e-3,6e-3", unequal=(), memory=False, **section):
    """Writes sweep.json and returns the sweep; no run is there yet."""
    section = {"learning_rates": rates, "budget_rank": 2, "seeds": 4, **section}
    items = [
        {**arm(name, **overrides), **({"sweep.unequal": True} if name in unequal else {})}
        for name, (overrides, *_) in arms.items()
    ]
    config = tiny_config(vars(SweepSection(**section)), "memory" if memory else "jsonl")
    sweep = Sweep.create(config, items)
    folder.mkdir(parents=True, exist_ok=True)
    stored = {"format": FORMAT, **sweep.to_dict()}
    (folder / SWEEP_FILE).write_text(json.dumps(stored))
    return sweep


def draw_scores(rng, accuracy, items, hardness):
    """0 and 1 for each item: hard items are hard for all arms."""
    return (rng.random(items) < np.clip(accuracy + hardness, 0, 1)).astype(float)


def write_run(folder, run, accuracy, parameters, *, items=256, data="d", scores=None, memory=False):
    """A finished run."""
    path = folder / run.folder
    path.mkdir(parents=True)
    rng = np.random.default_rng([run.seed, *map(ord, run.arm)])
    hardness = np.random.default_rng(7).uniform(-0.35, 0.35, items)
    reached = accuracy + rng.normal(0, 0.01)
    slow = 1.0 if run.learning_rate < 4e-3 else 0.8
    test = draw_scores(rng, reached, items, hardness) if scores is None else np.array(scores)
    validation = draw_scores(rng, reached * slow, items, hardness)
    lines = []
    for step in range(1, STEPS + 1):
        share = (1 - np.exp(-3.0 * step / STEPS)) / (1 - np.exp(-3.0))
        line = {"step": step, "loss": float(2.2 - 1.4 * share * reached + rng.normal(0, 0.1))}
        if step % EVERY == 0:
            line["validation_accuracy"] = float(max(0, share * reached * slow))
            line["validation_loss"] = float(2.0 - share * reached * slow)
            if memory:
                line["validation_pairs_recalled"] = round(512 * share * reached)
                line["validation_bits_recalled"] = 512 * 31.2 * share * reached * 1.1
        lines.append(line)
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    stored = {"validation": validation.tolist()}
    summary = {
        "steps": STEPS,
        "base": "tiny-random",
        "base_fingerprint": "b",
        "task": run.config.data.task,
        "adapter": {
            "method": run.config.adapter.method,
            "trained_parameters": parameters,
            "used_parameters": parameters,
            "stored_bytes": 4 * parameters + 3000,
            "served_bytes": 4 * parameters,
        },
        "budget": {"rank": 8, "trained": parameters, "lora_same_rank": 8 * 305_280},
        "compiled": {"temporary_bytes": 123_456_789},
        "data": {
            "task": run.config.data.task,
            "train_examples": 2000,
            "validation_examples": items,
            "test_examples": items,
            "examples_per_batch": 12.5,
            "test_commonest_answer_rate": 0.125,
            "fingerprint": data,
            **({"pairs": 512, "bits_per_pair": 31.2} if memory else {}),
        },
        "validation": {
            "loss": lines[-1]["validation_loss"],
            "accuracy": float(validation.mean()),
        },
        "adapter_bytes": 4 * parameters + 5000,
        "seconds": {
            "to_first_step": 9.0,
            "median_step": 2.0 if run.config.adapter.method == "lora" else 2.2,
            "training": 100.0,
            "total": 120.0,
        },
        "versions": {"mos_jax": "0.1.0", "jax": "0.10.0"},
    }
    if run.stage == "final":
        stored["test"] = test.tolist()
        summary["test"] = {"adapter": {"loss": 1.0, "accuracy": float(test.mean())}}
    (path / "scores.json").write_text(json.dumps(stored))
    (path / "summary.json").write_text(json.dumps(summary))


def write_failure(folder, run, words="step 3: loss nan, gradient norm inf; stopped"):
    """A run that failed."""
    path = folder / run.folder
    path.mkdir(parents=True)
    (path / "error.json").write_text(json.dumps({"error": words, "type": "Diverged"}))


def fill(folder, sweep, arms=SMALL, *, missing=(), failed=(), memory=False, items=256):
    """Finishes all runs but those named by (arm, stage, seed, rate), where rate may be None."""

    def is_in(run, named):
        return any(
            (run.arm, run.stage, run.seed) == (name, stage, seed)
            and rate in (None, run.learning_rate)
            for name, stage, seed, rate in named
        )

    def finish(runs):
        for run in runs:
            if is_in(run, missing):
                continue
            if is_in(run, failed):
                write_failure(folder, run)
            else:
                _, accuracy, parameters, *_ = arms[run.arm]
                write_run(folder, run, accuracy, parameters, memory=memory, items=items)

    finish(sweep.tuning())
    finish(final_runs(sweep, choose_rates(sweep, folder)))


def write_study(folder, memory=False):
    """A whole study with gaps: a failed rate, an arm with three seeds, one with two."""
    arms = STUDY
    if memory:
        arms = {n: STUDY[n] for n in ("LoRA e=1", "LoRA e=2", "MoS")}
    sweep = make_sweep(
        folder, arms, baseline="LoRA e=2", unequal=() if memory else ("LoRA e=1",), memory=memory
    )
    missing = [("-sp", "final", 3, None), ("LoRA e=1", "final", 3, None)]
    failed = [("pure sharing", "tune", 1000, 6e-3), ("LoRA e=1", "final", 2, None)]
    fill(folder, sweep, arms, memory=memory, missing=missing, failed=failed)


if __name__ == "__main__":
    target = Path(sys.argv[1])
    shutil.rmtree(target, ignore_errors=True)
    write_study(target, "--memory" in sys.argv)
