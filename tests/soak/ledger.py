"""What every accepted request got, and whether that is what it must get."""

import collections
import threading

from mos_jax.serving.requests import Done, Piece

# What may end a request that was left alone, and what else, by what was done to it.
ALLOWED = {
    "read": {"stop", "length"},
    "vanish": {"stop", "length", "cancelled"},
    "raise": {"stop", "length", "cancelled"},
    "timeout": {"stop", "length", "timeout"},
    "broken": {"stop", "length", "error"},
}


class Entry:
    """One accepted request."""

    def __init__(self, request, behaviour):
        self.request, self.behaviour = request, behaviour
        self.text, self.tokens, self.done = "", [], None


class Ledger:
    """Takes note of events, from any thread.

    Attributes:
      ends: how often a request ended for each reason.
      refused: how often one was refused, by code.
      problems: in words, whatever must not happen.
    """

    def __init__(self):
        self._lock = threading.Lock()
        self._open = {}
        self._count = 0
        self.ends = collections.Counter()
        self.refused = collections.Counter()
        self.problems = []

    @property
    def accepted(self):
        return self._count

    @property
    def open(self):
        with self._lock:
            return len(self._open)

    def open_entry(self, request, behaviour):
        """Before it is submitted, since events may come before `submit` returns."""
        with self._lock:
            number = self._count
            self._count += 1
            self._open[number] = Entry(request, behaviour)
            return number

    def withdraw(self, number, code, expected):
        """It was refused after all."""
        with self._lock:
            del self._open[number]
            self._count -= 1
            self.refused[code] += 1
            if code not in expected:
                self.problems.append(f"refused with {code!r}, expected one of {sorted(expected)}")

    def event(self, number, event):
        """Returns the request's entry, once it has ended."""
        with self._lock:
            entry = self._open.get(number)
            if entry is None:
                self.problems.append(f"request {number} was told {event} after its end")
                return None
            if isinstance(event, Piece):
                entry.text += event.text
                entry.tokens += [info.token for info in event.tokens]
                return None
            assert isinstance(event, Done)
            entry.done = event
            del self._open[number]
            self.ends[event.reason] += 1
            self._check(number, entry)
            return entry

    def _check(self, number, entry):
        done, sampling = entry.done, entry.request.sampling
        where = f"request {number} of {entry.request.tenant!r} ({entry.behaviour})"
        if done.reason not in ALLOWED[entry.behaviour]:
            self.problems.append(f"{where} ended with {done.reason!r}: {done.error}")
        if done.prompt_tokens != len(entry.request.prompt):
            self.problems.append(f"{where}: prompt_tokens {done.prompt_tokens}")
        if done.completion_tokens > sampling.max_tokens:
            self.problems.append(f"{where}: {done.completion_tokens} tokens, too many")
        came, counted = len(entry.tokens), done.completion_tokens
        # A listener that has raised is told no more, and its answer may end before it is cancelled.
        untold = entry.behaviour == "raise" and came < counted
        if done.reason in ("stop", "length") and came != counted and not untold:
            self.problems.append(f"{where}: {came} tokens came, {counted} were counted")
        if any(stop in entry.text for stop in sampling.stop):
            self.problems.append(f"{where}: its text holds a stop text")

    def lost(self):
        """Those that never ended."""
        with self._lock:
            return [f"{e.request.tenant} ({e.behaviour})" for e in self._open.values()]
