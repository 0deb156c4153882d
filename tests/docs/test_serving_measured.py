"""The commands of docs/serving_measured.md run; the files it names are there."""

import json
import re
import shlex
import subprocess
import sys

from tests.docs.fixtures_pages import Page
from tests.experiments.fixtures_programs import ROOT, call

PAGE = Page("serving_measured")


def test_the_commands_run(tmp_path):
    bench, soak = (shlex.split(block) for block in PAGE.blocks("bash"))
    assert bench[:2] == ["python", "experiments/bench_serving.py"]
    flags = [flag.replace("runs/", f"{tmp_path}/") for flag in bench[2:]]
    assert "| mos, host |" in call("bench_serving", *flags).stdout
    assert soak[:3] == ["python", "-m", "tests.soak"]
    words = [word.replace("runs/", f"{tmp_path}/") for word in soak[3:]]
    done = subprocess.run(
        [sys.executable, "-m", "tests.soak", *words],
        cwd=ROOT, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "soak" / "soak.json").read_text())
    assert found["problems"] == []
    assert found["sent"] >= 300
    assert (tmp_path / "soak" / "soak.png").stat().st_size > 10_000
    assert PAGE.has_only("bash")


def test_what_it_links_to_is_there():
    for target in re.findall(r"\]\(([^)#]+)\)", PAGE.text):
        if not target.startswith("http"):
            assert (ROOT / "docs" / target).exists(), target


def test_the_soak_that_is_kept_found_nothing():
    found = json.loads((ROOT / "results" / "soak.json").read_text())
    assert found["problems"] == []
    assert found["accepted"] == sum(found["ends"].values())
    assert found["sent"] >= 10_000
    assert found["seconds"] >= 1200
    assert found["compilations_after_warm_up"] == 0
