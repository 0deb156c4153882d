"""The sweep program as a user calls it, on a tiny base."""

import json

import pytest

from mos_jax.sweeps.records import read_records
from tests.experiments import fixtures_programs

CONFIG = '''
"""A sweep of seconds."""

from configs import smoke
from mos_jax.sweeps.combinators import arm, grid, product
from mos_jax.sweeps.definition import SweepSection


def get_config():
    config = smoke.get_config()
    config.training.steps = 2
    config.evaluation.every = 0
    config.logging.tensorboard = False
    config.sweep = vars(SweepSection(seeds=1, budget_rank=2))
    return config


def get_arms(config):
    yield arm("LoRA", method="lora", rank=2)
    yield from product(
        [arm("MoS", method="mos", equivalent_rank=2, rank=3)],
        grid("adapter.shards_per_vector", [1, 2], label="l={}"),
    )
'''


def call(*flags, ok=True):
    return fixtures_programs.call("sweep", *flags, ok=ok, columns=120)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("configs") / "tiny_sweep.py"
    path.write_text(CONFIG)
    return path


def test_a_dry_run_lists_the_runs_and_writes_nothing(config, tmp_path):
    out = call(f"--config={config}", f"--workdir={tmp_path / 'x'}", "--dry_run").stdout
    for words in ("LoRA", "MoS l=1", "MoS l=2", "final", "0.003", "3 runs, about", "GFLOP/s"):
        assert words in out, words
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_jobs_as_processes_end_like_runs_and_a_second_call_runs_nothing(config, tmp_path):
    flags = (f"--config={config}", f"--workdir={tmp_path}", "--executor=processes", "--parallel=2")
    done = call(*flags)
    assert "3/3 " in done.stdout
    assert f"experiments/report.py --workdir={tmp_path}" in done.stdout
    records = read_records(tmp_path)
    assert [(r["arm"], r["status"]) for r in records] == [
        ("LoRA", "finished"),
        ("MoS l=1", "finished"),
        ("MoS l=2", "finished"),
    ]
    assert len({r["trained_parameters"] for r in records}) == 1
    assert {r["budget_ratio"] for r in records} == {1.0}
    assert all(len(r["test_scores"]) == 8 for r in records)
    assert json.loads((tmp_path / "learning_rates.json").read_text())["LoRA"]["tried"] == {}
    jobs = sorted((tmp_path / "jobs").iterdir())
    call(*flags)
    assert sorted((tmp_path / "jobs").iterdir()) == jobs


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--config=configs/smoke.py"], "has no get_arms()"),
        (["--config.sweep.baseline=LoRA e=3", "--dry_run"], "is no arm; did you mean 'LoRA e=8'"),
        (["--config.sweep.seds=3"], "seds"),
        (["--config.sweep.seeds=3"], "--workdir is missing"),
        (["--executor=slurm", "--slurm=fast", "--workdir=unused"], "--slurm=fast must be name="),
        (["--executor=slurm", "--workdir=runs/none"], "submitit refuses"),
    ],
)
def test_bad_input_is_one_line_and_status_2(flags, words, tmp_path):
    flags = [f.replace("=unused", f"={tmp_path}/a").replace("runs/none", f"{tmp_path}/b")
             for f in flags]  # fmt: skip
    if not any(flag.startswith("--config=") for flag in flags):
        flags = ["--config=configs/core_study.py", *flags]
    done = call(*flags, ok=False)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.count("\n") == 1
    assert words in done.stderr
    assert not list(tmp_path.glob("*/runs"))
