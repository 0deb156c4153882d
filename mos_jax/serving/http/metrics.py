"""Figures for Prometheus, and a meter for the page.

Labels have few values: routes, statuses, reasons. Tenants' names are labels only where the operator
asks for it.
"""

from __future__ import annotations

import collections
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from mos_jax.serving.requests import Done, Request

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 180, 600)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10)


class Meter:
    """A rate over the last seconds."""

    def __init__(self, window: float = 10.0, clock: Callable[[], float] = time.monotonic):
        """Counts in parts of a second, so that its size does not grow with the rate."""
        self._window, self._clock = window, clock
        self._parts: collections.deque[list[float]] = collections.deque()
        self._lock = threading.Lock()
        self._start = clock()

    def add(self, count: float) -> None:
        """So much has happened now."""
        now = self._clock()
        with self._lock:
            self._drop(now)
            if self._parts and now - self._parts[-1][0] < 0.25:
                self._parts[-1][1] += count
            else:
                self._parts.append([now, count])

    def rate(self) -> float:
        """How much a second."""
        now = self._clock()
        with self._lock:
            self._drop(now)
            total = sum(count for _, count in self._parts)
        return total / max(min(self._window, now - self._start), 1.0)

    def _drop(self, now: float) -> None:
        while self._parts and now - self._parts[0][0] > self._window:
            self._parts.popleft()


class Metrics:
    """All figures of one server: an observer of its engine, and what it says of itself."""

    def __init__(self, summary: Callable[[], Mapping[str, Any]], *, tenants: bool = False):
        """Figures that start at nothing.

        Args:
          summary: the engine's; its numbers are read when somebody asks for the figures.
          tenants: whether to count by the names of tenants too.
        """
        disable_created_metrics()  # they would double the figures, and say when they began
        self.registry = CollectorRegistry()
        self.tokens_meter, self.done_meter = Meter(), Meter()
        counter, histogram = self._counter, self._histogram
        self._http = counter("http_requests", "Answers of the server.", "route", "status")
        self._answers = counter("answers", "Answers of the engine that have ended.", "reason")
        self._refused = counter("refused", "Requests that the engine refused.", "code")
        self._accepted = counter("accepted", "Requests that the engine accepted.")
        self._tokens = counter("tokens", "Tokens, of prompts and of answers.", "kind")
        self._first = histogram("time_to_first_token_seconds", "From acceptance.", _SECONDS)
        self._each = histogram(
            "time_per_token_seconds", "Between tokens of an answer.", _TOKEN_SECONDS
        )
        self._seconds = histogram("answer_seconds", "From acceptance to the end.", _SECONDS)
        self._of_tenants = (
            (
                counter("tenant_accepted", "Requests accepted.", "tenant"),
                counter("tenant_tokens", "Tokens of ended answers.", "tenant", "kind"),
            )
            if tenants
            else None
        )
        self.registry.register(_EngineCollector(summary))

    # What an engine tells.

    def accepted(self, request: Request) -> None:
        """A request was accepted."""
        self._accepted.inc()
        if self._of_tenants is not None:
            self._of_tenants[0].labels(request.tenant).inc()

    def refused(self, code: str) -> None:
        """A request was refused."""
        self._refused.labels(code).inc()

    def first_token(self, request: Request, seconds: float) -> None:
        """The first token has come."""
        self._first.observe(seconds)
        self.tokens_meter.add(1)

    def tokens(self, request: Request, n: int, seconds: float) -> None:
        """`n` more tokens have come."""
        for _ in range(n):
            self._each.observe(seconds / n)
        self.tokens_meter.add(n)

    def done(self, request: Request, done: Done, seconds: float) -> None:
        """An answer has ended."""
        self._answers.labels(done.reason).inc()
        self._seconds.observe(seconds)
        counts = {
            "prompt": done.prompt_tokens,
            "cached": done.cached_tokens,
            "completion": done.completion_tokens,
        }
        for kind, count in counts.items():
            self._tokens.labels(kind).inc(count)
            if self._of_tenants is not None:
                self._of_tenants[1].labels(request.tenant, kind).inc(count)
        self.done_meter.add(1)

    # What the server tells.

    def answered(self, route: str, status: int) -> None:
        """The server answered; `route` is a pattern, never what a client wrote."""
        self._http.labels(route, str(status)).inc()

    def render(self) -> bytes:
        """All figures in Prometheus' text format."""
        return generate_latest(self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"mos_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"mos_{name}", text, buckets=buckets, registry=self.registry)


class _EngineCollector(Collector):
    """The numbers in the engine's summary as figures, whatever an engine has to say."""

    def __init__(self, summary: Callable[[], Mapping[str, Any]]):
        self._summary = summary

    def describe(self) -> list[Metric]:
        """None beforehand: the engine need not run yet."""
        return []

    def collect(self) -> Iterator[Metric]:
        """One figure for each number; those of slabs have the slab's place as a label."""
        found = dict(self._summary())
        for name, value in sorted(flatten(found).items()):
            yield _figure(name, [((), value)], ())
        slabs = found.get("bank", {}).get("slabs", [])
        for field in sorted({field for slab in slabs for field in flatten(slab)}):
            values = [
                ((str(place), str(slab["form"])), flatten(slab)[field])
                for place, slab in enumerate(slabs)
                if field in flatten(slab)
            ]
            yield _figure(f"bank_slab_{field}", values, ("slab", "form"))


# Of an engine's summary, what only grows: counts, and of the bank and the runner these.
_GROW = re.compile(
    r"counts_.*|bank_(requests|hits|placed|failed|read|assembled|slab_evictions)"
    r"|runner_compilations|runner_prefixes_(hits|misses|tokens|kept|evictions)"
)


def _figure(
    name: str, values: Sequence[tuple[tuple[str, ...], float]], labels: tuple[str, ...]
) -> Metric:
    kind = CounterMetricFamily if _GROW.fullmatch(name) else GaugeMetricFamily
    family = kind(f"mos_{name}", "Of the engine's summary.", labels=labels)
    for entry, value in values:
        family.add_metric(entry, value)
    return family


def flatten(found: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """All numbers of a nested mapping, their names joined by "_"; texts and lists are left out."""
    numbers: dict[str, float] = {}
    for name, value in found.items():
        if isinstance(value, Mapping):
            numbers |= flatten(value, f"{prefix}{name}_")
        elif isinstance(value, int | float):
            numbers[f"{prefix}{name}"] = float(value)
    return numbers
