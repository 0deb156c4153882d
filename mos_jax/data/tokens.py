"""From conversations to token ids, with the tokens to be learnt marked.

The text before an answer and the answer itself are encoded separately. A tokenizer that saw them
as one string could merge across the border, and the model would then be trained on prompt tokens
that it never meets when it has to write the answer itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from mos_jax.data.examples import Example, Message
from mos_jax.errors import InputError

TooLong = Literal["error", "skip", "truncate"]
TOO_LONG = ("error", "skip", "truncate")


class Tokenizer(Protocol):
    """What this room asks of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Number of ids; every id is below it."""
        ...

    @property
    def end_of_turn(self) -> int:
        """Id that ends an assistant turn."""
        ...

    @property
    def pad(self) -> int:
        """Id that fills positions that no example uses."""
        ...

    @property
    def has_chat_template(self) -> bool:
        """Whether `render` can be called."""
        ...

    @property
    def text_start(self) -> str:
        """What a text begins with that `render` did not write: a special token, or nothing."""
        ...

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text`; special tokens written in it become their ids."""
        ...

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Returns the text of `ids`."""
        ...

    def ordinary_ids(self) -> list[int]:
        """Returns the ids of all tokens that are not special, in order."""
        ...

    def render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        """Returns `messages` as one text in the form of the chat template."""
        ...


@dataclass(frozen=True)
class TokenExample:
    """An example as token ids.

    Attributes:
        tokens: int32[n].
        is_target: bool[n]; True where the token belongs to an assistant turn (its end-of-turn
            token included; an example with ids of its own has none), to be predicted from the
            position before it. False at 0.
        id: of the example it was made from.
    """

    tokens: NDArray[np.int32]
    is_target: NDArray[np.bool_]
    id: str

    @property
    def length(self) -> int:
        """Number of tokens."""
        return int(self.tokens.shape[0])

    @property
    def targets(self) -> int:
        """Number of tokens to be predicted."""
        return int(self.is_target.sum())


@dataclass(frozen=True)
class Tokenised:
    """Examples that fit, and what became of those that did not.

    Attributes:
        examples: in the order given.
        skipped: ids of examples left out because they were too long.
        truncated: ids of examples whose prompt was cut.
    """

    examples: tuple[TokenExample, ...]
    skipped: tuple[str, ...]
    truncated: tuple[str, ...]


def prompt_text(messages: Sequence[Message], tokenizer: Tokenizer) -> str:
    """Returns the text after which the model writes the answer to `messages`.

    With a chat template: the rendered conversation and the opening of an assistant turn. Without
    one: `text_start` and the contents, each followed by a newline.
    """
    if tokenizer.has_chat_template:
        return tokenizer.render(messages, True)
    return tokenizer.text_start + _lines(messages)


def _lines(messages: Sequence[Message]) -> str:
    return "".join(message["content"] + "\n" for message in messages)


def _after_answer(
    example: Example, turn: int, before: str, following: int, tokenizer: Tokenizer
) -> str:
    """Returns the text between the answer at `turn` and the answer at `following`.

    `before` is the text up to the answer at `turn`.
    """
    messages = example.messages
    if not tokenizer.has_chat_template:
        return "\n" + _lines(messages[turn + 1 : following])
    whole = tokenizer.render(messages[:following], True)
    end = tokenizer.decode([tokenizer.end_of_turn], skip_special=False)
    start = before + messages[turn]["content"] + end
    if not whole.startswith(start):
        raise InputError(
            f"example {example.id}: the chat template is not prefix-stable: the conversation "
            f"rendered up to turn {following} does not begin with the one rendered up to turn "
            f"{turn}, its answer and the end-of-turn token {end!r}, so earlier answers cannot be "
            "learnt where the model would write them; split the example into one conversation "
            "per answer, or use another chat template"
        )
    return whole[len(start) :]


def _segments(example: Example, tokenizer: Tokenizer) -> Iterator[tuple[list[int], bool]]:
    """Yields the example's segments of ids in order, each with whether it is an answer."""
    if example.ids is not None:
        yield list(example.ids.prompt), False
        yield list(example.ids.answer), True
        return
    turns = [i for i, message in enumerate(example.messages) if message["role"] == "assistant"]
    before = prompt_text(example.messages[: turns[0]], tokenizer)
    yield tokenizer.encode(before), False
    for turn, following in zip(turns, [*turns[1:], None], strict=True):
        ids = tokenizer.encode(example.messages[turn]["content"])
        if tokenizer.end_of_turn in ids:
            raise InputError(
                f"example {example.id}: the answer at turn {turn} contains the end-of-turn token "
                f"{tokenizer.decode([tokenizer.end_of_turn], skip_special=False)!r} as text; a "
                "model taught it would stop in mid-answer; take it out"
            )
        yield [*ids, tokenizer.end_of_turn], True
        if following is not None:
            text = _after_answer(example, turn, before, following, tokenizer)
            yield tokenizer.encode(text), False
            before = prompt_text(example.messages[:following], tokenizer)


def prompt_ids(example: Example, tokenizer: Tokenizer) -> list[int]:
    """Returns the ids of everything before the last assistant turn, as trained on.

    Raises:
        InputError: as `tokenize_example`.
    """
    segments = [ids for ids, _ in _segments(example, tokenizer)]
    return [token for ids in segments[:-1] for token in ids]


def answer_ids(example: Example, tokenizer: Tokenizer) -> list[int]:
    """Returns the ids of the last assistant turn and the end-of-turn token.

    Of an example with ids of its own: those of its answer, and no end of turn.

    Raises:
        InputError: as `tokenize_example`.
    """
    return [ids for ids, _ in _segments(example, tokenizer)][-1]


def tokenize_example(example: Example, tokenizer: Tokenizer) -> TokenExample:
    """Returns the whole example as ids; every assistant turn in it is a target.

    Raises:
        InputError: the chat template does not let earlier answers be found in a later rendering,
            an answer contains the end-of-turn token, or the prompt has no tokens.
    """
    tokens: list[int] = []
    is_target: list[bool] = []
    for ids, learnt in _segments(example, tokenizer):
        if learnt and not tokens:
            raise InputError(
                f"example {example.id}: the prompt has no tokens, so nothing predicts the first "
                "token of the answer; give the example a prompt"
            )
        tokens += ids
        is_target += [learnt] * len(ids)
    return TokenExample(
        np.array(tokens, dtype=np.int32), np.array(is_target, dtype=np.bool_), example.id
    )


def _truncate(example: TokenExample, answer: int, limit: int) -> TokenExample:
    """Returns the last `limit` tokens; `answer` tokens at the end must be kept whole."""
    if answer + 1 > limit:
        raise InputError(
            f"example {example.id}: the answer alone has {answer} tokens and needs one token "
            f"of prompt before it, but data.sequence_length is {limit}; truncating never cuts an "
            f"answer, so set data.sequence_length to at least {answer + 1} or "
            "data.too_long to 'skip'"
        )
    is_target = example.is_target[-limit:].copy()
    # The cut may fall inside an earlier answer; nothing is left that predicts its first token.
    is_target[0] = False
    return TokenExample(example.tokens[-limit:].copy(), is_target, example.id)


def tokenize_all(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    sequence_length: int | None = None,
    too_long: TooLong = "error",
) -> Tokenised:
    """Tokenises `examples` and deals with those longer than `sequence_length` tokens.

    Args:
        examples: to be tokenised.
        tokenizer: makes the ids.
        sequence_length: the most tokens an example may have; None for no limit.
        too_long: `error` refuses; `skip` leaves the example out; `truncate` cuts tokens from the
            left of the prompt, never from the last answer. The last two are counted in the result.

    Raises:
        InputError: an example is too long under `error`, or its answer alone is under
            `truncate`, all examples were skipped, or as `tokenize_example`.
    """
    kept: list[TokenExample] = []
    skipped: list[str] = []
    truncated: list[str] = []
    for example in examples:
        made = tokenize_example(example, tokenizer)
        if sequence_length is not None and made.length > sequence_length:
            if too_long == "error":
                raise InputError(
                    f"example {example.id} has {made.length} tokens, but data.sequence_length is "
                    f"{sequence_length}; set data.sequence_length to at least {made.length}, or "
                    "data.too_long to 'skip' (leave such examples out) or 'truncate' (cut the "
                    "start of their prompts)"
                )
            if too_long == "skip":
                skipped.append(example.id)
                continue
            answer = len(answer_ids(example, tokenizer))
            made = _truncate(made, answer, sequence_length)
            truncated.append(example.id)
        kept.append(made)
    if examples and not kept:
        raise InputError(
            f"all {len(examples)} examples of a set, from {examples[0].id} on, are longer than "
            f"data.sequence_length {sequence_length} and were skipped; raise data.sequence_length"
        )
    return Tokenised(tuple(kept), tuple(skipped), tuple(truncated))
