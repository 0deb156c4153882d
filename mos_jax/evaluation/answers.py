"""Right answers and loss on a set of examples.

A greedy decoding is right exactly when, with the right answer fed in, the most likely token is the
target at every position of the answer and at its end-of-turn token. So tasks with one right answer
need one forward pass and no decoding; the others are generated and judged by the task's scorer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from mos_jax.data.batches import Batch
from mos_jax.data.examples import Example
from mos_jax.data.load import Data
from mos_jax.data.tokens import prompt_ids
from mos_jax.evaluation.loss import token_losses
from mos_jax.evaluation.statistics import wilson_interval
from mos_jax.models.base import Base
from mos_jax.models.decoder import Decoder, Factors
from mos_jax.models.generation import Sampling, generate

# Rows generated at once; bounds the key-value cache.
GENERATION_ROWS = 32


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What was found on a set of n examples.

    Attributes:
      loss: mean negative log likelihood of a target token, nats.
      scores: fp64 [n], from 0 to 1; 1 = right, end of turn included.
    """

    loss: float
    scores: np.ndarray

    @property
    def accuracy(self) -> float:
        """Mean score."""
        return float(self.scores.mean())

    @property
    def interval(self) -> tuple[float, float]:
        """95% interval of the accuracy over examples (Wilson)."""
        return wilson_interval(float(self.scores.sum()), len(self.scores))

    def to_dict(self) -> dict[str, float | int]:
        """JSON values."""
        low, high = self.interval
        return {
            "loss": self.loss,
            "accuracy": self.accuracy,
            "accuracy_low": low,
            "accuracy_high": high,
            "examples": len(self.scores),
        }


_token_losses = jax.jit(token_losses)


def teacher_forced(
    model: Decoder, factors: Factors | None, batches: Sequence[Batch], num_examples: int
) -> Evaluation:
    """Evaluates with the right answers fed in.

    Args:
      model: the base.
      factors: of the adapter, or None for the base alone.
      batches: from `data.batches(split)`; each example once.
      num_examples: n.
    """
    total, weight = 0.0, 0.0
    right = np.ones(num_examples)
    for batch in batches:
        losses, correct = jax.device_get(_token_losses(model, factors, batch))
        total += float(np.sum(losses * batch.loss_weights, dtype=np.float64))
        weight += float(batch.loss_weights.sum())
        right[batch.loss_examples[(batch.loss_examples >= 0) & ~correct]] = 0.0
    return Evaluation(total / max(weight, 1.0), right)


def generate_answers(
    base: Base,
    factors: Factors | None,
    examples: Sequence[Example],
    max_new_tokens: int,
) -> list[str]:
    """The greedy answer to each example's prompt, as text."""
    sampling = Sampling.create(max_new_tokens=max_new_tokens)
    prompts = [prompt_ids(example, base.tokenizer) for example in examples]
    answers: list[str] = []
    for start in range(0, len(prompts), GENERATION_ROWS):
        rows = prompts[start : start + GENERATION_ROWS]
        stop = [base.tokenizer.end_of_turn]
        for ids in generate(base.model, rows, stop, sampling, factors):
            answers.append(base.tokenizer.decode(ids))
    return answers


def evaluate(
    base: Base, factors: Factors | None, data: Data, split: str, max_new_tokens: int
) -> Evaluation:
    """Evaluates on a split: loss always teacher-forced, scores as the task demands.

    Args:
      base: the base.
      factors: of the adapter, or None for the base alone.
      data: the task's data, tokenised for this base.
      split: "train", "validation" or "test".
      max_new_tokens: longest generated answer, for tasks that judge generated answers.
    """
    examples: Sequence[Example] = getattr(data, split)
    found = teacher_forced(base.model, factors, data.batches(split), len(examples))
    if data.task.scoring == "exact":
        return found
    answers = generate_answers(base, factors, examples, max_new_tokens)
    judged = zip(examples, answers, strict=True)
    return Evaluation(found.loss, np.array([data.task.score(e, a) for e, a in judged]))
