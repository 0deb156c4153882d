"""Compiled programs are kept where the user says, and no folder can stop a program."""

import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mos_jax.compilation_cache import default_folder, keep_compiled
from tests.experiments.fixtures_programs import call

ROOT = Path(__file__).parents[1]
# Also what compiles at once, so that no count depends on the time that it takes.
EVERYTHING = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
# Prints the folder, how many programs were compiled, and how many of them were found.
PROGRAM = """
import sys
from mos_jax.compilation_cache import keep_compiled
if sys.argv[2] == "late":
    import jax
print(keep_compiled(sys.argv[1] or None))
import jax, jax.numpy as jnp
from jax._src import monitoring
found = []
monitoring.register_event_listener(lambda name, **_: found.append(name))
for size in range(2, 5):
    jax.jit(lambda x: jnp.cumsum(jnp.sin(x)) @ x)(jnp.ones(size)).block_until_ready()
names = [name.rpartition("/")[2] for name in found]
print(names.count("cache_misses"), names.count("cache_hits"))
"""


@pytest.fixture
def bare(monkeypatch, tmp_path):
    """The environment of a user who set nothing, with `tmp_path` as home."""
    for name in list(os.environ):
        if name.startswith(("JAX_COMP", "JAX_ENABLE_COMP", "JAX_PERS", "MOS_JAX", "XDG")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    return monkeypatch


def start(folder="", when="early", **variables):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder), when],
        env=os.environ | EVERYTHING | variables | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    *_, where, counts = done.stdout.splitlines()
    misses, hits = map(int, counts.split())
    return where, misses, hits, done.stderr


def test_the_second_start_compiles_nothing(bare, tmp_path):
    where, misses, hits, errors = start()
    assert Path(where).parent == tmp_path / ".cache" / "mos_jax" / "compiled" == default_folder()
    assert misses >= 3
    assert (hits, errors) == (0, "")
    # Also where JAX was imported before its settings were made.
    assert start(when="late") == (where, 0, misses, "")


@pytest.mark.parametrize(
    ("folder", "variables"),
    [
        ("{}/own", {"MOS_JAX_COMPILATION_CACHE": "{}/other"}),
        ("", {"MOS_JAX_COMPILATION_CACHE": "{}/own"}),
        ("", {"MOS_JAX_COMPILATION_CACHE": "~/own", "XDG_CACHE_HOME": "{}/other"}),
        ("", {"XDG_CACHE_HOME": "{}/own"}),
    ],
    ids=["flag", "variable", "home", "xdg"],
)
def test_the_folder_is_the_one_that_was_asked_for(bare, tmp_path, folder, variables):
    for name, value in variables.items():
        bare.setenv(name, value.format(tmp_path))
    bare.setattr("mos_jax.compilation_cache._set", lambda settings: None)
    found = keep_compiled(folder.format(tmp_path) or None)
    assert found is not None
    assert found.is_relative_to(tmp_path / "own")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("how", ["flag", "variable", "of JAX"])
def test_off_keeps_nothing(bare, tmp_path, how):
    variables = {
        "flag": {},
        "variable": {"MOS_JAX_COMPILATION_CACHE": "off"},
        "of JAX": {"JAX_ENABLE_COMPILATION_CACHE": "false"},
    }[how]
    where, _, hits, errors = start("off" if how == "flag" else "", **variables)
    assert (where, hits, errors) == ("None", 0, "")
    assert list(tmp_path.iterdir()) == []


def test_only_what_takes_long_is_kept_and_no_more_than_a_limit(bare, tmp_path):
    settings = {}
    bare.setattr("mos_jax.compilation_cache._set", settings.update)
    keep_compiled(str(tmp_path))
    assert settings["JAX_COMPILATION_CACHE_MAX_SIZE"] == 2**30
    assert 0 < settings["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] < 1
    settings.clear()
    bare.setenv("JAX_COMPILATION_CACHE_MAX_SIZE", "5")
    keep_compiled(str(tmp_path))
    assert "JAX_COMPILATION_CACHE_MAX_SIZE" not in settings


def test_settings_for_jax_itself_hold(bare, tmp_path):
    bare.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "theirs"))
    before = dict(os.environ)
    assert keep_compiled() is None
    assert dict(os.environ) == before


def test_a_folder_that_cannot_be_used_is_a_warning_and_no_more(bare, tmp_path):
    (tmp_path / "file").write_text("in the way")
    where, _, _, errors = start(tmp_path / "file" / "cache")
    assert where == "None"
    assert re.fullmatch(r"warning: compiled programs are not kept: .*file.*\n", errors)


def test_processes_that_start_together_share_a_folder(bare, tmp_path):
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda _: start(), range(2)))
    assert {errors for *_, errors in found} == {""}
    _, again, hits, _ = start()
    assert again == 0
    assert hits >= 3


def test_entries_that_a_killed_process_left_half_written_are_removed(bare, tmp_path):
    bare.setattr("mos_jax.compilation_cache._set", lambda settings: None)
    folder = keep_compiled(str(tmp_path))
    assert folder is not None
    for name, old in (("whole", True), ("torn", True), ("being-written", False)):
        (folder / f"{name}-cache").write_bytes(b"x")
        if old:
            os.utime(folder / f"{name}-cache", (0, time.time() - 3600))
    (folder / "whole-atime").write_bytes(b"x")
    keep_compiled(str(tmp_path))
    left = {path.name for path in folder.glob("*-cache")}
    assert left == {"whole-cache", "being-written-cache"}


def test_opening_tensorboard_does_not_import_torch(tmp_path):
    """It would, where torch is installed: seconds of every start."""
    program = (
        "import sys; from pathlib import Path; from mos_jax.training import metrics;"
        f"metrics._open_tensorboard(Path({str(tmp_path)!r}), 0).close();"
        "assert 'torch' not in sys.modules and 'tensorboardX' in sys.modules"
    )
    start = [sys.executable, "-c", program]
    subprocess.run(start, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)


def test_the_second_start_of_a_run_finds_every_program_of_the_first(tmp_path, monkeypatch):
    """By what is kept: a program that came out otherwise would be one file more."""
    for name, value in EVERYTHING.items():
        monkeypatch.setenv(name, value)
    kept = []
    for workdir in ("first", "second"):
        call(
            "train",
            "--config=configs/smoke.py",
            f"--workdir={tmp_path / workdir}",
            f"--compilation_cache={tmp_path / 'kept'}",
            "--config.training.steps=1",
            "--config.evaluation.compare_base=False",
        )
        kept.append({path.name for path in (tmp_path / "kept").rglob("*-cache")})
    assert any("train_step" in name for name in kept[0])
    assert kept[0] == kept[1]
