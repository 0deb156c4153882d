"""The wheel, installed outside the checkout, is the library: whole, and nothing beside it."""

import os
import shutil
import subprocess
import sys
import zipfile

import pytest

import mos_jax
from tests.experiments.fixtures_programs import ROOT

PROGRAM = """
import pathlib, sys
import jax, mos_jax
from mos_jax.training.config import RunConfig, default_config
from mos_jax.training.loop import train

assert pathlib.Path(mos_jax.__file__).is_relative_to(sys.argv[1]), mos_jax.__file__
config = default_config("mos", equivalent_rank=2, rank=3, shards_per_vector=2)
config.base.name = "tiny-random"
config.data.task = "jsonl"
config.data.train_path = "lines.jsonl"
config.data.sequence_length = 128
config.data.batch_size = 2
config.training.steps = 2
config.evaluation.every = 0
config.evaluation.samples = 0
summary = train(RunConfig.from_mapping(config.to_dict()), "run")
base = mos_jax.load_base("tiny-random")
adapter = mos_jax.load_adapter("run/adapter", sites=base.sites)
mos_jax.export_peft("peft", adapter.factors(), base_name=base.name, num_layers=2)
print(summary["steps"], mos_jax.__version__)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy, so that nothing is left in the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    hidden = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "mos_jax", source / "mos_jax", ignore=hidden)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", str(folder)]
    done = subprocess.run([*command, str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = folder.glob("*.whl")
    return found


def test_it_holds_the_library_and_nothing_else(wheel):
    assert wheel.name == f"mos_jax-{mos_jax.__version__}-py3-none-any.whl"
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in names}
    assert tops == {"mos_jax", f"mos_jax-{mos_jax.__version__}.dist-info"}
    package = ROOT / "mos_jax"
    files = {
        path.relative_to(ROOT).as_posix()
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {name for name in names if name.startswith("mos_jax/")} == files


def test_it_trains_and_exports_outside_the_checkout(wheel, tmp_path):
    library, work = tmp_path / "library", tmp_path / "work"
    work.mkdir()
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
    subprocess.run([*install, str(library), str(wheel)], check=True, capture_output=True)
    lines = [f'{{"prompt": "{n} and one?", "completion": "{n + 1}"}}\n' for n in range(40)]
    (work / "lines.jsonl").write_text("".join(lines))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(library)],
        cwd=work,
        env={**os.environ, "PYTHONPATH": str(library)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == f"2 {mos_jax.__version__}"
    assert (work / "peft/adapter_model.safetensors").stat().st_size > 0
