"""What the fastest step's page says in numbers: the program, and that page and file agree."""

import json
from pathlib import Path

import pytest

from experiments.bench import fastest_step
from experiments.bench.notes import MAKERS
from experiments.bench.rounds import Rounds, play_facts
from experiments.bench.starts import FIRST, SECOND, Starts
from mos_jax.errors import RunEnded
from mos_jax.models.tiny import tiny_config
from mos_jax.planning.costs import compile_loss
from tests.docs.fixtures_pages import Page
from tests.experiments.fixtures_programs import ROOT, call

KEPT = ROOT / "results/fastest_step.json"
# A program that logs its first step, and how many files it found in the folder of its cache.
PROGRAM = """
import pathlib, sys
work, cache = (pathlib.Path(word.partition("=")[2]) for word in sys.argv[1:3])
assert "--config.logging.every=1" in sys.argv
work.mkdir(parents=True)
cache.mkdir(exist_ok=True)
found = len(list(cache.iterdir()))
(cache / "program").touch()
with open(sys.argv[0] + ".found", "a") as stream:
    stream.write(f"{found}\\n")
if "fail" in sys.argv[0]:
    sys.exit("no room")
(work / "metrics.jsonl").write_text("{}\\n")
import time
time.sleep(60)
"""


def test_the_program_counts_measures_and_goes_on_where_it_was(tmp_path):
    out, page = tmp_path / "deep" / "step.json", tmp_path / "step.md"
    flags = ("--quick", "--tries=1", f"--out={out}", f"--report={page}")
    parts = ("--parts=remat", "--parts=chunks")
    call("bench_step", *flags, *parts)
    found = json.loads(out.read_text())
    products, full = (found[f"remat/2 x 64/{policy}"] for policy in ("products", "full"))
    assert products["temporaries"] > full["temporaries"]
    assert products["flops"] < full["flops"]
    chunks = found["chunks/16"]["128"]
    assert len(chunks["seconds"]) == len(chunks["others"]) == 1
    text = page.read_text()
    for table in ("remat_table", "chunks_table"):
        assert getattr(fastest_step, table)(found) in text
    assert "## Starts" not in text
    # Nothing is found again, so nothing is said of it.
    again = call("bench_step", *flags, *parts).stdout
    assert "processor seconds\n" not in again
    assert json.loads(out.read_text()) == found


def test_a_limit_bounds_the_temporaries_of_the_loss():
    model = tiny_config()
    whole, chunks = (
        compile_loss(model, 1024, limit).memory_analysis().temp_size_in_bytes
        for limit in (0, 4 * 1024 * 128)
    )
    logits = 4 * 1024 * model.vocab_size
    assert whole > logits
    # Those of one chunk with their gradient, and less than half of all.
    assert chunks < whole - logits


def test_the_second_start_finds_what_the_first_one_kept(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    starts = Starts((str(program),), tmp_path / "work")
    runs = [starts.run(name) for name in (FIRST, SECOND, SECOND, FIRST)]
    assert Path(f"{program}.found").read_text().split() == ["0", "1", "1", "0"]
    for run in runs:
        assert 0 < run.seconds < 60
        assert run.processor is None or 0 <= run.processor < 60


def test_a_start_that_fails_says_why(tmp_path):
    program = tmp_path / "fail.py"
    program.write_text(PROGRAM)
    with pytest.raises(RunEnded, match=r"fail\.py came to no first step: no room"):
        Starts((str(program),), tmp_path / "work").run(FIRST)


def test_a_real_run_is_started(tmp_path):
    starts = Starts(("experiments/train.py", "--config=configs/smoke.py"), tmp_path)
    starts.run(FIRST)
    assert any(tmp_path.glob("compiled/*/*-cache"))
    (record,) = (tmp_path / "run/metrics.jsonl").read_text().splitlines()[:1]
    assert json.loads(record)["step"] == 1


def test_starts_are_a_table():
    class Runner:
        def run(self, name):
            from experiments.bench.worker import Run

            return Run(2.0 if name == FIRST else 1.0, 0.02, 3.0)

    facts = play_facts([(FIRST, Runner()), (SECOND, Runner())], Rounds(3, 1), lambda text: None)
    assert facts[SECOND]["clock_ratio"] == {"median": 0.5, "min": 0.5, "max": 0.5}
    *_, row = fastest_step.starts_table({"starts": facts}).splitlines()
    assert row == "| second | 1.00 (1.00 to 1.00) | 3.00 (3.00 to 3.00) | 2% |"


def test_pages_have_the_tables_of_the_committed_numbers():
    found = json.loads(KEPT.read_text(encoding="utf-8"))
    report = fastest_step.report(found, "make step")
    assert (ROOT / "results/fastest_step.md").read_text(encoding="utf-8") == report
    page = Page("fastest_step").text
    measured = {key.partition("/")[0] for key in found} - {MAKERS}
    assert measured >= {"remat", "logits", "loss"}
    for name in measured:
        table = getattr(fastest_step, f"{name}_table")(found)
        assert table.count("\n") > 2, name
        assert table in page, name
