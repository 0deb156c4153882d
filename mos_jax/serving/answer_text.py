"""Tokens of an answer to text that can be sent: whole characters, and nothing of a stop text.

Both parts look at an answer token by token and hold back what is not certain yet, so that what they
give, put together, does not depend on how the tokens came.
"""

from __future__ import annotations

from collections.abc import Sequence

from mos_jax.models.tokenizer import Tokenizer

# What a decoder writes for bytes that are no character, or not yet.
UNFINISHED = "\ufffd"
# A character of UTF-8 has at most four bytes, so an unfinished one spans at most three tokens.
UNFINISHED_TOKENS = 3
# Tokens of the prompt that are decoded with the answer's first ones: in some vocabularies (Llama 2)
# a space before a word is there only if something stands before it.
CONTEXT = 4


class Characters:
    """Text of tokens, as far as its characters are finished."""

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = ()):
        """For tokens that follow `before`."""
        self._decode = tokenizer.decode
        # What is decoded at each token: those whose text has been given, for context, then others.
        self._window = list(before[-CONTEXT:])
        self._given = self._decode(self._window)
        if self._given.endswith(UNFINISHED):
            self._window, self._given = [], ""
        self._context = len(self._window)

    def push(self, token: int) -> str:
        """The text that is certain now, with one more token."""
        window = self._window
        window.append(token)
        text = self._decode(window)
        end = len(window)
        if text.endswith(UNFINISHED):
            # Of bytes that never become a character, those that no later token can complete.
            end -= UNFINISHED_TOKENS
            if end <= self._context:
                return ""
            head, tail = self._decode(window[:end]), self._decode(window[end:])
            # Where the tail has no text of its own, or continues the head, that is not finished.
            if not tail or head + tail != text:
                return ""
            text = head
        new = text[len(self._given) :]
        if new:
            del window[: self._context]
            self._context = end - self._context
            self._given = self._decode(window[: self._context])
        return new

    def finish(self) -> str:
        """The rest, unfinished characters as U+FFFD; nothing follows."""
        return self._decode(self._window)[len(self._given) :]


class StopTexts:
    """Finds the first place where one of some texts ends (Knuth, Morris and Pratt)."""

    def __init__(self, texts: Sequence[str]):
        """For `texts`, none empty."""
        self._texts = [(text, _borders(text)) for text in texts]
        self._matched = [0] * len(texts)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """What can be sent now that `text` has come, and whether a stop text has ended in it.

        Nothing of that text is sent, nor of what followed it, and nothing may be pushed any more.
        """
        pending = self._held + text
        for index, character in enumerate(text, len(self._held) + 1):
            ended = 0
            for which, (stop, borders) in enumerate(self._texts):
                matched = self._matched[which]
                while matched and stop[matched] != character:
                    matched = borders[matched]
                matched += stop[matched] == character
                self._matched[which] = matched
                if matched == len(stop):
                    ended = max(ended, matched)
            if ended:
                self._held = ""
                return pending[: index - ended], True
        keep = max(self._matched, default=0)
        self._held = pending[len(pending) - keep :]
        return pending[: len(pending) - keep], False

    def finish(self) -> str:
        """What was held back, since it might have become a stop text."""
        return self._held


def _borders(text: str) -> list[int]:
    """At n, the longest text shorter than n that both begins and ends the first n characters."""
    borders, matched = [0, 0], 0
    for index in range(1, len(text)):
        while matched and text[matched] != text[index]:
            matched = borders[matched]
        matched += text[matched] == text[index]
        borders.append(matched)
    return borders


class AnswerText:
    """The text of an answer, as it comes.

    Attributes:
      stopped: whether a stop text has come; the answer ends before it.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], prompt: Sequence[int] = ()):
        """Of an answer to `prompt`, which ends before any text of `stop`."""
        self._characters = Characters(tokenizer, prompt)
        self._stops = StopTexts(stop)
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that can be sent now, with one more token."""
        sent, self.stopped = self._stops.push(self._characters.push(token))
        return sent

    def finish(self) -> str:
        """The text that is left when no token follows; nothing after a stop text."""
        if self.stopped:
            return ""
        sent, self.stopped = self._stops.push(self._characters.finish())
        return sent if self.stopped else sent + self._stops.finish()
