"""What an example is, before any tokenizer has seen it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from mos_jax.errors import InputError

Message = Mapping[str, str]
"""One turn of a conversation: the keys are `role` and `content`."""

ROLES = ("system", "user", "assistant")
SPLITS = ("train", "validation", "test")

Scoring = Literal["exact", "scorer"]
"""`exact`: one right answer, compared after normalising; `scorer`: the task judges an answer."""


class TokenIds(NamedTuple):
    """A prompt and its answer as token ids; neither is empty."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True)
class Example:
    """A conversation that ends in the answer to be learnt.

    Attributes:
        messages: the turns, at least two; the last one has the role `assistant`.
        id: names the example in error messages and outputs, unique within its task.
        ids: what the model reads and writes, as it stands: no chat template, no end of turn. The
            messages then only show it to people. None: the ids are made from the messages.
    """

    messages: tuple[Message, ...]
    id: str
    ids: TokenIds | None = None

    @property
    def answer(self) -> str:
        """The text of the last turn."""
        return self.messages[-1]["content"]

    @property
    def question(self) -> str:
        """The text of the turn before the last."""
        return self.messages[-2]["content"]

    @property
    def question_key(self) -> str:
        """Equal for two examples exactly when all that stands before the answer is equal."""
        if self.ids is not None:
            return json.dumps(self.ids.prompt)
        return json.dumps([[m["role"], m["content"]] for m in self.messages[:-1]])


class Task(Protocol):
    """Three sets of examples that share no question, and the way answers are judged.

    One task asks in every set what it trained on, since what it measures is recall; see
    `memory.MemoryTask`.
    """

    @property
    def name(self) -> str:
        """The task's name, without `reasoning_gym/`."""
        ...

    @property
    def scoring(self) -> Scoring:
        """Whether there is one right answer or a scorer."""
        ...

    @property
    def train(self) -> tuple[Example, ...]:
        """Examples to learn from; none of their questions is in another set."""
        ...

    @property
    def validation(self) -> tuple[Example, ...]:
        """Examples for choices made during development; no question is in the test set."""
        ...

    @property
    def test(self) -> tuple[Example, ...]:
        """Examples for the final figures."""
        ...

    @property
    def dropped(self) -> Mapping[str, Mapping[str, int]]:
        """For each set, how many examples were left out, by reason.

        `repeated` in the set, also in a `held_out` set, or (of generated tasks) an `empty` answer.
        """
        ...

    def score(self, example: Example, answer: str) -> float:
        """Returns how good `answer` is, from 0 (wrong) to 1 (right)."""
        ...


def question_and_answer(question: str, answer: str, example_id: str) -> Example:
    """Returns the example of one user turn and one assistant turn."""
    return Example(
        (
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ),
        example_id,
    )


def commonest_answer(examples: Sequence[Example]) -> tuple[str, float]:
    """Returns the answer that occurs most often and its rate, from 0 to 1.

    A model that ignores the question can score this rate, so it is what a result must beat. Of
    answers that occur equally often, the first in alphabetical order is returned.

    Raises:
        InputError: `examples` is empty.
    """
    if not examples:
        raise InputError("the commonest answer of an empty set was asked for; give some examples")
    counts = Counter(
        # Bytes that are no text look alike, so ids count by themselves.
        (example.answer.strip(), () if example.ids is None else example.ids.answer)
        for example in examples
    )
    (answer, _), count = min(counts.items(), key=lambda item: (-item[1], item[0]))
    return answer, count / len(examples)
