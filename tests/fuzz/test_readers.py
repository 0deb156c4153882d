"""Mutated files against every reader: a tenth of what `make fuzz` runs, or FUZZ_CASES a format.

A failure prints each case with how to run it alone.
"""

import os

import pytest

from tests.fuzz.faulty import FATAL, FAULTS
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


def test_every_fault_of_a_reader_is_found():
    results = run("tests.fuzz.faulty:faulty", "3", 0, 79).results
    seen = set()
    for result in results:
        fault = result["mutations"][-1]
        seen.add(fault)
        assert any(FAULTS[fault][1] in text for text in result["findings"]), result
    assert seen == set(FAULTS)


def test_a_crash_and_a_hang_end_a_case_and_not_the_run(monkeypatch):
    monkeypatch.setenv("FUZZ_SECONDS", "2")
    results = run("tests.fuzz.faulty:fatal", "1", 0, 3).results
    assert [result["case"] for result in results] == [0, 1, 2, 3]
    for result in results:
        assert result["outcome"] == "died"
        assert FATAL[result["mutations"][-1]][1] in result["findings"][0]
    assert {result["mutations"][-1] for result in results} == set(FATAL)


def test_a_sound_reader_has_no_findings_and_the_seed_gives_the_same_files():
    first, again = (run("tests.fuzz.faulty:sound", "0", 0, 9) for _ in range(2))
    assert first.findings == []
    assert first.counts == {"read": 10}
    assert [r["mutations"] for r in first.results] == [r["mutations"] for r in again.results]
