"""The code of docs/tenants.md, run from top to bottom, and its table against the program."""

import re
import shlex

from mos_jax.models.known import known_config
from mos_jax.serving.capacity import Server, capacity
from tests.docs.fixtures_pages import Page
from tests.experiments.fixtures_programs import call

PAGE = Page("tenants")


def test_the_python_runs(tmp_path, capsys):
    PAGE.run_python(tmp_path)
    assert "'known': 4" in capsys.readouterr().out


def test_the_commands_run(tmp_path):
    lines = [shlex.split(line) for block in PAGE.blocks("bash") for line in block.splitlines()]
    programs = [program for _, program, *_ in lines]
    assert programs == [f"experiments/{p}.py" for p in ("bench_tenants", "capacity", "capacity")]
    (_, _, *bench), (_, _, *llama), (_, _, *picture) = lines
    table = call("bench_tenants", *bench).stdout
    forms = ("bare base", "one unmerged", "inside the scan", "cached", "LoRA r=8")
    assert all(form in table for form in forms)
    assert "2,815 tenants" in call("capacity", *llama).stdout
    call("capacity", *(flag.replace("runs/", f"{tmp_path}/") for flag in picture))
    assert (tmp_path / "capacity.png").stat().st_size > 10_000


def test_the_table_is_what_the_program_says():
    found = capacity(known_config("llama2-7b"), Server(80 * 2**30))
    rows = re.findall(r"^\| (?:MoS|LoRA), .* \| ([\d,]+) \| ([\d,]+) \|$", PAGE.text, re.MULTILINE)
    assert rows == [(f"{fit.tenant_bytes:,}", f"{fit.tenants:,}") for fit in found.fits]


def test_every_block_is_run():
    assert PAGE.has_only("python", "bash")
