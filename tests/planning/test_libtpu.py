"""The TPU compiler itself, on a tiny base."""

import json
import os
import subprocess

import pytest

from mos_jax.planning.compiling import Compiler, find_python
from mos_jax.planning.worker import read_refusal
from tests.experiments.fixtures_programs import ROOT, call
from tests.planning.fixtures_planning import GIB, need_libtpu

pytestmark = pytest.mark.planner


@pytest.fixture(scope="module")
def compiler(tmp_path_factory):
    need_libtpu()
    return Compiler(tmp_path_factory.mktemp("plans"))


def test_the_program_plans_a_run_and_a_second_call_compiles_nothing(compiler):
    flags = (
        "--config=configs/smoke.py",
        "--topology=v5e:2x2",
        "--mesh=1,2,2",
        "--config.base.dtype=bfloat16",
        f"--cache={compiler.folder}",
    )
    words = call("plan", *flags).stdout
    for part in ("4 chips", "all-gather", "all-reduce", "matrix products", "fits: ", "assumed"):
        assert (part in words) == (part != "assumed"), part
    programs = {file: file.stat().st_mtime_ns for file in compiler.folder.rglob("*")}
    found = json.loads(call("plan", *flags, "--json").stdout)
    assert {file: file.stat().st_mtime_ns for file in compiler.folder.rglob("*")} == programs
    assert found["mesh"] == {"data": 1, "fsdp": 2, "tensor": 2}
    assert found["fits"]
    # Both scans over the two layers of the base.
    assert list(found["loops"].values()) == [2, 2]
    assert found["unknown_loops"] == []
    assert found["bytes"]["held"] <= found["bytes"]["arguments"] < found["bytes"]["needed"]
    assert found["collectives"]["all-gather"]["received"] > 0
    assert found["seconds"]["compiler"] > found["seconds"]["compute"] > 0
    assert found["versions"]["libtpu"]


# Its memory is proportional to its rows: a scan that keeps what its backward pass needs.
ROWS = """
import json
import sys
import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding
from mos_jax.planning.worker import compile_program, describe_devices, usable_memory

device = describe_devices("v5e:1x1")[0]

def loss(x, w):
    x, _ = jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=7)
    return jnp.sum(x)

def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.bfloat16, sharding=SingleDeviceSharding(device))

found = [
    compile_program(jax.jit(jax.grad(loss, 1)).lower(shape(rows, 1024), shape(1024, 1024)))[0]
    for rows in (1 << 18, 1 << 21)
]
print(json.dumps([usable_memory(device), *found]))
"""


def test_the_peak_is_what_the_compiler_accepts_and_refuses_by(compiler):
    environment = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
    environment["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    done = subprocess.run(
        [str(find_python()), "-c", ROWS],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    usable, accepted, refused = json.loads(done.stdout.splitlines()[-1])
    # 16 GiB, of which the compiler keeps some.
    assert usable == 15.75 * GIB
    peak = accepted["memory"]["peak_memory_in_bytes"]
    needed, stated = read_refusal(refused["refused"])
    assert peak < stated == usable < needed
    # Eight times the rows, but for the weights.
    assert needed / peak == pytest.approx(8, rel=0.01)


def test_a_slice_and_an_adapter_that_cannot_be_are_one_line():
    for flags, words in (
        (("--topology=v5e:3x3",), "unknown topology 'v5e:3x3'"),
        (("--topology=v5e:2x2", "--mesh=1,3,1"), "3 devices, there are 4"),
        (("--topology=v5e:2x2", "--mesh=1,two,1"), "3 whole numbers with commas"),
        ((), "--topology is missing"),
    ):
        done = call("plan", "--config=configs/smoke.py", *flags, ok=False)
        assert done.returncode == 2
        assert words in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1


def test_what_the_step_refuses_is_one_line_too(compiler):
    flags = ("--config=configs/smoke.py", "--topology=v5e:1x1", f"--cache={compiler.folder}")
    done = call("plan", *flags, "--config.adapter.rank=9", ok=False)
    assert done.returncode == 2
    assert "mos: rank=9 needs" in done.stderr
