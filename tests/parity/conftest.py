"""Nothing is compared by skipping: in CI a parity test that is skipped has failed.

Each module asks for the other libraries with `importorskip`, so that `make test` collects without
them. Where the parity tests themselves are what is run, a library or a model that is missing, or
has moved, must show.
"""

import os
import platform

import pytest

# llama.cpp's wheel is for this platform only.
EXEMPT = () if (platform.system(), platform.machine()) == ("Linux", "x86_64") else ("llama_cpp",)


def _must_run(config, nodeid):
    wanted = os.environ.get("CI") and config.option.markexpr == "parity"
    return wanted and not any(word in nodeid for word in EXEMPT)


def _failed(report):
    report.outcome, report.longrepr = "failed", f"a parity test was skipped: {report.longrepr}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    expected = hasattr(report, "wasxfail")
    if report.skipped and not expected and _must_run(item.config, item.nodeid):
        return _failed(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    report = yield
    if report.outcome == "skipped" and _must_run(collector.config, collector.nodeid):
        return _failed(report)
    return report
