"""What a turn of the engine does, in which order, by the calls that the runner gets."""

import threading
import time

import pytest

from mos_jax import Engine, EngineOptions
from tests.serving.fixtures_serving import BASE, END, FakeRunner, Heard, ask
from tests.serving.fixtures_tenants import LORA, bank_of, tenants_in


@pytest.fixture
def bank(tmp_path):
    tenants_in(tmp_path, a=LORA, b=LORA)
    bank, _ = bank_of(tmp_path, slots=1, cached=4)
    yield bank
    bank.close()


@pytest.fixture
def engine(request, bank):
    options = EngineOptions(length=64, pieces=(4, 8), **request.param)
    with Engine(BASE, bank, options, runner=FakeRunner(options)) as engine:
        engine.log = engine._runner.log
        yield engine


def run_together(engine, *requests):
    """Answers requests that are there before the first turn; returns what was heard."""
    all_heard = [Heard() for _ in requests]
    with engine._wake:
        for request, heard in zip(requests, all_heard, strict=True):
            engine.submit(request, heard)
    for heard in all_heard:
        heard.end()
    return all_heard


@pytest.mark.parametrize("engine", [{"rows": 1}], indirect=True)
def test_a_row_whose_end_is_known_computes_nothing_in_vain(engine):
    run_together(engine, ask(max_tokens=3), ask(max_tokens=2), ask(max_tokens=1))
    assert engine.log.count(("decode",)) == 6


@pytest.mark.parametrize("engine", [{"rows": 1}], indirect=True)
def test_a_step_is_fetched_when_the_next_has_been_dispatched(engine):
    run_together(engine, ask(max_tokens=3))
    calls = [call for call, *_ in engine.log if call in ("decode", "fetch")]
    assert calls == ["decode", "decode", "fetch", "decode", "fetch", "fetch"]


@pytest.mark.parametrize(
    ("engine", "most"),
    [
        ({"rows": 4}, 3),
        ({"rows": 4, "prefill": 8}, 1),
        ({"rows": 4, "prefill": 20}, 2),
        ({"rows": 4, "prefill": 3}, 1),
    ],
    indirect=["engine"],
    ids=["as they outnumber it", "one", "two", "one at least"],
)
def test_prompts_make_answers_pause_for_a_bounded_number_of_pieces(engine, most):
    # Rows of long prompts, five pieces of 8 tokens each, beside one that is decoded.
    run_together(engine, ask(prompt="x", max_tokens=40), *[ask(prompt="x" * 41, max_tokens=2)] * 3)
    between, counts = 0, []
    for call, *_ in engine.log:
        if call == "decode":
            counts.append(between)
            between = 0
        between += call == "prefill"
    assert max(counts[1:]) == most
    assert sum(counts) == 1 + 3 * 5


@pytest.mark.parametrize("engine", [{"rows": 4}], indirect=True)
def test_prompts_that_come_together_are_decoded_together(engine):
    run_together(engine, *[ask(prompt="x" * 8, max_tokens=3)] * 4)
    calls = [call for call, *_ in engine.log if call in ("prefill", "decode")]
    assert calls == ["prefill"] * 4 + ["decode"] * 3


@pytest.mark.parametrize("engine", [{"rows": 3}], indirect=True)
def test_a_short_prompt_does_not_wait_for_the_whole_of_a_long_one(engine):
    run_together(engine, ask(prompt="x" * 60, max_tokens=1), ask(prompt="x" * 9, max_tokens=1))
    rows = [row for call, *rest in engine.log if call == "prefill" for row in rest]
    assert rows[:3] == [0, 1, 0]
    assert rows.count(0) == 8


@pytest.mark.parametrize("engine", [{"rows": 1}], indirect=True)
class TestTokens:
    def test_the_end_of_a_turn_can_be_ignored(self, engine):
        engine._runner.answers[tuple(b"Hello")] = [104, END, 105, END]
        (heard,) = run_together(engine, ask(max_tokens=3, ignore_eos=True))
        assert heard.text == "hi"
        assert heard.events[-1].reason == "length"

    @pytest.mark.parametrize(
        ("tokens", "text", "reason"),
        [
            (b"ab\xe2\x82", "ab\ufffd", "length"),
            (b"and s", "and s", "length"),
            ((*b"and", END), "and", "stop"),
            ((*b"and st", END), "and st", "stop"),
        ],
        ids=["half a character", "half a stop text", "stop token", "stop token after half"],
    )
    def test_what_was_held_back_comes_with_the_end(self, engine, tokens, text, reason):
        engine._runner.answers[tuple(b"Hello")] = list(tokens)
        (heard,) = run_together(engine, ask(max_tokens=len(tokens), stop=("stop",)))
        assert heard.text == text
        *pieces, done = heard.events
        assert (done.reason, done.completion_tokens) == (reason, len(tokens))
        assert sum(len(piece.tokens) for piece in pieces) == len(tokens)


def test_tenants_read_within_one_step_do_not_wait_for_each_others_answers(tmp_path):
    tenants_in(tmp_path, a=LORA, b=LORA)
    bank, _ = bank_of(tmp_path, slots=2, cached=4)
    options = EngineOptions(rows=3, length=64, pieces=(4, 8))
    runner = FakeRunner(options)
    runner.gate = threading.Semaphore(0)

    def until(condition):
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.001)

    with Engine(BASE, bank, options, runner=runner) as engine:
        heard = [Heard() for _ in range(3)]
        engine.submit(ask(max_tokens=50), heard[0])
        until(lambda: ("decode",) in runner.log)
        with engine._wake:
            engine.submit(ask("a", max_tokens=40), heard[1])
            engine.submit(ask("b", max_tokens=2), heard[2])
        runner.gate.release()  # the next turn asks for both, and both are read in its step
        until(lambda: engine._scheduler._read == 2)
        runner.gate.release(1000)
        for each in heard:
            each.end()
    started = [tenant for call, *rest in runner.log if call == "start" for tenant in rest]
    assert started[1:] == ["a", "b"]
    freed = [row for call, *rest in runner.log if call == "free" for row in rest]
    assert freed == [2, 1, 0]  # the shortest answer first, that of "b"
    bank.close()


@pytest.mark.parametrize("engine", [{"rows": 1}], indirect=True)
def test_a_slot_that_somebody_else_gives_back_is_seen(engine, bank):
    with_slot = bank.request("a")
    while not with_slot.ready:
        time.sleep(0.01)
    heard = Heard()
    engine.submit(ask("b", max_tokens=1), heard)
    assert not heard.done.wait(0.2)
    assert engine.summary()["queue"]["without_slot"] == 1
    with_slot.release()
    assert heard.end().reason == "length"
