"""Requests of many tenants, and clients that send them to an engine and note when answers come."""

from __future__ import annotations

import collections
import dataclasses
import queue
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from mos_jax.serving.requests import Done, Event, Piece, Request, TokenSampling


@dataclasses.dataclass(frozen=True)
class Answer:
    """What one request got.

    Attributes:
      tenant: whose it was.
      asked: seconds on the clock when it was sent.
      pieces: for each piece, the time and the number of tokens in it.
      done: its end.
      ended: the time of it.
      tokens: all ids.
    """

    tenant: str
    asked: float
    pieces: tuple[tuple[float, int], ...]
    done: Done
    ended: float
    tokens: tuple[int, ...]

    @property
    def first(self) -> float:
        """Seconds to the first token; of an answer without any, to its end."""
        return (self.pieces[0][0] if self.pieces else self.ended) - self.asked


@dataclasses.dataclass(frozen=True)
class Served:
    """What some requests got together.

    Attributes:
      seconds: from the first request to the last answer's end.
      answers: by the order in which they were sent.
    """

    seconds: float
    answers: tuple[Answer, ...]

    @property
    def tokens(self) -> int:
        """Tokens generated."""
        return sum(answer.done.completion_tokens for answer in self.answers)

    def facts(self) -> dict[str, Any]:
        """Counts and times as JSON values; `steady` is tokens a second while all rows had one."""
        first = sorted(answer.first for answer in self.answers)
        begun = max(answer.asked + answer.first for answer in self.answers)
        ended = min(answer.ended for answer in self.answers)
        inside = sum(
            count for answer in self.answers for at, count in answer.pieces if begun < at <= ended
        )
        return {
            "seconds": self.seconds,
            "tokens": self.tokens,
            "requests": len(self.answers),
            "failed": sum(answer.done.reason == "error" for answer in self.answers),
            "first_token": {
                "median": first[len(first) // 2],
                "p95": first[min(int(0.95 * len(first)), len(first) - 1)],
            },
            "steady": inside / (ended - begun) if ended > begun else None,
        }


def zipf_counts(names: Sequence[str], requests: int, exponent: float, seed: int) -> list[str]:
    """Whose each request is: the k-th tenant with a share that falls as 1 / k^exponent.

    The names are put in random order first, so that rank says nothing about slots.
    """
    rng = np.random.default_rng([11, seed])
    order = rng.permutation(np.asarray(names, dtype=object))
    shares = 1.0 / np.arange(1, len(names) + 1) ** exponent
    return list(rng.choice(order, size=requests, p=shares / shares.sum()))


def prompts_of(ids: Sequence[int], count: int, length: int, seed: int) -> list[tuple[int, ...]]:
    """Random prompts of one length out of some token ids."""
    drawn = np.random.default_rng([13, seed]).choice(np.asarray(ids), size=(count, length))
    return [tuple(row) for row in drawn.tolist()]


def make_requests(
    tenants: Sequence[str], prompts: Sequence[tuple[int, ...]], max_tokens: int
) -> list[Request]:
    """Greedy requests, one for each tenant of the list."""
    sampling = TokenSampling(max_tokens=max_tokens)
    return [
        Request(tenant, prompt, sampling) for tenant, prompt in zip(tenants, prompts, strict=True)
    ]


def serve(engine: Any, requests: Sequence[Request], clients: int) -> Served:
    """Sends requests from a number of clients, each its next when its last has been answered."""
    events: queue.SimpleQueue[tuple[int, float, Event]] = queue.SimpleQueue()
    waiting = collections.deque(enumerate(requests))
    asked: dict[int, float] = {}
    pieces: dict[int, list[tuple[float, int]]] = collections.defaultdict(list)
    tokens: dict[int, list[int]] = collections.defaultdict(list)
    answers: dict[int, Answer] = {}

    def send() -> None:
        index, request = waiting.popleft()
        asked[index] = time.perf_counter()
        engine.submit(request, lambda event: events.put((index, time.perf_counter(), event)))

    start = time.perf_counter()
    for _ in range(min(clients, len(requests))):
        send()
    while len(answers) < len(requests):
        index, at, event = events.get(timeout=600)
        if isinstance(event, Piece):
            pieces[index].append((at, len(event.tokens)))
            tokens[index] += [info.token for info in event.tokens]
            continue
        answers[index] = Answer(
            requests[index].tenant,
            asked[index],
            tuple(pieces[index]),
            event,
            at,
            tuple(tokens[index]),
        )
        if waiting:
            send()
    seconds = max(answer.ended for answer in answers.values()) - start
    return Served(seconds, tuple(answers[index] for index in range(len(requests))))
