"""A mesh changes where numbers are computed and not which: eight devices against one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.distributed import on_eight

ROOT = Path(__file__).parents[2]
# Programs so small take longest to compile.
EIGHT = {"JAX_NUM_CPU_DEVICES": "8", "XLA_FLAGS": "--xla_backend_optimization_level=0"}


@pytest.mark.parametrize("method", on_eight.METHODS)
def test_loss_gradient_and_adapter_after_ten_steps_are_those_of_one_device(tmp_path, method):
    """With dropout, and gradients summed over two batches of unequal numbers of targets."""
    path = tmp_path / "distances.json"
    done = subprocess.run(
        [sys.executable, on_eight.__file__, method, str(path)],
        env=os.environ | EIGHT | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(path.read_text())
    assert list(found) == list(on_eight.CASES)
    for name, distance in found.items():
        assert set(distance) == {"loss", "gradient", "adapter"}
        # Python's own max() may drop a NaN.
        assert np.max(list(distance.values())) <= 1e-5, (name, distance)


def test_a_run_that_broke_down_equals_nothing():
    good, broken = [np.ones(2), np.ones(3)], [np.ones(2), np.array([1.0, np.nan, 1.0])]
    assert on_eight.distance(good, good) == 0
    assert np.isnan(on_eight.distance(broken, good))
    for reference in (broken, [np.ones(2), np.zeros(3)]):
        with pytest.raises(AssertionError):
            on_eight.distance(good, reference)
