"""Sets up JAX and Hypothesis for all tests, before any of them imports JAX.

Tests run on four CPU devices, so that shardings are real. To run them elsewhere, set
JAX_PLATFORMS (and JAX_NUM_CPU_DEVICES) before calling pytest.

What was compiled is kept: for the programs that the tests start again and again, and for the next
run. JAX_ENABLE_COMPILATION_CACHE=false turns that off; `make clean` empties the cache.
"""

import os
import sys
from pathlib import Path

import hypothesis

CACHE = Path(__file__).parent.parent / ".pytest_cache" / "jax"
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": "4",
    "JAX_COMPILATION_CACHE_DIR": str(CACHE),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    # With a limit, JAX locks the cache: processes can share it.
    "JAX_COMPILATION_CACHE_MAX_SIZE": str(1 << 30),
}

if "jax" in sys.modules:
    raise RuntimeError("JAX was imported before tests/conftest.py could choose its devices")

# In the environment rather than in jax.config: programs that the tests start inherit it.
for _name, _value in ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)

# A process killed while it wrote leaves an entry without its time of use, which stops evictions.
if "PYTEST_XDIST_WORKER" not in os.environ:
    for _entry in CACHE.glob("*-cache"):
        if not _entry.with_name(_entry.name.removesuffix("cache") + "atime").exists():
            _entry.unlink(missing_ok=True)

# The first call of a property compiles, so no deadline, and slow generation is no defect.
hypothesis.settings.register_profile(
    "local",
    deadline=None,
    max_examples=25,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.register_profile(
    "ci", hypothesis.settings.get_profile("local"), derandomize=True, print_blob=True
)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")
