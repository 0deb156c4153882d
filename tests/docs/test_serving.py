"""docs/serving.md: its server is started as it says, and its clients ask it."""

import re
import subprocess

import pytest

from mos_jax.serving.http.schemas import MOST_CHOICES, NEUTRAL, UNSUPPORTED
from tests.docs.fixtures_pages import Page
from tests.experiments.fixtures_programs import ROOT, call
from tests.serving.http.test_program import program

PAGE = Page("serving")
URL = "http://127.0.0.1:8000"


def test_the_page_runs_from_top_to_bottom(tmp_path, capsys):
    make, *clients = PAGE.blocks("python")
    plan, serve, curl = PAGE.commands()
    flags = [
        re.sub(r"=(tenants|keys\.json)", rf"={tmp_path}/\1", flag).replace("=8000", "=0")
        for flag in serve[2:]
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        names: dict = {}
        exec(compile(make, PAGE.path, "exec"), names)
        planned = call("serve", *(f.replace("=tenants", f"={tmp_path}/tenants") for f in plan[2:]))
        assert "3 tenants are known" in planned.stdout
        with program(*flags) as (_, url, lines):
            assert "ready: tiny-random and 3 tenants (anna, ben, cara)" in "".join(lines)
            assert not [line for line in lines if line.startswith("note: others on this")]
            asked = [word.replace(URL, url) for word in curl]
            answer = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
            assert '"completion_tokens":8' in answer
            code = "".join(clients).replace(URL, url)
            exec(compile(code, PAGE.path, "exec"), names)
            names["client"].close()
            names["admin"].close()
    out = capsys.readouterr().out
    assert "['tiny-random', 'anna']" in out
    assert "no_right" in out
    assert "400 folder: it is not in a folder" in out
    assert "['anna', 'cara', 'ben2']" in out
    assert re.search(r"mos_answers_total.* 3\.0", out)


def test_limits_and_flags_are_those_of_the_program():
    assert f"`n` (up to {MOST_CHOICES})" in PAGE.text
    source = (ROOT / "experiments/serve.py").read_text()
    for flag in re.findall(r"`?--(\w+)", PAGE.text):
        assert f'"{flag}"' in source, flag
    for field in ("tools", "response_format", "logit_bias", "echo"):
        assert field in NEUTRAL or field in UNSUPPORTED
