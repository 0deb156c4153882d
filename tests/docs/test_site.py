"""The documentation site builds without a warning, and shows all there is."""

import os
import re
import subprocess
import sys

import pytest

import mos_jax
from mos_jax.adapters.methods import METHODS
from tests.experiments.fixtures_programs import ROOT


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the built site."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(folder)]
    environment = {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_pages_figures_and_results_are_there(site):
    for name in ("pool", "mosaic", "routing", "strategies", "capacity"):
        assert (site / f"figures/{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "Core study" in (site / "results/studies.html").read_text(encoding="utf-8")
    assert "One door for rows" in (site / "decisions.html").read_text(encoding="utf-8")


def test_pages_of_commands_that_are_not_run_say_so(site):
    for name in ("results/studies", "results/bench_training", "reference/programs"):
        page = (site / f"{name}.html").read_text(encoding="utf-8")
        assert "Commands on this page are not run by the tests." in page


def test_formulas_are_shown_without_a_script(site):
    page = (site / "methods/mos.html").read_text(encoding="utf-8")
    assert page.count("<math") > 5
    assert "arithmatex" not in page


def test_every_method_has_its_page(site):
    listed = (site / "methods/index.html").read_text(encoding="utf-8")
    for method in METHODS:
        page = (site / f"methods/{method}.html").read_text(encoding="utf-8")
        assert f'href="{method}.html"' in listed
        for heading in ("What is computed", "When to use it", "What our study showed"):
            assert heading in page
        assert "arxiv.org/abs/" in page


def test_every_public_name_is_in_the_reference(site):
    pages = [*site.glob("reference/*.html"), *site.glob("methods/*.html")]
    text = "".join(path.read_text(encoding="utf-8") for path in pages)
    anchors = set(re.findall(r'id="([\w.]+)"', text))
    constants = {"METHODS"}
    missing = [name for name in mos_jax.__all__ if f"mos_jax.{name}" not in anchors]
    assert set(missing) <= constants


def test_every_program_is_listed_with_its_flags(site):
    page = (site / "reference/programs.html").read_text(encoding="utf-8")
    for path in (ROOT / "experiments").glob("*.py"):
        assert f"experiments/{path.name}" in page
    assert "--dry_run" in page
