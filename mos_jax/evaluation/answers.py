"""Right answers and loss on a set of examples.

A greedy decoding is right exactly when, with the right answer fed in, the most likely token is the
target at every position of the answer and at its end-of-turn token. So tasks with one right answer
need one forward pass and no decoding; the others are generated and judged by the task's scorer.
Where answers are given as ids without an end (the memory probe), right means all their tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from mos_jax.adapters.low_rank import Factors
from mos_jax.data.batches import Batch
from mos_jax.data.examples import Example
from mos_jax.data.load import Data
from mos_jax.data.memory import MemoryTask
from mos_jax.data.tokens import prompt_ids
from mos_jax.evaluation.loss import token_losses
from mos_jax.evaluation.memory import Recall, bits_recalled
from mos_jax.models.base import Base
from mos_jax.models.decoder import Decoder
from mos_jax.models.generation import Sampling, generate
from mos_jax.models.sharding import readable
from mos_jax.statistics.shares import wilson_interval

# Rows generated at once; bounds the key-value cache.
GENERATION_ROWS = 32


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What was found on a set of n examples.

    Attributes:
      loss: mean negative log likelihood of a target token, nats.
      scores: fp64 [n], from 0 to 1; 1 = right, end of turn included.
      nats: fp64 [n], negative log likelihood of all targets of an example together.
      recall: what the memory probe makes of it, else None.
    """

    loss: float
    scores: np.ndarray
    nats: np.ndarray
    recall: Recall | None = None

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
            **({} if self.recall is None else self.recall.to_dict()),
        }


@jax.jit
def _token_losses(
    model: Decoder, factors: Factors | None, batch: Batch
) -> tuple[jax.Array, jax.Array]:
    return readable(token_losses(model, factors, batch), model.mesh)


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
    right, nats = np.ones(num_examples), np.zeros(num_examples)
    for batch in batches:
        losses, correct = jax.device_get(_token_losses(model, factors, batch))
        total += float(np.sum(losses * batch.loss_weights, dtype=np.float64))
        weight += float(batch.loss_weights.sum())
        there = batch.loss_examples >= 0
        right[batch.loss_examples[there & ~correct]] = 0.0
        np.add.at(nats, batch.loss_examples[there], losses[there].astype(np.float64))
    return Evaluation(total / max(weight, 1.0), right, nats)


def generate_answers(
    base: Base,
    factors: Factors | None,
    examples: Sequence[Example],
    max_new_tokens: int,
) -> list[str]:
    """The greedy answer to each example's prompt, as text.

    An answer that is given as ids has no end that a model could have learnt, so what is generated
    is cut at its length.
    """
    sampling = Sampling.create(max_new_tokens=max_new_tokens)
    prompts = [prompt_ids(example, base.tokenizer) for example in examples]
    answers: list[str] = []
    for start in range(0, len(prompts), GENERATION_ROWS):
        rows = prompts[start : start + GENERATION_ROWS]
        stop = [base.tokenizer.end_of_turn]
        made = generate(base.model, rows, stop, sampling, factors)
        for example, ids in zip(examples[start : start + GENERATION_ROWS], made, strict=True):
            end = None if example.ids is None else len(example.ids.answer)
            answers.append(base.tokenizer.decode(ids[:end]))
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
    if isinstance(data.task, MemoryTask):
        recall = bits_recalled(found.nats, found.scores, data.task.bits_per_pair)
        return dataclasses.replace(found, recall=recall)
    if data.task.scoring == "exact":
        return found
    answers = generate_answers(base, factors, examples, max_new_tokens)
    judged = zip(examples, answers, strict=True)
    scores = np.array([data.task.score(e, a) for e, a in judged])
    return dataclasses.replace(found, scores=scores)
