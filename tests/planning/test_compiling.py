"""Finding the compiler, keeping what it compiled, and what is said where it fails."""

import json
import shutil
import sys
from pathlib import Path

import pytest

import mos_jax
from mos_jax.errors import InputError
from mos_jax.planning import compiling
from mos_jax.planning.compiling import Compiler, code_digest, find_python
from mos_jax.planning.worker import read_refusal
from tests.planning.fixtures_planning import tiny_request

# Stands for the Python of the planner's environment: it knows versions, and its worker answers as
# `answer` says, once, and counts its calls.
STAND_IN = """#!{python}
import json, pathlib, sys
here = pathlib.Path(__file__).parent
if sys.argv[1] == "-c":
    print((here / "versions").read_text())
    raise SystemExit
request = json.load(sys.stdin)
if sys.argv[4:] == ["known"]:
    print("abc" if (pathlib.Path(sys.argv[3]) / "abc.json").is_file() else "unknown")
    raise SystemExit
calls = here / "calls"
calls.write_text(calls.read_text() + "x")
answer = json.loads((here / "answer").read_text())
if "status" in answer:
    print(answer["words"], file=sys.stderr)
    raise SystemExit(answer["status"])
(pathlib.Path(sys.argv[3]) / "abc.json").write_text(json.dumps(answer))
print("words of libtpu")
print("abc")
"""
REFUSED = {
    "seconds": 1.0,
    "usable": 16 * 2**30,
    "arguments": 2**30,
    "versions": {},
    "refused": "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
    "temporaries (17.03G) exceeds available HBM (15.75G).",
}


@pytest.fixture
def stand_in(tmp_path):
    folder = tmp_path / "stand_in"
    folder.mkdir()
    python = folder / "python"
    python.write_text(STAND_IN.format(python=sys.executable))
    python.chmod(0o755)
    (folder / "calls").write_text("")
    (folder / "versions").write_text(json.dumps({"jax": "1", "libtpu": "1"}))
    (folder / "answer").write_text(json.dumps(REFUSED))
    return folder


def calls(stand_in):
    return len((stand_in / "calls").read_text())


def test_a_request_is_compiled_once(stand_in, tmp_path):
    compiler = Compiler(tmp_path / "cache", str(stand_in / "python"))
    request = tiny_request()
    assert not compiler.known(request)
    first = compiler.program(request)
    assert not first.fits
    assert first.peak == round(17.03 * 2**30)
    # Another process, with the same cache.
    again = Compiler(tmp_path / "cache", str(stand_in / "python"))
    assert again.known(request)
    assert again.program(request) == first
    assert (calls(stand_in), compiler.compiled, again.compiled) == (1, 1, 0)
    again.program(tiny_request(rows=8))
    assert calls(stand_in) == 2
    # What someone deleted is compiled again.
    (tmp_path / "cache" / "programs" / "abc.json").unlink()
    assert not again.known(request)
    assert again.program(request) == first
    assert calls(stand_in) == 3


def test_another_compiler_compiles_anew(stand_in, tmp_path):
    request, python = tiny_request(), str(stand_in / "python")
    Compiler(tmp_path / "cache", python).program(request)
    (stand_in / "versions").write_text(json.dumps({"jax": "1", "libtpu": "2"}))
    Compiler(tmp_path / "cache", python).program(request)
    assert calls(stand_in) == 2


def test_a_step_that_other_code_left_as_it_was_is_known(stand_in, tmp_path, monkeypatch):
    compiler = Compiler(tmp_path / "cache", str(stand_in / "python"))
    request = tiny_request()
    first = compiler.program(request)
    monkeypatch.setattr(compiling, "_code_digest", lambda: "of other code")
    assert compiler.code == "of other code"
    # The stand-in says that it lowers to the same.
    assert compiler.known(request)
    assert compiler.program(request) == first
    assert (calls(stand_in), compiler.compiled) == (1, 1)


@pytest.mark.parametrize("source", ["data/batches.py", "planning/worker.py", "training/step.py"])
def test_another_digest_comes_of_code_that_shapes_a_step(tmp_path, source):
    package = Path(mos_jax.__file__).parent
    copy = tmp_path / "copy"
    shutil.copytree(package, copy, ignore=shutil.ignore_patterns("__pycache__"))
    digest = code_digest(copy)
    assert digest == code_digest(package)
    with (copy / "planning/report.py").open("a") as file:
        file.write("# No step depends on how plans are printed.\n")
    assert code_digest(copy) == digest
    with (copy / source).open("a") as file:
        file.write("# Another one.\n")
    assert code_digest(copy) != digest


def test_what_the_worker_refuses_is_one_line(stand_in, tmp_path):
    words = "noise of libtpu\nerror: mos: rank=9 is too much"
    (stand_in / "answer").write_text(json.dumps({"status": 2, "words": words}))
    compiler = Compiler(tmp_path / "cache", str(stand_in / "python"))
    with pytest.raises(InputError, match=r"^mos: rank=9 is too much$"):
        compiler.program(tiny_request())
    assert not compiler.known(tiny_request())


def test_a_compiler_that_dies_is_a_defect_with_its_last_words(stand_in, tmp_path):
    (stand_in / "answer").write_text(json.dumps({"status": 9, "words": "Check failed: x"}))
    compiler = Compiler(tmp_path / "cache", str(stand_in / "python"))
    with pytest.raises(RuntimeError, match=r"status 9[\s\S]*Check failed: x"):
        compiler.program(tiny_request())


def test_without_libtpu_one_line_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.delenv(compiling.PYTHON_VARIABLE, raising=False)
    monkeypatch.setattr(compiling, "ENVIRONMENT", ".venv-of-nobody")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="`make planner` builds") as refused:
        find_python()
    assert "extra `tpu`" in str(refused.value)
    with pytest.raises(InputError, match="no such Python"):
        find_python(str(tmp_path / "python"))
    # A Python that is there and has no libtpu: this one.
    with pytest.raises(InputError, match="no working libtpu"):
        _ = Compiler(tmp_path, sys.executable).versions


def test_the_planners_environment_is_found(monkeypatch, tmp_path):
    monkeypatch.delenv(compiling.PYTHON_VARIABLE, raising=False)
    monkeypatch.setattr(compiling, "ENVIRONMENT", ".venv-of-nobody")
    monkeypatch.chdir(tmp_path)
    python = tmp_path / ".venv-of-nobody" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()
    assert find_python() == python
    other = tmp_path / "other"
    other.touch()
    monkeypatch.setenv(compiling.PYTHON_VARIABLE, str(other))
    assert find_python() == other


@pytest.mark.parametrize(
    ("message", "sizes"),
    [
        (REFUSED["refused"], (17.03, 15.75)),
        ("XLA:TPU compile permanent error. Used 20.50G of 15.75G hbm. Exceeded", (20.5, 15.75)),
        ("temporaries (2.00T) exceeds available HBM (512.00M).", (2048, 0.5)),
    ],
)
def test_refusals_are_read_in_bytes(message, sizes):
    assert read_refusal(message) == tuple(round(size * 2**30) for size in sizes)


def test_other_words_say_no_bytes():
    assert read_refusal("RESOURCE_EXHAUSTED: no such number") == (None, None)
