"""The notebooks run from a clean state on a small configuration, and their pairs are in step."""

import re
import subprocess
import sys
import types
from pathlib import Path

import nbformat
import pytest

from tests.experiments.fixtures_programs import ROOT
from tools import notebooks

TINY_MOS = {"equivalent_rank": 2, "rank": 3, "shards_per_vector": 2}
TINY_SWEEP = {
    "base.name": "tiny-random",
    "training.steps": 2,
    "data.sequence_length": 512,
    "data.train_examples": 64,
    "data.validation_examples": 8,
    "data.test_examples": 8,
    "sweep.learning_rates": "2e-3",
    "sweep.seeds": 2,
}
SMALL = {
    "01_quickstart": {"CONFIG": "smoke"},
    "02_inside_mos": {"LAYERS": 5},
    "03_ablation": {"MOS": TINY_MOS, "OVERRIDES": TINY_SWEEP},
    "04_bring_your_own": {"STEPS": 2},
    "05_serve_tenants": {"BASE": "tiny-random", "RANK": 3, "STEPS": 2},
    "06_scale": {"CONFIG": "smoke"},
}
# Their folder is one of the test's.
IN_A_FOLDER = {name for name in SMALL if name != "02_inside_mos"}


def outputs(notebook):
    return [output for cell in notebook.cells for output in cell.get("outputs", ())]


def test_every_notebook_is_run_here():
    assert notebooks.names() == sorted(SMALL)


@pytest.mark.parametrize("name", sorted(SMALL))
def test_it_runs(name, tmp_path):
    parameters = dict(SMALL[name])
    if name in IN_A_FOLDER:
        parameters["WORKDIR"] = str(tmp_path / "run")
    done = notebooks.run(notebooks.read(name), parameters)
    assert not [o for o in outputs(done) if o.output_type == "error"]
    # What it said while it worked is a page of text, not a warning.
    assert not [o.text for o in outputs(done) if o.get("name") == "stderr"]


@pytest.mark.parametrize("name", sorted(SMALL))
class TestPair:
    def test_both_files_are_as_the_tool_writes_them(self, name):
        whole = notebooks.with_outputs(notebooks.read(name), name)
        for path, text in notebooks.texts(name, whole).items():
            assert path.read_text(encoding="utf-8") == text, "run python tools/notebooks.py"

    def test_the_committed_copy_has_its_outputs(self, name):
        saved = nbformat.read(notebooks.FOLDER / f"{name}.ipynb", as_version=4)
        counts = [cell.execution_count for cell in saved.cells if cell.cell_type == "code"]
        assert counts == list(range(1, len(counts) + 1))
        assert not [o for o in outputs(saved) if o.output_type == "error"]
        assert any("image/png" in o.get("data", {}) or o.get("text") for o in outputs(saved))

    def test_it_says_what_it_needs_and_opens_on_colab(self, name):
        title, badge, setup = notebooks.read(name).cells[:3]
        assert title.source.startswith(f"# {int(name[:2])}. ")
        assert "**You need**" in title.source
        assert "**It takes**" in title.source
        assert f"/notebooks/{name}.ipynb" in badge.source
        assert notebooks.repository() in setup.source

    def test_its_logic_is_imported(self, name):
        source = (notebooks.FOLDER / f"{name}.py").read_text(encoding="utf-8")
        assert not re.findall(r"^\s*(?:def|class|async) ", source, re.MULTILINE)


def test_the_address_stands_in_one_place():
    address = notebooks.repository()
    assert address.count("/") == 4
    listed = [ROOT / "mkdocs.yml", *ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    assert not [path for path in listed if address in path.read_text(encoding="utf-8")]


def test_a_parameter_that_is_none_is_refused():
    with pytest.raises(ValueError, match="no parameters of it"):
        notebooks.run(notebooks.read("02_inside_mos"), {"LAYRES": 3})


def test_a_change_of_the_source_drops_the_outputs(tmp_path, monkeypatch):
    for suffix in ("py", "ipynb"):
        old = notebooks.FOLDER / f"02_inside_mos.{suffix}"
        (tmp_path / old.name).write_bytes(old.read_bytes())
    monkeypatch.setattr(notebooks, "FOLDER", tmp_path)
    same = notebooks.with_outputs(notebooks.read("02_inside_mos"), "02_inside_mos")
    assert outputs(same)
    source = tmp_path / "02_inside_mos.py"
    source.write_text(source.read_text().replace("WIDTH = 48", "WIDTH = 96"))
    changed = notebooks.with_outputs(notebooks.read("02_inside_mos"), "02_inside_mos")
    assert not outputs(changed)


def test_the_set_up_of_colab_survives_a_restart_of_the_kernel(tmp_path, monkeypatch):
    """The checkout is there, and the kernel begins in the folder above it."""
    checkout = tmp_path / "mos_jax"
    checkout.mkdir()
    (checkout / "pyproject.toml").touch()
    monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("nothing to install"))
    code = notebooks.first_cells("02_inside_mos")[notebooks.SETUP_TAG]
    for start in (tmp_path, checkout):
        monkeypatch.chdir(start)
        exec(code, {})
        assert Path.cwd() == checkout
    assert sys.path[0] == str(checkout)


def test_the_set_up_of_colab_fetches_and_installs(tmp_path, monkeypatch):
    calls = []

    def run(command, check):
        calls.append(command)
        if command[0] == "git":
            (tmp_path / "mos_jax").mkdir()
            (tmp_path / "mos_jax/pyproject.toml").touch()

    monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.chdir(tmp_path)
    exec(notebooks.first_cells("02_inside_mos")[notebooks.SETUP_TAG], {})
    assert [command[0] for command in calls] == ["git", sys.executable, sys.executable]
    assert notebooks.repository() in calls[0]
    assert Path.cwd() == tmp_path / "mos_jax"
