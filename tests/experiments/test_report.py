"""The report's program as a user calls it."""

import json

from tests.experiments.test_programs import call
from tests.reporting.demo import SMALL, fill, make_sweep


def test_a_report_is_written_beside_the_sweep_and_names_what_is_lacking(tmp_path):
    folder = tmp_path / "sweep"
    fill(folder, make_sweep(folder), missing=[("MoS", "final", 3, None)])
    done = call("report", f"--workdir={folder}", "--nosharing", "--baseline=LoRA e=2,MoS")
    assert "missing: runs/MoS/final-lr0.002-seed3" in done.stdout
    assert f"The report is in {folder}/report/report.html." in done.stdout
    summary = json.loads((folder / "report/summary.json").read_text())
    assert list(summary["comparisons"]) == ["LoRA e=2", "MoS"]
    assert set(summary["arms"]) == set(SMALL)


def test_mistakes_are_one_line(tmp_path):
    done = call("report", ok=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("error: --workdir is missing; for example")
    done = call("report", f"--workdir={tmp_path}", ok=False)
    assert done.returncode == 2
    assert "holds no sweep: sweep.json is missing" in done.stderr
