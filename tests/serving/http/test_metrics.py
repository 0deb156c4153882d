"""Figures: what they count, of which kind they are, and what is no label."""

import re
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from mos_jax import Done, Engine, Request
from mos_jax.serving.http.metrics import Meter, Metrics
from tests.serving.fixtures_serving import FakeRunner
from tests.serving.fixtures_tenants import LORA, bank_of, tenants_in
from tests.serving.http.fixtures_http import NO_BASE, OPTIONS

DONE = Done("length", prompt_tokens=7, completion_tokens=3, cached_tokens=4)
PREFIXES = {"bytes": 9, "used": 2, "hits": 5, "misses": 1, "evictions": 3}


def families(metrics):
    return {f.name: f for f in text_string_to_metric_families(metrics.render().decode())}


def told(metrics, tenant="anna"):
    request = Request(tenant, (1, 2))
    metrics.accepted(request)
    metrics.first_token(request, 0.2)
    metrics.tokens(request, 2, 0.5)
    metrics.done(request, DONE, 0.7)
    metrics.refused("queue_full")
    metrics.answered("/v1/models", 200)
    return {
        (s.name, tuple(s.labels.values())): s.value
        for family in families(metrics).values()
        for s in family.samples
    }


def test_what_is_told_is_counted():
    found = told(Metrics(dict))
    assert found["mos_accepted_total", ()] == 1
    assert found["mos_tokens_total", ("prompt",)] == 7
    assert found["mos_tokens_total", ("cached",)] == 4
    assert found["mos_tokens_total", ("completion",)] == 3
    assert found["mos_time_to_first_token_seconds_sum", ()] == 0.2
    assert found["mos_time_per_token_seconds_count", ()] == 2
    assert found["mos_time_per_token_seconds_sum", ()] == 0.5
    assert found["mos_answers_total", ("length",)] == 1
    assert found["mos_refused_total", ("queue_full",)] == 1
    assert found["mos_http_requests_total", ("/v1/models", "200")] == 1


def test_names_of_tenants_are_labels_only_where_that_is_wanted():
    assert "anna" not in str(told(Metrics(dict)))
    found = told(Metrics(dict, tenants=True))
    assert found["mos_tenant_tokens_total", ("completion", "anna")] == 3


def test_an_engines_summary_becomes_figures_of_the_right_kind(tmp_path):
    tenants_in(tmp_path, anna=LORA)
    bank, _ = bank_of(tmp_path, slots=2, cached=OPTIONS.rows)
    runner = FakeRunner(OPTIONS)
    runner.summary = lambda: {"compilations": 6, "prefixes": PREFIXES}
    with Engine(NO_BASE, bank, OPTIONS, runner=runner) as engine:
        metrics = Metrics(engine.summary)
        found = families(metrics)
    bank.close()
    kinds = {name: family.type for name, family in found.items()}
    for name in (
        "bank_read",
        "bank_placed",
        "bank_slab_evictions",
        "runner_compilations",
        "runner_prefixes_hits",
        "runner_prefixes_evictions",
    ):
        assert kinds[f"mos_{name}"] == "counter", name
    for name in (
        "queue_requests",
        "rows_decode",
        "bank_known",
        "bank_bytes",
        "bank_slab_resident",
        "runner_prefixes_bytes",
        "runner_prefixes_used",
    ):
        assert kinds[f"mos_{name}"] == "gauge", name
    assert found["mos_bank_known"].samples[0].value == 1
    # What the page for users names is there.
    page = (Path(__file__).parents[3] / "docs/serving.md").read_text()
    table = page[page.index("| figures | of what |") :].split("\n\n")[0]
    named = re.findall(
        r"`(mos_\w+?)(?:_total)?(?:\{[^}]*\})?`", table.replace("mos_runner_...", "")
    )
    told(metrics)
    assert len(named) >= 15
    assert set(named) <= set(families(metrics)), set(named) - set(families(metrics))


def test_a_meter_forgets():
    now = [100.0]
    meter = Meter(window=10, clock=lambda: now[0])
    assert meter.rate() == 0
    for _ in range(100):
        now[0] += 0.1
        meter.add(2)
    assert 15 <= meter.rate() <= 21
    now[0] += 5
    assert 8 <= meter.rate() <= 11
    now[0] += 100
    assert meter.rate() == 0
