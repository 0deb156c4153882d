"""Calls a program of experiments/ as a user does."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def call(program, *flags, ok=True, columns=80):
    """Runs experiments/<program>.py from the root of the checkout; checks its status where `ok`."""
    done = subprocess.run(
        [sys.executable, f"experiments/{program}.py", *map(str, flags)],
        cwd=ROOT,
        env=os.environ | {"COLUMNS": str(columns)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    if ok:
        assert done.returncode == 0, done.stdout + done.stderr
    return done
