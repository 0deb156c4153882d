"""A request on its way through an engine."""

from __future__ import annotations

import dataclasses

from mos_jax.serving.answer_text import AnswerText
from mos_jax.serving.requests import Listener, Request, TokenInfo, TokenSampling
from mos_jax.serving.uses import Use


@dataclasses.dataclass(eq=False)
class Job:
    """A request that was accepted, and how far it has come. Equal only to itself.

    What it holds is bounded by its prompt and its `limit`. Only the engine's thread changes it.

    Attributes:
      id: unlike that of any other.
      request: what was asked.
      seed: of its sampling noise, given or drawn.
      sampling: of the request, with this seed.
      listener: who is told.
      slab: of its tenant, whose slots it shares; None for the base.
      limit: tokens it can get at most: `max_tokens`, or fewer where the row ends.
      text: of its answer.
      accepted: when it was accepted, in seconds of the monotonic clock.
      deadline: when its time is over, of the same clock.
      use: of its tenant in the bank, from when it is asked for until the row is free.
      row: where it is computed, None before and after.
      prefilled: tokens of the prompt that are in the row, as far as the scheduler counts.
      cached: of these, from the prefix cache.
      dispatched: decode steps that it took part in.
      generated: tokens that have come of these.
      unsent: those that no `Piece` has had.
      heard: when the latest token came.
      ended: whether its end has been told; what still comes is dropped.
      deaf: whether its listener has failed; it is told the end and nothing else. Changed by the
        thread that tells.
    """

    id: str
    request: Request
    seed: int
    sampling: TokenSampling
    listener: Listener
    slab: str | None
    limit: int
    text: AnswerText
    accepted: float
    deadline: float | None = None
    use: Use | None = None
    row: int | None = None
    prefilled: int = 0
    cached: int = 0
    dispatched: int = 0
    generated: int = 0
    unsent: list[TokenInfo] = dataclasses.field(default_factory=list)
    heard: float = 0.0
    ended: bool = False
    deaf: bool = False

    @property
    def tenant(self) -> str:
        """Whose request it is."""
        return self.request.tenant
