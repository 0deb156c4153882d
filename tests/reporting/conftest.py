import pytest

from tests.reporting.demo import fill, make_sweep, write_study


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """A sweep of three arms without a gap."""
    folder = tmp_path_factory.mktemp("sweeps") / "small"
    fill(folder, make_sweep(folder))
    return folder


@pytest.fixture(scope="session")
def study(tmp_path_factory):
    """A sweep of nine arms with missing and failed runs."""
    folder = tmp_path_factory.mktemp("sweeps") / "study"
    write_study(folder)
    return folder


@pytest.fixture(scope="session")
def probe(tmp_path_factory):
    """A memory probe with a gap."""
    folder = tmp_path_factory.mktemp("sweeps") / "probe"
    write_study(folder, memory=True)
    return folder
