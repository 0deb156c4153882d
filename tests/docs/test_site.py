"""The documentation site builds without a warning, and shows all there is."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import mos_jax
from mos_jax.adapters.methods import METHODS
from tests.experiments.fixtures_programs import ROOT

# As in the Makefile. Not --quiet: it hides warnings from --strict too.
BUILD = ("-m", "mkdocs", "build", "--strict")


def build(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Builds a site into `folder`."""
    environment = {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *BUILD, "-d", str(folder), *words],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the built site."""
    folder = tmp_path_factory.mktemp("site")
    done = build(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_make_site_builds_as_the_tests_do():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (line,) = [line for line in makefile.splitlines() if "mkdocs" in line]
    assert line.split()[2:] == [*BUILD, "$(ARGS)"]


@pytest.mark.parametrize(
    ("text", "nav", "says"),
    [
        ("See [two](two.md#a-part).", ["one.md", "two.md"], ""),
        ("See [three](three.md).", ["one.md", "two.md"], "three.md"),
        ("See [two](two.md#no-part).", ["one.md", "two.md"], "#no-part"),
        ("", ["one.md"], "two.md"),
        ("", ["one.md", "two.md", "three.md"], "three.md"),
    ],
    ids=["good", "dead link", "dead anchor", "omitted page", "missing page"],
)
def test_the_settings_refuse_a_site_with_gaps(tmp_path, text, nav, says):
    """On a site of two pages, with what mkdocs.yml says of links and pages."""
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    pages = tmp_path / "pages"
    pages.mkdir()
    (pages / "one.md").write_text(f"# One\n\n{text}\n")
    (pages / "two.md").write_text("# Two\n\n## A part\n")
    small = {
        "site_name": "small",
        "docs_dir": str(pages),
        "theme": {"name": "mkdocs"},
        "plugins": [],
        "nav": nav,
        "validation": settings["validation"],
    }
    (tmp_path / "small.yml").write_text(yaml.safe_dump(small))
    done = build(tmp_path / "site", "-f", str(tmp_path / "small.yml"))
    assert (done.returncode == 0) == (not says), done.stderr
    assert says in done.stderr


def test_every_page_is_in_the_navigation_once():
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))

    def places(entry):
        if isinstance(entry, str):
            return [entry]
        return [p for part in (entry.values() if isinstance(entry, dict) else entry)
                for p in places(part)]  # fmt: skip

    listed = places(settings["nav"])
    written = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    shown = {path.relative_to(ROOT).as_posix() for path in (ROOT / "results").rglob("*.md")}
    made = {"decisions.md", "changelog.md", "reference/programs.md"}
    assert len(listed) == len(set(listed))
    assert set(listed) == written | shown | made


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
