"""Answers in the forms of OpenAI's API: whole, or in chunks of a stream."""

from __future__ import annotations

import abc
import dataclasses
import functools
import time
import uuid
from collections.abc import Sequence
from typing import Any

from mos_jax.models.tokenizer import Tokenizer
from mos_jax.serving.requests import Done, Piece, TokenInfo

# What OpenAI's API gives for a probability of nothing, since JSON has no infinity.
LEAST_LOGPROB = -9999.0


@dataclasses.dataclass
class Gathered:
    """One choice, as far as it has come.

    Attributes:
      text: of the answer.
      tokens: of the answer.
      done: how it ended.
    """

    text: str = ""
    tokens: list[TokenInfo] = dataclasses.field(default_factory=list)
    done: Done | None = None

    def add(self, event: Piece | Done) -> None:
        """Takes the next event."""
        if isinstance(event, Done):
            self.done = event
        else:
            self.text += event.text
            self.tokens += event.tokens


class TokenTexts:
    """The text of single tokens, as it stands inside a longer text."""

    def __init__(self, tokenizer: Tokenizer):
        """Takes any token as the one before: some tokenizers drop a space at the beginning."""
        self.end_of_turn = tokenizer.end_of_turn
        self._tokenizer = tokenizer
        self._before = tokenizer.encode("a")[-1:]
        self._start = tokenizer.decode(self._before, skip_special=False)
        self._of = functools.lru_cache(1 << 16)(self._decode)

    def _decode(self, token: int) -> str:
        whole = self._tokenizer.decode([*self._before, token], skip_special=False)
        return whole.removeprefix(self._start)

    def text(self, token: int) -> str:
        """The token's text; a part of a character is U+FFFD."""
        return self._of(token)

    def entry(self, token: int, logprob: float) -> dict[str, Any]:
        """The token with its log-probability, as in a chat."""
        text = self.text(token)
        exact = None if "\ufffd" in text else list(text.encode("utf-8"))
        return {"token": text, "logprob": _bounded(logprob), "bytes": exact}


class Form(abc.ABC):
    """Of one kind of completions: `ChatForm` or `TextForm`."""

    kind = prefix = chunk_kind = ""

    def __init__(
        self, model: str, texts: TokenTexts, *, fingerprint: str, logprobs: bool, usage: bool
    ):
        """The frame of one answer.

        Args:
          model: as it was asked for.
          texts: of tokens.
          fingerprint: of the base.
          logprobs: whether log-probabilities were asked for.
          usage: whether the chunks of a stream speak of usage.
        """
        self._texts, self._logprobs, self._usage = texts, logprobs, usage
        self._head = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": f"fp_{fingerprint[:12]}",
        }

    def whole(self, choices: Sequence[Gathered], usage: dict[str, Any]) -> dict[str, Any]:
        """The answer in one."""
        listed = [self._whole(index, choice) for index, choice in enumerate(choices)]
        return {**self._head, "object": self.kind, "choices": listed, "usage": usage}

    @abc.abstractmethod
    def first(self, index: int) -> dict[str, Any] | None:
        """The chunk that opens a choice, if there is one."""

    @abc.abstractmethod
    def piece(self, index: int, piece: Piece, before: str) -> dict[str, Any] | None:
        """The chunk of a piece of text that follows `before`; None where it has nothing to say."""

    @abc.abstractmethod
    def last(self, index: int, done: Done) -> dict[str, Any]:
        """The chunk that closes a choice."""

    def counts(self, usage: dict[str, Any]) -> dict[str, Any]:
        """The chunk that closes a stream with its usage."""
        return {**self._head, "object": self.chunk_kind, "choices": [], "usage": usage}

    @abc.abstractmethod
    def _whole(self, index: int, choice: Gathered) -> dict[str, Any]:
        """A choice of an answer in one."""

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        chunk = {**self._head, "object": self.chunk_kind, "choices": [choice]}
        return {**chunk, "usage": None} if self._usage else chunk

    def _shown(self, tokens: Sequence[TokenInfo]) -> list[TokenInfo]:
        """Without the token that ends a turn, which is no part of the text."""
        return [info for info in tokens if info.token != self._texts.end_of_turn]


class ChatForm(Form):
    """Of `POST /v1/chat/completions`."""

    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def first(self, index: int) -> dict[str, Any]:
        """The chunk with the role."""
        delta = {"role": "assistant", "content": "", "refusal": None}
        return self._chunk(self._delta(index, delta, None, ()))

    def piece(self, index: int, piece: Piece, before: str) -> dict[str, Any] | None:
        """The chunk with the text of a piece."""
        if not piece.text and not (self._logprobs and self._shown(piece.tokens)):
            return None
        return self._chunk(self._delta(index, {"content": piece.text}, None, piece.tokens))

    def last(self, index: int, done: Done) -> dict[str, Any]:
        """The chunk with the reason of the end."""
        return self._chunk(self._delta(index, {}, done.reason, ()))

    def _delta(
        self, index: int, delta: dict[str, Any], reason: str | None, tokens: Sequence[TokenInfo]
    ) -> dict[str, Any]:
        logprobs = self._entries(tokens) if tokens else None
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}

    def _whole(self, index: int, choice: Gathered) -> dict[str, Any]:
        assert choice.done is not None
        return {
            "index": index,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": self._entries(choice.tokens),
            "finish_reason": choice.done.reason,
        }

    def _entries(self, tokens: Sequence[TokenInfo]) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        listed = []
        for info in self._shown(tokens):
            top = [self._texts.entry(token, value) for token, value in info.top.items()]
            listed.append({**self._texts.entry(info.token, info.logprob), "top_logprobs": top})
        return {"content": listed, "refusal": None}


class TextForm(Form):
    """Of `POST /v1/completions`."""

    kind = chunk_kind = "text_completion"
    prefix = "cmpl"

    def first(self, index: int) -> None:
        """There is none."""

    def piece(self, index: int, piece: Piece, before: str) -> dict[str, Any] | None:
        """The chunk with the text of a piece."""
        if not piece.text and not (self._logprobs and self._shown(piece.tokens)):
            return None
        return self._chunk(self._text(index, piece.text, None, piece.tokens, len(before)))

    def last(self, index: int, done: Done) -> dict[str, Any]:
        """The chunk with the reason of the end."""
        return self._chunk(self._text(index, "", done.reason, (), 0))

    def _whole(self, index: int, choice: Gathered) -> dict[str, Any]:
        assert choice.done is not None
        return self._text(index, choice.text, choice.done.reason, choice.tokens, 0)

    def _text(
        self, index: int, text: str, reason: str | None, tokens: Sequence[TokenInfo], offset: int
    ) -> dict[str, Any]:
        logprobs = self._lists(tokens, offset) if self._logprobs else None
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _lists(self, tokens: Sequence[TokenInfo], offset: int) -> dict[str, Any]:
        shown = self._shown(tokens)
        texts = [self._texts.text(info.token) for info in shown]
        offsets = [offset]
        for text in texts:
            offsets.append(offsets[-1] + len(text))
        return {
            "tokens": texts,
            "token_logprobs": [_bounded(info.logprob) for info in shown],
            "top_logprobs": [self._by_text(info) for info in shown],
            "text_offset": offsets[:-1],
        }

    def _by_text(self, info: TokenInfo) -> dict[str, float]:
        """Alternatives by text; of tokens that share it (parts of characters), the likeliest."""
        found: dict[str, float] = {}
        for token, value in info.top.items():
            found.setdefault(self._texts.text(token), _bounded(value))
        return found


def count_usage(choices: Sequence[Gathered], n: int) -> dict[str, Any]:
    """Tokens of an answer whose prompts have `n` choices each; a prompt counts once."""
    done = [choice.done for choice in choices if choice.done is not None]
    prompts = done[::n]
    prompt = sum(one.prompt_tokens for one in prompts)
    completion = sum(one.completion_tokens for one in done)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(one.cached_tokens for one in prompts)},
    }


def _bounded(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)
