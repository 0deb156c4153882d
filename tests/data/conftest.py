"""A tokenizer of bytes, with and without a chat template."""

import re
from collections.abc import Mapping, Sequence

import pytest

SPECIAL = ("<s>", "</s>", "<pad>")


class ByteTokenizer:
    """One id per byte; the special tokens are the ids from 256 on."""

    vocab_size = 256 + len(SPECIAL)
    end_of_turn = 257
    pad = 258

    def __init__(self, has_chat_template: bool = True, text_start: str = "") -> None:
        self.has_chat_template = has_chat_template
        self.text_start = text_start

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for part in re.split("(<s>|</s>|<pad>)", text):
            ids += [256 + SPECIAL.index(part)] if part in SPECIAL else part.encode()
        return ids

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        parts = [
            bytes([i]) if i < 256 else b"" if skip_special else SPECIAL[i - 256].encode()
            for i in ids
        ]
        return b"".join(parts).decode()

    def ordinary_ids(self) -> list[int]:
        return list(range(256))

    def render(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool) -> str:
        assert self.has_chat_template, "rendered without a chat template"
        turns = "".join(f"<s>{m['role']}\n{m['content']}</s>\n" for m in messages)
        return turns + ("<s>assistant\n" if add_generation_prompt else "")


@pytest.fixture
def tokenizer() -> ByteTokenizer:
    return ByteTokenizer()


@pytest.fixture
def plain_tokenizer() -> ByteTokenizer:
    return ByteTokenizer(has_chat_template=False)
