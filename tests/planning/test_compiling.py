"""Finding the compiler, keeping what it compiled, and what is said where it fails."""

import io
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from rich.console import Console

import mos_jax
from mos_jax.errors import InputError
from mos_jax.planning import compiling
from mos_jax.planning.compiling import Compiler, code_digest, find_python
from mos_jax.planning.plan import make_plan
from mos_jax.planning.report import print_plan, print_ranking
from mos_jax.planning.search import search
from mos_jax.planning.study import Cell, run_study
from mos_jax.planning.worker import read_refusal
from tests.planning.fixtures_planning import GIB, RuleCompiler, tiny_request

# Stands for the Python of the planner's environment: it knows versions, and its worker names a
# program by them and the rows, answers as `answer` says where it is not there, and counts what it
# compiles.
STAND_IN = """#!{python}
import gzip, json, os, pathlib, sys
here = pathlib.Path(__file__).parent
if sys.argv[1] == "-c":
    print((here / "versions").read_text())
    raise SystemExit
request = json.load(sys.stdin)
rows = request["config"]["data"]["batch_size"]
name = "abc-%s-%s" % (rows, json.loads((here / "versions").read_text())["libtpu"])
said = pathlib.Path(sys.argv[3]) / (name + ".json")
(here / "environment").write_text(json.dumps(dict(os.environ)))
if said.is_file() or sys.argv[4:] == ["known"]:
    print(name if said.is_file() else "unknown")
    raise SystemExit
calls = here / "calls"
calls.write_text(calls.read_text() + "x")
answer = json.loads((here / "answer").read_text())
if "status" in answer:
    print(answer["words"], file=sys.stderr)
    raise SystemExit(answer["status"])
if "memory" in answer:
    said.with_suffix(".hlo.gz").write_bytes(gzip.compress(answer.pop("text").encode()))
said.write_text(json.dumps(answer))
print("words of libtpu")
print(name)
"""
REFUSED = {
    "seconds": 1.0,
    "usable": 16 * 2**30,
    "arguments": 2**30,
    "versions": {},
    "refused": "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
    "temporaries (17.03G) exceeds available HBM (15.75G).",
}

ACCEPTED = {name: REFUSED[name] for name in ("seconds", "usable", "arguments", "versions")} | {
    "memory": {
        "argument_size_in_bytes": 2**30,
        "peak_memory_in_bytes": 2**31,
        "generated_code_size_in_bytes": 1000,
    },
    "text": "ENTRY %main (p: f32[2]) -> f32[2] {\n  ROOT %p = f32[2]{0} parameter(0)\n}\n",
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
    (tmp_path / "cache" / "programs" / "abc-4-1.json").unlink()
    assert not again.known(request)
    assert again.program(request) == first
    assert calls(stand_in) == 3


@pytest.mark.parametrize("lost", ["abc-4-1.json", "abc-4-1.hlo.gz"])
def test_a_program_of_which_half_is_there_is_compiled_again(stand_in, tmp_path, lost):
    (stand_in / "answer").write_text(json.dumps(ACCEPTED))
    compiler = Compiler(tmp_path / "cache", str(stand_in / "python"))
    first = compiler.program(tiny_request())
    assert (first.fits, first.peak, first.temporaries) == (True, 2**31, 2**30)
    (tmp_path / "cache" / "programs" / lost).unlink()
    assert not compiler.known(tiny_request())
    assert compiler.program(tiny_request()) == first
    assert calls(stand_in) == 2
    assert compiler.known(tiny_request())


def test_flags_that_no_key_knows_do_not_reach_the_compiler(stand_in, tmp_path, monkeypatch):
    for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_DEFAULT_MATMUL_PRECISION", "KEPT"):
        monkeypatch.setenv(name, "highest")
    Compiler(tmp_path / "cache", str(stand_in / "python")).program(tiny_request())
    seen = json.loads((stand_in / "environment").read_text())
    assert seen["KEPT"] == "highest"
    assert not {"XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_DEFAULT_MATMUL_PRECISION"} & set(seen)
    assert seen["JAX_PLATFORMS"] == "cpu"


VMEM = """RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. It should not be possible
to run out of vmem - please file a bug.
Used 132.50M of 128.00M vmem. Exceeded vmem capacity by 4.50M."""


def test_a_refusal_for_something_else_than_main_memory_is_told_in_the_compilers_words(
    stand_in, tmp_path
):
    (stand_in / "answer").write_text(json.dumps(REFUSED | {"refused": VMEM}))
    compiler = Compiler(tmp_path / "cache", str(stand_in / "python"))
    plan = make_plan(tiny_request(), compiler)
    assert (plan.fits, plan.needed, plan.excess) == (False, None, None)
    assert plan.verdict() == (
        f"refused, and not for a chip's main memory; the compiler says: {VMEM.splitlines()[0]}"
    )
    assert plan.to_dict()["bytes"]["needed"] is None
    # It is the last of a search, and printed and tabulated without numbers.
    console = Console(record=True, width=200, file=io.StringIO())
    ranking = search(tiny_request(), Mixed(compiler), 99, rows=(4, 8), remat=("full",))
    assert [one.needed is None for one in ranking.plans] == sorted(
        one.needed is None for one in ranking.plans
    )
    assert {one.needed is None for one in ranking.plans} == {True, False}
    print_ranking(ranking, console)
    print_plan(plan, (), console)
    out = tmp_path / "plans.json"
    run_study([Cell("MoS", tiny_request(), ())], compiler, out, tmp_path / "plans.md", "make plans")
    for text in (console.export_text(), (tmp_path / "plans.md").read_text()):
        assert "Ran out of memory in memory space vmem" in text
        assert not re.search(r"-\d[\d.]* GiB", text)


class Mixed(RuleCompiler):
    """Refuses four rows as `compiler` does; eight are too much for main memory."""

    def __init__(self, compiler):
        super().__init__(lambda request: 99 * GIB)
        self._compiler = compiler

    def program(self, request):
        return (self._compiler if request.rows == 4 else super()).program(request)


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
