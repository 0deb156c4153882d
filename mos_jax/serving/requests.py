"""What is asked of the engine, and what it answers with.

A `Request` names a tenant and holds token ids. The engine gives back `Piece`s of text as they come
and one `Done` at the end, whatever happens: an accepted request always ends in one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Literal

from mos_jax.adapters.adapter import require_finite, require_integer
from mos_jax.errors import InputError

# As many as OpenAI's API gives.
MOST_TOP_LOGPROBS = 20
MOST_STOPS = 16
# Each costs an engine its length in preparation, and a little work for each character generated.
MOST_STOP_CHARACTERS = 1024

Reason = Literal["stop", "length", "cancelled", "timeout", "error"]


class Refused(InputError):
    """A request that was not accepted.

    Attributes:
      code: why, for programs: "unknown_tenant", "too_long", "queue_full", "closing" (the engine
        is not started, drains or is closed) or "failed" (it ended with an error).
    """

    def __init__(self, code: str, message: str):
        super().__init__(message)
        self.code = code


@dataclasses.dataclass(frozen=True)
class TokenSampling:
    """How the tokens of one request are chosen.

    Attributes:
      max_tokens: tokens to generate at most, the stop token included.
      temperature: 0 is greedy; otherwise logits are divided by it.
      top_p: sample from the smallest set of tokens whose probability reaches it (nucleus
        sampling, arXiv 1904.09751); 1 is all.
      top_k: sample from as many of the likeliest tokens; 0 is all.
      seed: of the sampling noise, from 0 to 2**32 - 1; the same request with the same seed gets
        the same tokens, whatever else is served. None lets the engine draw one.
      stop: texts that end the answer, and are no part of it.
      logprobs: how many alternatives to give with each token; None for no log-probabilities.
      ignore_eos: whether the token that ends a turn is one like others, so that only stop texts
        and the lengths end the answer; for measurements.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        """Checks the values. Raises InputError."""
        require_integer("sampling", "max_tokens", self.max_tokens, 1)
        require_integer("sampling", "top_k", self.top_k, 0)
        require_finite("sampling", "temperature", self.temperature)
        require_finite("sampling", "top_p", self.top_p)
        if self.temperature < 0:
            raise InputError(f"temperature must be a finite number >= 0, got {self.temperature!r}")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p must be above 0 and at most 1, got {self.top_p!r}")
        if self.seed is not None:
            require_integer("sampling", "seed", self.seed, 0)
            if self.seed >= 1 << 32:
                raise InputError(f"seed must be below 2**32, got {self.seed}")
        texts = isinstance(self.stop, tuple) and all(isinstance(s, str) and s for s in self.stop)
        if not texts or len(self.stop) > MOST_STOPS:
            raise InputError(
                f"stop must be a tuple of at most {MOST_STOPS} texts that are not empty, got "
                f"{self.stop!r}"
            )
        longest = max(map(len, self.stop), default=0)
        if longest > MOST_STOP_CHARACTERS:
            raise InputError(
                f"a stop text has at most {MOST_STOP_CHARACTERS} characters, got one of {longest}"
            )
        if self.logprobs is not None:
            require_integer("sampling", "logprobs", self.logprobs, 0)
            if self.logprobs > MOST_TOP_LOGPROBS:
                raise InputError(
                    f"logprobs must be at most {MOST_TOP_LOGPROBS}, got {self.logprobs}"
                )


@dataclasses.dataclass(frozen=True)
class Request:
    """A text to continue.

    Attributes:
      tenant: whose adapter to use; "__base__" for none.
      prompt: token ids, at least one.
      sampling: how tokens are chosen.
      timeout: seconds from acceptance to the end of the answer; None for no limit.
    """

    tenant: str
    prompt: tuple[int, ...]
    sampling: TokenSampling = TokenSampling()
    timeout: float | None = None


@dataclasses.dataclass(frozen=True)
class TokenInfo:
    """One generated token.

    Attributes:
      token: its id.
      logprob: natural log of its probability before temperature and truncation; NaN unless asked.
      top: the likeliest ids with their log-probabilities, as many as were asked for.
    """

    token: int
    logprob: float = math.nan
    top: Mapping[int, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Piece:
    """Text that is certain: no stop text can begin in it, no character in it is unfinished.

    Attributes:
      text: what follows the pieces before; may be empty.
      tokens: those that were generated since the piece before.
    """

    text: str
    tokens: tuple[TokenInfo, ...]


@dataclasses.dataclass(frozen=True)
class Done:
    """The end of an answer.

    Attributes:
      reason: "stop" for the stop token or a stop text, "length" at max_tokens or where the row is
        full, "cancelled", "timeout", or "error".
      prompt_tokens: of the request.
      cached_tokens: of these, taken from the tenant's prefix cache.
      completion_tokens: generated, the stop token included.
      error: for the reason "error", what happened, in words for whoever asked.
      detail: of an error, what the operator should know; it may name paths of the server.
    """

    reason: Reason
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    error: str | None = None
    detail: str | None = None


Event = Piece | Done
# Called in a thread of the engine, for all its requests in turn. One that blocks keeps the others
# from hearing of theirs, but not the engine from its work; what it raises cancels its request.
Listener = Callable[[Event], None]
