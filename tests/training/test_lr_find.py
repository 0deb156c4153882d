"""The range test of the learning rate, and what is read off its curve."""

import io
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from mos_jax import InputError
from mos_jax.errors import RunEnded
from mos_jax.reporting.rate_picture import range_test_picture
from mos_jax.training.config import TrainingSection
from mos_jax.training.loop import train
from mos_jax.training.lr_find import (
    check_range,
    find_rate,
    print_suggestion,
    rising_schedule,
    smooth,
    suggest_rate,
)
from mos_jax.training.optimizer import make_optimizer
from tests.training.fixtures_training import tiny_run, write_data

ROOT = Path(__file__).parents[2]
QUIET = Console(quiet=True)
RATES = np.geomspace(1e-5, 1.0, 101)


def curve(falls_at, turns_at):
    """From 7 to 1 around one rate, and up again beyond another, over the logarithm of the rate."""
    x = np.log10(RATES)
    fall = 6 / (1 + np.exp(-6 * (x - math.log10(falls_at))))
    rise = 40 * np.maximum(0, x - math.log10(turns_at)) ** 2
    return 7 - fall + rise


@pytest.mark.parametrize(("falls_at", "turns_at"), [(3e-4, 1e-2), (3e-4, 1e-1), (1e-2, 3e-2)])
@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_the_suggestion_is_the_middle_of_the_bottom(falls_at, turns_at, noise):
    losses = curve(falls_at, turns_at) + noise * np.random.default_rng(0).standard_normal(101)
    found = suggest_rate(list(RATES), smooth(list(losses), 101))
    assert found.rate == pytest.approx(math.sqrt(found.settled * found.edge))
    # Nine tenths of a logistic fall are done 0.37 decades after its middle.
    assert falls_at < found.settled < 5 * falls_at
    assert turns_at / 3 < found.edge < 2 * turns_at
    assert "the middle of the bottom of the curve, from" in found.rule
    assert "turned up" not in found.rule


def test_a_second_bottom_beyond_harm_does_not_count():
    # A run that broke down may settle again, as low as before but to no use.
    losses = np.where(RATES > 3e-2, 1.0, curve(3e-4, 1e-3))
    assert suggest_rate(list(RATES), list(losses)).edge < 3e-3


def test_a_curve_that_does_not_turn_up_says_so():
    found = suggest_rate(list(RATES), list(curve(1e-3, 1e3)))
    assert found.edge == 1.0
    assert "had not turned up" in found.rule


@pytest.mark.parametrize("losses", [np.full(101, 5.0), np.linspace(5, 6, 101)])
def test_nothing_is_read_off_a_curve_that_does_not_fall(losses):
    with pytest.raises(RunEnded, match="too little to read a rate off; raise --max_rate"):
        suggest_rate(list(RATES), list(losses))


def test_smoothing_keeps_lines_and_does_not_lag():
    assert smooth([2.0] * 30, 30) == pytest.approx([2.0] * 30)
    line = smooth(list(np.arange(60.0)), 60)
    assert line[10:50] == pytest.approx(np.arange(10.0, 50.0))


def test_the_rate_rises_by_equal_factors():
    rate = rising_schedule(1e-4, 1e-1, 31)
    assert float(rate(0)) == pytest.approx(1e-4)
    assert float(rate(30)) == pytest.approx(1e-1, rel=1e-5)
    assert float(rate(10) / rate(0)) == pytest.approx(10, rel=1e-5)
    # It is the schedule that the optimiser follows: AdamW's first step has the size of the rate.
    optimizer = make_optimizer(TrainingSection(learning_rate=9.0), schedule=rate)
    weights = np.ones(3, np.float32)
    update, _ = optimizer.update(weights, optimizer.init(weights), weights)
    np.testing.assert_allclose(update, -1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((0.0, 1.0, 50), r"--min_rate must be a finite number above 0, got 0.0"),
        ((1e-4, math.inf, 50), r"--max_rate must be a finite number above 0, got inf"),
        ((1e-2, 5e-2, 50), r"--max_rate=0.05 must be at least 10 times --min_rate=0.01"),
        ((1e-1, 1e-3, 50), r"--max_rate=0.001 must be at least 10 times"),
        ((1e-4, 1.0, 9), r"--steps must be at least 10, got 9"),
    ],
)
def test_bad_ranges_are_refused(tmp_path, arguments, words):
    with pytest.raises(InputError, match=words):
        check_range(*arguments)
    low, high, steps = arguments
    config = tiny_run(str(tmp_path / "never_read.jsonl"))
    with pytest.raises(InputError, match=words):
        find_rate(config, tmp_path / "out", QUIET, min_rate=low, max_rate=high, steps=steps)
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def tested(tmp_path_factory):
    folder = tmp_path_factory.mktemp("range")
    config = tiny_run(write_data(folder), steps=1)
    found = find_rate(config, folder / "out", QUIET, min_rate=1e-3, max_rate=1e20, steps=48)
    return config, folder, found


def test_the_test_trains_from_the_start_of_a_run_until_the_loss_explodes(tested):
    config, folder, found = tested
    train(config, folder / "run", QUIET)
    first = json.loads((folder / "run/metrics.jsonl").read_text().splitlines()[0])
    assert found["losses"][0] == pytest.approx(first["loss"], rel=1e-6)
    assert min(found["losses"]) < 0.6 * found["losses"][0]
    assert found["stopped"].startswith("the loss was nan at step")
    assert len(found["rates"]) == len(found["losses"]) == len(found["smoothed"]) < 48
    assert all(map(math.isfinite, found["losses"]))
    assert json.loads((folder / "out/lr_find.json").read_text()) == json.loads(json.dumps(found))
    assert found["config"] == config.to_dict()


def test_what_is_said_and_drawn(tested):
    _, _, found = tested
    console = Console(record=True, width=200, file=io.StringIO())
    print_suggestion(found, console)
    said = console.export_text()
    rate = found["suggestion"]["rate"]
    for words in ("Stopped early: the loss was", f"Suggestion: {rate:.1e}, ", "validation data"):
        assert words in said
    axes = range_test_picture(found, "a title").axes[0]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert f"suggestion, {rate:.1e}" in labels
    assert axes.get_xscale() == "log"
    assert any(label.startswith("bottom, ") for label in labels)
    flat = {**found, "suggestion": None, "problem": "too little"}
    assert len(range_test_picture(flat, "a title").axes[0].lines) == 2
    with pytest.raises(RunEnded, match="too little"):
        print_suggestion(flat, console)


def call(*flags):
    return subprocess.run(
        [sys.executable, "experiments/lr_find.py", "--config=configs/smoke.py", *flags],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


def test_the_program_writes_its_curve_and_picture(tmp_path):
    done = call(f"--workdir={tmp_path / 'out'}", "--min_rate=1e-3", "--max_rate=10", "--steps=10")
    assert done.returncode in (0, 3), done.stdout + done.stderr
    assert "step 10/10" in done.stdout or "Stopped early" in done.stdout
    assert (tmp_path / "out/lr_find.png").read_bytes().startswith(b"\x89PNG")
    assert "suggestion" in json.loads((tmp_path / "out/lr_find.json").read_text())


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ((), "--workdir is missing"),
        (("--workdir=runs/never", "--min_rate=-1"), "--min_rate must be"),
        (("--workdir=runs/never", "--steps=2"), "--steps must be at least 10, got 2"),
    ],
)
def test_mistakes_are_one_line(flags, words):
    done = call(*flags)
    assert done.returncode == 2
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (ROOT / "runs/never").exists()
