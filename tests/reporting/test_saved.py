"""What notebooks show of a report is what the report says."""

import pytest

from mos_jax import InputError
from mos_jax.reporting.results import load_results
from mos_jax.reporting.saved import SavedReport
from mos_jax.reporting.write import write_report


@pytest.fixture(scope="module")
def folder(small, tmp_path_factory):
    return write_report(load_results([small]), tmp_path_factory.mktemp("report")).parent


def test_parts_of_a_report_are_those_of_its_text(folder):
    report, text = SavedReport(folder), (folder / "report.md").read_text(encoding="utf-8")
    for heading in ("In words", "Against", "How to read it"):
        section = report.section(heading)
        assert section
        assert section in text
        assert "![" not in section
    assert report.section("Against").startswith("| arm | verdict |")


def test_every_picture_has_its_caption(folder):
    report, text = SavedReport(folder), (folder / "report.md").read_text(encoding="utf-8")
    names = [path.stem for path in folder.glob("*.png")]
    assert names
    for name in names:
        assert report.picture(name).png == (folder / f"{name}.png").read_bytes()
        assert f"({name}.png)\n\n*{report.caption(name)}*\n" in text
    assert "stand side by side" in report.caption("accuracy-trained_parameters")


def test_what_is_not_there_is_named(folder, tmp_path):
    with pytest.raises(InputError, match=r"no picture 'acuracy-.*accuracy-trained_parameters"):
        SavedReport(folder).picture("acuracy-trained_parameters")
    with pytest.raises(InputError, match="no section 'Verdict'"):
        SavedReport(folder).section("Verdict")
    with pytest.raises(InputError, match="there is no report"):
        SavedReport(tmp_path)
