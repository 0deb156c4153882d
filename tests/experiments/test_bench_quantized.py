"""The comparison of quantised bases, on tiny sizes."""

import json

import pytest

from experiments.bench import quantized
from experiments.bench.quantized import FORMS, REFERENCE, compare_forms, report
from experiments.bench.rounds import machine_facts
from tests.training.fixtures_training import tiny_run, write_data


def test_forms_train_alike_and_the_page_shows_their_numbers(tmp_path, monkeypatch):
    chosen = {name: FORMS[name] for name in (REFERENCE, "nf4")}
    monkeypatch.setattr(quantized, "FORMS", chosen)
    config, said = tiny_run(write_data(tmp_path)), []
    forms = compare_forms(config, 2, said.append)
    exact, coded = forms.values()
    assert coded["bytes"]["base"] < exact["bytes"]["base"]
    assert [f["bytes"]["bits_per_site_weight"] for f in forms.values()] == [16, 4.25]
    for key in ("base_loss", "trained_loss"):
        assert coded[key] == pytest.approx(exact[key], abs=0.2)
        assert coded[key] != exact[key]
    for facts in forms.values():
        assert len(facts["losses"]) == len(facts["seconds"]) == 2
        assert facts["trained_loss"] != facts["base_loss"]
    assert exact["seconds_ratio"]["rounds"] == [1.0]
    found = {"forms": forms, "machine": machine_facts(2), "config": config.to_dict()}
    page = report(json.loads(json.dumps(found)), "the command")
    assert "    the command\n" in page
    for name, facts in forms.items():
        rows = [line for line in page.splitlines() if line.startswith(f"| {name} |")]
        assert len(rows) == 3
        assert f"| {facts['base_loss']:.4f} |" in rows[1]
