"""A mesh changes where numbers are computed and not which: eight devices against one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed import on_eight

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def distances(tmp_path_factory):
    path = tmp_path_factory.mktemp("eight") / "distances.json"
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "8", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, on_eight.__file__, str(path)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text())


@pytest.mark.parametrize("method", on_eight.METHODS)
def test_loss_gradient_and_adapter_after_ten_steps_are_those_of_one_device(distances, method):
    """With dropout, and gradients summed over two batches of unequal numbers of targets."""
    found = {name: d for name, d in distances.items() if name.startswith(f"{method} ")}
    assert len(found) == len(on_eight.MESHES) + 1
    for name, distance in found.items():
        assert set(distance) == {"loss", "gradient", "adapter"}
        assert max(distance.values()) <= 1e-5, (name, distance)
