import threading

import pytest

from mos_jax import Done, Engine, EngineOptions, InputError, Piece, Refused, Request
from mos_jax.adapters.bank import BASE_NAME
from tests.serving.fixtures_serving import BASE, END, TOKENIZER, FakeRunner, answer_of, ask
from tests.serving.fixtures_tenants import LORA, bank_of, tenants_in

OPTIONS = EngineOptions(rows=4, length=64, pieces=(4, 8), queue=20, tenant_queue=12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tenants")
    tenants_in(folder, a=LORA, b=LORA, c=LORA, d=LORA)
    return folder


@pytest.fixture
def bank(folder):
    bank, _ = bank_of(folder, slots=2, cached=4)
    yield bank
    bank.close()


@pytest.fixture
def runner():
    return FakeRunner(OPTIONS)


@pytest.fixture
def engine(bank, runner):
    with Engine(BASE, bank, OPTIONS, runner=runner) as engine:
        yield engine


def expected(request, seed, n):
    tokens = [answer_of(request.prompt, request.tenant, seed, i) for i in range(n)]
    return TOKENIZER.decode(tokens)


class TestAnswers:
    def test_a_request_gets_pieces_and_one_done(self, engine):
        request = ask("a", max_tokens=6, seed=7)
        *pieces, done = engine.stream(request)
        assert all(isinstance(piece, Piece) for piece in pieces)
        assert "".join(piece.text for piece in pieces) == expected(request, 7, 6)
        assert done == Done("length", prompt_tokens=5, completion_tokens=6)

    def test_many_of_all_tenants_are_answered(self, engine):
        requests = [ask(name, f"{n}", max_tokens=5, seed=n) for n in range(4) for name in "abcd"]
        streams = [engine.stream(request) for request in requests]
        for request, stream in zip(requests, streams, strict=True):
            assert stream.answer().text == expected(request, request.sampling.seed, 5)

    def test_the_stop_token_ends_it_and_is_counted(self, engine, runner):
        runner.answers[tuple(b"Hello")] = [104, 105, END, 106]
        text, tokens, done = engine.complete(ask())
        assert (text, done.reason, done.completion_tokens) == ("hi", "stop", 3)
        assert [token.token for token in tokens] == [104, 105, END]

    def test_a_stop_text_ends_it_and_is_not_sent(self, engine, runner):
        runner.answers[tuple(b"Hello")] = list(b"one two three")
        text, tokens, done = engine.complete(ask(stop=(" tw", "three")))
        assert (text, done.reason, done.completion_tokens) == ("one", "stop", 6)
        assert len(tokens) == 6

    def test_an_answer_ends_where_its_row_does(self, engine):
        assert engine.room(60) == 4
        done = engine.complete(ask(prompt="x" * 60, max_tokens=50)).done
        assert (done.reason, done.completion_tokens) == ("length", 4)

    def test_a_prompt_of_one_token(self, engine):
        assert engine.complete(ask(prompt="x", max_tokens=3)).done.completion_tokens == 3


class TestRefusals:
    @pytest.mark.parametrize(
        ("request_", "code", "words"),
        [
            (ask("nobody"), "unknown_tenant", "no tenant 'nobody'"),
            (ask(["a"]), "unknown_tenant", r"no tenant \['a'\]"),
            (ask(prompt="x" * 64), "too_long", "prompt of 64 tokens .* at most 64"),
        ],
        ids=["unknown", "list", "long"],
    )
    def test_with_a_code(self, engine, request_, code, words):
        with pytest.raises(Refused, match=words) as refused:
            engine.submit(request_, print)
        assert refused.value.code == code

    @pytest.mark.parametrize(
        ("request_", "words"),
        [
            (Request(BASE_NAME, ()), "prompt is empty"),
            (Request(BASE_NAME, (1, 259)), "outside 0..258"),
            (Request(BASE_NAME, (1.5,)), "as integers"),  # type: ignore[arg-type]
            (ask(timeout=0), "timeout"),
        ],
        ids=["empty", "vocabulary", "text", "timeout"],
    )
    def test_of_what_is_no_request(self, engine, request_, words):
        with pytest.raises(InputError, match=words):
            engine.submit(request_, print)

    def test_a_full_queue(self, engine, runner):
        runner.gate = threading.Semaphore(0)
        tickets = []

        def fill(tenant):
            for _ in range(30):
                tickets.append(engine.submit(ask(tenant), lambda event: None))

        with pytest.raises(Refused, match="12 requests of 'a' wait") as refused:
            fill("a")
        assert refused.value.code == "queue_full"
        with pytest.raises(Refused, match="20 requests wait"):
            fill(BASE_NAME)
        runner.gate.release(10_000)
        assert engine.drain(30)
        assert len({ticket.id for ticket in tickets}) == len(tickets)

    def test_before_the_start_and_after_the_end(self, bank, runner):
        engine = Engine(BASE, bank, OPTIONS, runner=runner)
        with pytest.raises(Refused, match="not been started"):
            engine.submit(ask(), print)
        engine.start()
        engine.drain(1)
        with pytest.raises(Refused, match="shutting down") as refused:
            engine.submit(ask(), print)
        assert refused.value.code == "closing"
        engine.close()
        with pytest.raises(Refused, match="closed"):
            engine.submit(ask(), print)
