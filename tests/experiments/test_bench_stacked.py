"""The comparison of stacked with separate runs, on tiny sizes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.bench.stacked import parse_size
from mos_jax.errors import InputError

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("text", ["4", "4x", "x208", "0x8", "4x208x2", "-1x8", "ax8"])
def test_sizes_are_rows_and_tokens(text):
    assert parse_size("4x208") == (4, 208)
    with pytest.raises(InputError, match=r"must be rows x tokens, such as 4x208"):
        parse_size(text)


def test_quick_comparison_finds_what_stacking_must_do(tmp_path):
    out = tmp_path / "stacked.json"
    done = subprocess.run(
        [sys.executable, "experiments/bench_stacked.py", "--quick", "--runs=2", f"--out={out}"],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for words in ("2 runs of 1 x 512 tokens", "base weights read", "examples/s", "round 1:"):
        assert words in done.stdout, words
    found = json.loads(out.read_text())
    (size,) = found["sizes"]
    separate, stacked = (size["programs"][name]["traced"] for name in ("separate", "stacked"))
    assert stacked["flops"] == 2 * separate["flops"]
    assert stacked["weight_bytes"] == separate["weight_bytes"]
    clock = size["clock"]
    assert clock["separate"]["losses"] == pytest.approx(clock["stacked"]["losses"], rel=1e-4)
    assert clock["speed_up"]["seconds"]["rounds"][0] > 0
