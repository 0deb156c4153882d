"""What may befall a request and the engine: cancelled, timed out, drained, closed, broken."""

import random
import threading
import time

import pytest

from mos_jax import Done, Engine, EngineOptions, InputError, Refused
from mos_jax.adapters.bank import BASE_NAME
from tests.serving.fixtures_serving import BASE, FakeRunner, Heard, ask
from tests.serving.fixtures_tenants import LORA, bank_of, tenants_in

OPTIONS = EngineOptions(rows=2, length=64, pieces=(4, 8))


@pytest.fixture
def folder(tmp_path):
    tenants_in(tmp_path, a=LORA, b=LORA)
    return tmp_path


@pytest.fixture
def bank(folder):
    bank, _ = bank_of(folder, slots=2, cached=2, host_bytes=0)
    yield bank
    bank.close()


@pytest.fixture
def runner():
    return FakeRunner(OPTIONS)


@pytest.fixture
def engine(bank, runner):
    with Engine(BASE, bank, OPTIONS, runner=runner) as engine:
        yield engine
    if engine.failed is None:
        assert runner.row == {}
    assert all(slab["in_use"] == 0 for slab in bank.summary()["slabs"])


@pytest.fixture
def reading(bank):
    """Lets no tenant be read until it is set."""
    go, read = threading.Event(), bank._loader._read
    bank._loader._read = lambda *args: go.wait(60) and read(*args)
    yield go
    go.set()


def submit(engine, *args, **sampling):
    heard = Heard()
    return heard, engine.submit(ask(*args, **sampling), heard)


def wait_until(condition):
    deadline = time.monotonic() + 200
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


class TestCancelling:
    @pytest.mark.parametrize("where", ["start", "prefill", "decode", "fetch"])
    def test_at_each_step_of_the_work(self, engine, runner, where):
        tickets = []
        runner.hooks[where] = lambda: tickets and tickets.pop().cancel()
        heard = Heard()
        with engine._wake:  # the work begins when the ticket is there
            tickets.append(engine.submit(ask("a", "x" * 20, max_tokens=9), heard))
        assert heard.end().reason == "cancelled"
        others = submit(engine, "a", max_tokens=3)[0], submit(engine, "b", max_tokens=3)[0]
        assert [other.end().reason for other in others] == ["length", "length"]

    def test_while_it_is_queued(self, engine, runner):
        runner.gate = threading.Semaphore(0)
        running = [submit(engine, max_tokens=20)[0] for _ in range(2)]
        heard, ticket = submit(engine, "a")
        ticket.cancel()
        runner.gate.release(1)
        done = heard.end()
        assert (done.reason, done.completion_tokens, heard.events) == ("cancelled", 0, [done])
        runner.gate.release(100)
        assert [other.end().reason for other in running] == ["length", "length"]
        assert ("start", "a") not in runner.log

    def test_while_its_tenant_is_read(self, engine, reading):
        heard, ticket = submit(engine, "a")
        wait_until(lambda: engine.bank.summary()["loading"] == 1)
        ticket.cancel()
        assert heard.end().reason == "cancelled"
        assert engine.bank.summary()["slabs"][0]["in_use"] == 0
        reading.set()
        assert submit(engine, "a", max_tokens=2)[0].end().reason == "length"

    def test_twice_or_afterwards_changes_nothing(self, engine):
        heard, ticket = submit(engine, max_tokens=2)
        done = heard.end()
        ticket.cancel()
        ticket.cancel()
        engine.complete(ask(max_tokens=1))
        assert heard.events[-1] is done
        assert [type(event) for event in heard.events].count(Done) == 1

    def test_a_finalizer_takes_no_lock(self, engine, runner):
        runner.gate = threading.Semaphore(0)
        stream = engine.stream(ask(max_tokens=50))
        holding = threading.Thread(target=stream.__del__)
        with engine._wake:
            holding.start()
            holding.join(60)
            assert not holding.is_alive()
        runner.gate.release(100)
        *_, done = stream
        assert done.reason in ("cancelled", "length")

    def test_closing_or_dropping_a_stream(self, engine, runner):
        runner.gate = threading.Semaphore(0)
        closed, dropped = engine.stream(ask(max_tokens=50)), engine.stream(ask(max_tokens=50))
        closed.close()
        del dropped
        runner.gate.release(2)
        *_, done = closed
        assert done.reason == "cancelled"
        runner.gate.release(2)
        wait_until(lambda: engine.summary()["open"] == 0)
        assert engine.summary()["counts"]["done_cancelled"] == 2


class TestTimeouts:
    def test_while_its_tenant_is_read_and_nothing_else_happens(self, engine, reading):
        assert submit(engine, "a", timeout=0.05)[0].end().reason == "timeout"

    def test_while_it_runs_and_others_go_on(self, engine, runner):
        runner.hooks["decode"] = lambda: time.sleep(0.02)
        late, _ = submit(engine, max_tokens=50, timeout=0.1)
        fine, _ = submit(engine, max_tokens=12, timeout=60)
        done = late.end()
        assert done.reason == "timeout"
        assert len(late.text) == done.completion_tokens < 50
        assert fine.end().reason == "length"

    def test_one_that_is_longer_than_a_clock_can_say(self, engine, reading):
        heard, ticket = submit(engine, "a", timeout=1e30)
        assert not heard.done.wait(0.1)
        assert engine.alive
        ticket.cancel()
        assert heard.end().reason == "cancelled"

    def test_one_that_ended_has_none(self, engine):
        heard, _ = submit(engine, max_tokens=1, timeout=0.2)
        assert heard.end().reason == "length"
        time.sleep(0.25)
        assert engine.complete(ask(max_tokens=1)).done.reason == "length"
        assert len(heard.events) == 2


class TestEnding:
    def test_drained_it_answers_what_it_has_and_takes_no_more(self, engine, runner):
        runner.gate = threading.Semaphore(0)
        heard = [submit(engine, max_tokens=5)[0] for _ in range(5)]
        assert not engine.drain(0.05)
        with pytest.raises(Refused, match="shutting down"):
            engine.submit(ask(), print)
        runner.gate.release(100)
        assert engine.drain(60)
        assert [each.done.is_set() for each in heard] == [True] * 5
        assert engine.alive

    def test_closed_it_ends_what_it_has(self, engine, runner, reading):
        runner.gate = threading.Semaphore(2)
        heard = [submit(engine, name, max_tokens=50)[0] for name in (BASE_NAME,) * 4 + ("a",) * 2]
        closing = threading.Thread(target=engine.close)
        closing.start()
        runner.gate.release(100)
        closing.join()
        assert [each.end().reason for each in heard] == ["cancelled"] * 6
        assert not engine.alive
        assert engine.failed is None
        engine.close()

    def test_one_that_never_was_started(self, bank, runner):
        engine = Engine(BASE, bank, OPTIONS, runner=runner)
        assert not engine.alive
        engine.unload("a")
        assert "a" not in bank
        assert engine.drain(1)
        engine.close()
        with pytest.raises(InputError, match="started once"):
            engine.start()

    def test_nothing_runs_while_there_is_nothing_to_do(self, engine, monkeypatch):
        engine.complete(ask("a", max_tokens=2))
        polls, poll = [], engine.bank.poll
        monkeypatch.setattr(engine.bank, "poll", lambda **args: polls.append(1) or poll(**args))
        time.sleep(0.2)
        assert len(polls) <= 2
        engine.complete(ask(max_tokens=5))
        assert len(polls) < 20


class TestBroken:
    @pytest.mark.parametrize("where", ["prefill", "decode", "fetch", "free"])
    def test_a_runner_that_breaks_ends_everything_and_says_so(self, engine, runner, where):
        runner.fails[where] = RuntimeError("the device is gone")
        if where != "free":
            runner.hooks["free"] = lambda: 1 / 0
        with engine._wake:  # the work begins when all are there
            heard = [submit(engine, name, max_tokens=5)[0] for name in ("a", "b", "a", BASE_NAME)]
        for each in heard:
            done = each.end()
            assert (done.reason, done.error) == ("error", "the engine has failed")
            assert done.detail == "RuntimeError: the device is gone"
        wait_until(lambda: not engine._thread.is_alive())
        assert not engine.alive
        assert engine.failed == engine.summary()["failed"] == "RuntimeError: the device is gone"
        with pytest.raises(Refused, match="failed") as refused:
            engine.submit(ask(), print)
        assert refused.value.code == "failed"
        assert engine.drain(10)

    def test_a_bank_that_breaks_does_too(self, engine, monkeypatch):
        monkeypatch.setattr(engine.bank, "poll", lambda limit: 1 / 0)
        assert submit(engine)[0].end().reason == "error"
        assert engine.failed == "ZeroDivisionError: division by zero"

    def test_one_that_cannot_be_compiled_does_not_start(self, bank, runner):
        runner.fails["warm_up"] = MemoryError("too large")
        engine = Engine(BASE, bank, OPTIONS, runner=runner)
        with pytest.raises(MemoryError, match="too large"):
            engine.start()
        assert not engine.alive
        engine.close()

    def test_a_request_that_the_runner_refuses_is_alone(self, engine, runner):
        runner.fails["start"] = InputError("not this one")
        done = engine.complete(ask()).done
        assert (done.reason, done.detail) == ("error", "not this one")
        assert engine.complete(ask(max_tokens=3)).done.reason == "length"

    def test_a_tenant_that_cannot_be_read_is_alone(self, engine, folder):
        for file in (folder / "a").glob("*.safetensors"):
            file.write_bytes(b"no tensors")
        heard = [submit(engine, name, max_tokens=3)[0] for name in "ab" * 3]
        done = [each.end() for each in heard]
        assert [each.reason for each in done] == ["error", "length"] * 3
        assert done[0].error == "tenant 'a' cannot be loaded"
        assert str(folder) in done[0].detail

    def test_a_bank_that_was_closed_leaves_those_on_the_device(self, engine):
        engine.complete(ask("a", max_tokens=1))
        engine.bank.close()
        assert engine.complete(ask("a", max_tokens=3)).done.reason == "length"
        assert engine.complete(ask("b")).done.detail.startswith("the bank is closed")


class TestListeners:
    def test_one_that_fails_is_cancelled_and_told_only_the_end(self, engine, runner):
        runner.gate = threading.Semaphore(3)
        heard = Heard()

        def listener(event):
            heard(event)
            raise OSError("the pipe is broken")

        engine.submit(ask(max_tokens=50), listener)
        other, _ = submit(engine, max_tokens=50)
        wait_until(lambda: engine._scheduler._cancelled)
        runner.gate.release(100)
        heard.end()
        assert len(heard.events) == 2
        assert other.end().reason == "length"
        assert engine.summary()["counts"]["done_cancelled"] == 1

    def test_one_that_blocks_stops_no_work(self, engine, runner):
        go = threading.Event()
        engine.submit(ask(max_tokens=5), lambda event: go.wait(60))
        other, _ = submit(engine, "a", max_tokens=20)
        wait_until(lambda: engine.summary()["counts"].get("done_length") == 2)
        assert runner.row == {}
        assert not other.done.is_set()
        go.set()
        assert other.end().reason == "length"

    def test_observers_are_told_in_order_and_may_fail(self, engine):
        calls = []

        class Watching:
            def __getattr__(self, name):
                def call(*args):
                    calls.append((name, *args))
                    raise RuntimeError("observers may fail")

                return call

        engine.observe(Watching())
        request = ask("a", max_tokens=3)
        done = engine.complete(request).done
        with pytest.raises(Refused):
            engine.submit(ask("nobody"), print)
        with pytest.raises(InputError):
            engine.submit(ask(prompt=""), print)
        names = [name for name, *_ in calls]
        assert names == [
            "accepted",
            "first_token",
            "tokens",
            "tokens",
            "done",
            "refused",
            "refused",
        ]
        assert calls[0] == ("accepted", request)
        assert calls[2][1:3] == (request, 1)
        assert calls[4][1:3] == (request, done)
        assert [call[1] for call in calls[5:]] == ["unknown_tenant", "invalid"]
        assert all(call[-1] >= 0 for call in calls[1:5])


class TestTenants:
    def test_one_that_is_idle_is_gone_at_once(self, engine, runner):
        engine.complete(ask("a", max_tokens=1))
        assert engine.unload("a", wait=60)
        assert "a" not in engine.bank
        assert ("forget", "a") in runner.log
        with pytest.raises(InputError, match="no tenant 'a'"):
            engine.unload("a")

    def test_one_in_use_answers_to_the_end_and_takes_no_more(self, engine, runner, folder):
        runner.gate = threading.Semaphore(0)
        running = [submit(engine, "a", max_tokens=5)[0] for _ in range(4)]
        assert not engine.unload("a", wait=0.05)
        with pytest.raises(Refused, match="unloaded") as refused:
            engine.submit(ask("a"), print)
        assert refused.value.code == "unknown_tenant"
        with pytest.raises(InputError, match="being unloaded"):
            engine.load("a", folder / "a")
        assert engine.summary()["leaving"] == ["a"]
        runner.gate.release(100)
        assert [each.end().reason for each in running] == ["length"] * 4
        wait_until(lambda: "a" not in engine.bank)
        engine.load("a", folder / "a")
        assert engine.complete(ask("a", max_tokens=3)).done.reason == "length"

    def test_one_that_is_being_read_goes_when_that_is_over(self, engine, reading):
        heard, ticket = submit(engine, "a")
        wait_until(lambda: engine.bank.summary()["loading"] == 1)
        ticket.cancel()
        heard.end()
        assert not engine.unload("a", wait=0.05)
        reading.set()
        wait_until(lambda: "a" not in engine.bank)

    def test_one_that_is_damaged_is_refused_at_once(self, engine, folder):
        engine.unload("b", wait=60)
        for file in (folder / "b").glob("*.safetensors"):
            file.write_bytes(file.read_bytes()[:-1])
        with pytest.raises(InputError, match="b"):
            engine.load("b", folder / "b")
        assert "b" not in engine.bank
        assert engine.complete(ask("a", max_tokens=1)).done.reason == "length"


def test_many_threads_and_all_kinds_of_ends(engine, runner, folder):
    """Whatever happens at once: each accepted request has one end, and nothing is left over."""
    heard, errors = [], []

    def client(seed):
        draw = random.Random(seed)
        for _ in range(60):
            try:
                one, ticket = submit(
                    engine,
                    draw.choice(["a", "b", BASE_NAME, "nobody"]),
                    "x" * draw.randint(1, 70),
                    max_tokens=draw.randint(1, 20),
                    timeout=draw.choice([None, None, 0.01]),
                )
            except Refused:
                continue
            except Exception as error:
                errors.append(error)
                raise
            heard.append(one)
            if draw.random() < 0.3:
                ticket.cancel()
            if draw.random() < 0.3:
                one.end()

    threads = [threading.Thread(target=client, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert engine.drain(60)
    reasons = [one.end().reason for one in heard]
    assert set(reasons) == {"length", "cancelled", "timeout"}
    summary = engine.summary()
    assert summary["counts"]["accepted"] == len(heard)
    assert summary["open"] == summary["untold"] == summary["events_waiting"] == 0
    assert summary["rows"] == {"all": 2, "prefill": 0, "decode": 0}
    assert not engine._scheduler._of_tenant
    assert not engine._scheduler._admission._uses
    assert not any(engine._scheduler._admission._passed.values())
