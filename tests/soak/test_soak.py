"""The short form of `make soak`, and that it would find what it looks for."""

import types

import pytest

from mos_jax.serving.requests import Done, Piece, Request, TokenInfo, TokenSampling
from tests.soak import harness
from tests.soak.ledger import Ledger


def test_every_request_ends_and_memory_returns(tmp_path):
    report = harness.soak(tmp_path, requests=400, seed=5)
    assert report.problems == []
    numbers = report.numbers
    assert numbers["accepted"] > 200
    assert set(numbers["ends"]) >= {"stop", "length", "cancelled"}
    assert set(numbers["refused"]) >= {"invalid", "unknown_tenant", "too_long"}
    assert numbers["evictions"] > 0
    assert numbers["prefix_hits"] > 0
    assert numbers["compilations_after_warm_up"] == 0
    first, last = numbers["device_bytes"]
    assert last <= first + harness.SMALL


class TestTheLedgerFinds:
    @pytest.fixture
    def ledger(self):
        return Ledger()

    @pytest.fixture
    def number(self, ledger):
        return ledger.open_entry(Request("a", (1,), TokenSampling(max_tokens=2)), "read")

    def test_a_request_that_is_lost(self, ledger, number):
        assert ledger.lost() == ["a (read)"]
        assert ledger.open == 1

    def test_a_second_end(self, ledger, number):
        ledger.event(number, Done("length", 1, 0))
        assert ledger.problems == []
        ledger.event(number, Done("length", 1, 0))
        assert "after its end" in ledger.problems[0]

    @pytest.mark.parametrize(
        ("done", "words"),
        [
            (Done("error", 1, 0, error="x"), "ended with 'error'"),
            (Done("length", 2, 0), "prompt_tokens"),
            (Done("length", 1, 3), "too many"),
            (Done("length", 1, 1), "tokens came"),
        ],
        ids=["error", "prompt", "many", "missing"],
    )
    def test_an_end_that_is_wrong(self, ledger, number, done, words):
        ledger.event(number, done)
        assert any(words in problem for problem in ledger.problems)

    @pytest.mark.parametrize(("told", "problems"), [(1, 0), (3, 1)], ids=["fewer", "more"])
    def test_what_a_listener_that_raised_was_not_told_is_no_problem(self, ledger, told, problems):
        request = Request("a", (1,), TokenSampling(max_tokens=2))
        number = ledger.open_entry(request, "raise")
        ledger.event(number, Piece("abc", (TokenInfo(5),) * told))
        ledger.event(number, Done("length", 1, 2))
        assert len(ledger.problems) == problems

    def test_a_stop_text_that_was_sent(self, ledger):
        request = Request("a", (1,), TokenSampling(max_tokens=2, stop=("b",)))
        number = ledger.open_entry(request, "read")
        ledger.event(number, Piece("abc", (TokenInfo(5),)))
        ledger.event(number, Done("stop", 1, 1))
        assert "holds a stop text" in ledger.problems[0]

    def test_a_refusal_that_was_not_due(self, ledger, number):
        ledger.withdraw(number, "too_long", {"queue_full"})
        assert "refused with 'too_long'" in ledger.problems[0]
        assert ledger.accepted == 0


def test_an_answer_that_others_change_is_found():
    ledger = Ledger()
    request = Request("a", (1,), TokenSampling(max_tokens=2))

    def submit(request, listen):
        listen(Piece("x", (TokenInfo(5),)))
        listen(Done("length", 1, 1))

    engine, rng = types.SimpleNamespace(submit=submit), types.SimpleNamespace(choice=lambda c: c[0])
    harness._ask_again(engine, ledger, [(request, [5], "x")], rng)
    assert ledger.problems == []
    harness._ask_again(engine, ledger, [(request, [6], "y")], rng)
    assert "otherwise than when alone" in ledger.problems[0]
