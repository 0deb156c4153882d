"""The code of docs/engine.md, run from top to bottom, and its limits against the program's."""

from mos_jax.serving.requests import MOST_STOP_CHARACTERS, MOST_STOPS
from tests.docs.fixtures_pages import Page

PAGE = Page("engine")


def test_the_python_runs(tmp_path, capsys):
    names = PAGE.run_python(tmp_path)
    assert "too_long a prompt of 220 tokens does not fit" in capsys.readouterr().out
    summary = names["engine"].summary()
    assert summary["state"] == "closed"
    assert summary["counts"]["accepted"] == 10
    assert names["engine"].failed is None


def test_limits_are_those_of_the_program():
    assert f"{MOST_STOPS} of {MOST_STOP_CHARACTERS:,} characters" in PAGE.text
