"""Mutated files against every reader: a tenth of what `make fuzz` runs, or FUZZ_CASES a format.

A failure prints each case with how to run it alone.
"""

import os

import pytest

from tests.fuzz.runner import run
from tests.fuzz.targets import TARGETS

CASES = int(os.environ.get("FUZZ_CASES", "200"))


@pytest.mark.parametrize("name", TARGETS)
def test_damaged_files_are_read_rightly_or_refused(name):
    summary = run(name, "0", 0, CASES - 1)
    assert not summary.findings, "\n\n".join(summary.findings)
    assert summary.counts.total() == CASES
    # The files are near enough to sound ones to get past the first check.
    assert summary.counts["read"] >= CASES // 20
    assert len(summary.messages) >= min(15, CASES // 10)
