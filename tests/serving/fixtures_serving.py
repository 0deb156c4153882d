"""A runner without a device, for tests of what surrounds one."""

import threading
import types
import zlib

from mos_jax import (
    Done,
    EngineOptions,
    InputError,
    Piece,
    Request,
    TokenInfo,
    TokenSampling,
)
from mos_jax.adapters.bank import BASE_NAME
from mos_jax.models.tokenizer import Tokenizer

TOKENIZER = Tokenizer.byte_level()
END = TOKENIZER.end_of_turn
# What the fake runner needs no more of a base than.
BASE = types.SimpleNamespace(tokenizer=TOKENIZER, config=types.SimpleNamespace(vocab_size=259))


def answer_of(prompt, tenant, seed, n):
    """The n-th token of a fake answer: a printable character, by what the real one depends on."""
    return 97 + zlib.crc32(repr((list(prompt), tenant, seed, n)).encode()) % 26


class FakeStep:
    def __init__(self, runner, found):
        self.runner, self.found = runner, found

    def fetch(self):
        self.runner._call("fetch")
        return self.found


class Heard:
    """A listener that keeps what it is told.

    Attributes:
      events: all of them.
      done: set at the first `Done`.
    """

    def __init__(self):
        self.events, self.done = [], threading.Event()

    def __call__(self, event):
        self.events.append(event)
        if isinstance(event, Done):
            self.done.set()

    def end(self):
        """Waits for the end; returns the one `Done`, which must be the last event."""
        assert self.done.wait(200)
        *pieces, done = self.events
        assert all(isinstance(piece, Piece) for piece in pieces)
        return done

    @property
    def text(self):
        return "".join(event.text for event in self.events if isinstance(event, Piece))


def ask(tenant=BASE_NAME, prompt="Hello", *, timeout=None, **sampling):
    """A request by its text."""
    return Request(tenant, tuple(TOKENIZER.encode(prompt)), TokenSampling(**sampling), timeout)


class FakeRunner:
    """Rows as the real runner has them, and an error for each call that it would not expect.

    Attributes:
      answers: by prompt, tokens to give; for other prompts `answer_of`.
      gate: if set, a semaphore that each decode step takes.
      fails: by the name of a method, an exception that it raises next.
      hooks: by the name of a method, what is called in it, each time.
      log: ("start", tenant) and so on, in order.
    """

    def __init__(self, options=None):
        self.options = options if options is not None else EngineOptions(rows=4, length=64)
        self.rows, self.length = self.options.rows, self.options.length
        self.nbytes = 1000
        self.row = {}
        self.answers, self.fails, self.hooks, self.log = {}, {}, {}, []
        self.gate = None
        self.thread = None

    def _call(self, name, *what):
        if self.thread is None:
            self.thread = threading.get_ident()
        assert threading.get_ident() == self.thread, "one thread calls a runner"
        self.log.append((name, *what))
        self.hooks.get(name, lambda: None)()
        if name in self.fails:
            raise self.fails.pop(name)

    def warm_up(self):
        self._call("warm_up")

    def start(self, row, prompt, tenant, sampling):
        self._call("start", tenant)
        assert row in range(self.rows)
        assert row not in self.row
        assert 1 <= len(prompt) <= self.length
        if sampling.seed is None:
            raise InputError("a seed is missing")
        largest = self.options.pieces[-1]
        left = len(prompt) - 1
        pieces = left // largest + (left % largest > 0)
        self.row[row] = types.SimpleNamespace(
            prompt=tuple(prompt), tenant=tenant, seed=sampling.seed, left=pieces, n=0, ready=False
        )
        return 0

    def prefill(self, row):
        self._call("prefill", row)
        state = self.row[row]
        assert not state.ready
        state.left = max(0, state.left - 1)
        state.ready = state.left == 0
        return state.ready

    def decode(self):
        self._call("decode")
        if self.gate is not None:
            self.gate.acquire()
        found = []
        for row, state in self.row.items():
            if state.ready:
                assert len(state.prompt) + state.n <= self.length
                known = self.answers.get(state.prompt)
                args = state.prompt, state.tenant, state.seed, state.n
                token = known[state.n] if known and state.n < len(known) else answer_of(*args)
                found.append((row, TokenInfo(token)))
                state.n += 1
        return FakeStep(self, found)

    def free(self, row):
        self._call("free", row)
        del self.row[row]

    def forget(self, tenant):
        self._call("forget", tenant)

    def summary(self):
        return {"cached": 0}
