"""Text to token ids and back, and chat messages to text.

One class serves every base: its tokenizer comes from a GGUF file, from a Hugging Face folder, or is
plain bytes. The `tokenizers` library does the splitting and merging.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from mos_jax.errors import InputError, naming
from mos_jax.models.chat_template import CHATML, compile_template
from mos_jax.models.gguf import GGUFFile, open_gguf
from mos_jax.models.gguf_tokenizer import add_tokens, read_tokenizer
from mos_jax.reading import read_bytes, read_json, read_text


class Tokenizer:
    """A tokenizer with its special tokens and chat template.

    Build it with `from_gguf`, `from_folder` or `byte_level`.

    Attributes:
        vocab_size: One more than the largest id it gives; a model may have more rows.
        end_of_turn: Id that ends an answer: of the token that the chat template writes right after
            one, else the one that the files name.
        pad: Id to fill with; may be the same as `end_of_turn`, so mask by position, not by id.
        bos: Id that the files name as the beginning of a text, or None. `encode` does not add it.
        text_start: What a text that no chat template wrote must begin with: the text of `bos`
            where the files put it before every text (Llama, Mistral, Gemma), else "".
        has_chat_template: Whether `render` can be called.
        chat_template: Source of the template that `render` fills, or None.
        folder: The Hugging Face folder that it was read from, or None.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        end_of_turn: int,
        pad: int | None,
        bos: int | None,
        chat_template: str | None,
        identity: bytes,
        folder: Path | None = None,
        unused: Iterable[int] = (),
    ):
        """Takes over `backend`; `identity` is what determines its behaviour, for `fingerprint`.

        `unused` are ids that stand for nothing.
        """
        self._backend = backend
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        self.end_of_turn = self._checked("end_of_turn", end_of_turn)
        self.pad = self.end_of_turn if pad is None else self._checked("pad", pad)
        self.bos = None if bos is None else self._checked("bos", bos)
        self.has_chat_template = chat_template is not None
        self.chat_template, self.folder = chat_template, folder
        self._template = None if chat_template is None else compile_template(chat_template)
        written = self._template_end()
        self.end_of_turn = self.end_of_turn if written is None else written
        self._unused = frozenset(unused)
        added = backend.encode("", add_special_tokens=True).ids
        self.text_start = self.token(added[0]) if added[:1] == [self.bos] else ""
        start = [self.text_start] if self.text_start else []
        ids = json.dumps([self.end_of_turn, self.pad, self.bos, chat_template, *start])
        self._fingerprint = hashlib.sha256(identity + ids.encode()).hexdigest()

    def _checked(self, name: str, token: int) -> int:
        inside = isinstance(token, int) and 0 <= token < self.vocab_size
        if not inside or self._backend.id_to_token(token) is None:
            raise InputError(f"{name} token {token!r} is not an id of the vocabulary")
        return token

    def _template_end(self) -> int | None:
        """Returns the id of the token that the chat template writes right after an answer."""
        answer = "An answer."
        chat = [
            {"role": "user", "content": "A question?"},
            {"role": "assistant", "content": answer},
        ]
        try:
            after = self.render(chat).rpartition(answer)[2].lstrip()
        except InputError:  # no template, or one for other conversations
            return None
        added = self._backend.get_added_tokens_decoder().items()
        found = [(len(t.content), index) for index, t in added if after.startswith(t.content)]
        return max(found)[1] if found else None

    @classmethod
    def from_gguf(cls, source: os.PathLike[str] | str | GGUFFile) -> Tokenizer:
        """Returns the tokenizer in the metadata of a GGUF file.

        Byte-level BPE with one of `gguf_tokenizer.PRE_TOKENIZERS` and SentencePiece's BPE are
        supported. SmolLM2's vocabulary lacks the bytes of some control characters and of
        unassigned Unicode planes; those are dropped from a text. Llama 2's and Mistral's puts a
        space before every text, and after every special token in it, that `decode` takes away.

        Args:
            source: The file's path, or its header if that is already read.

        Raises:
            InputError: As `open_gguf`; another kind of tokenizer; a key missing or damaged.
        """
        header = source if isinstance(source, GGUFFile) else open_gguf(source)
        with naming(header.path):
            return cls(**read_tokenizer(header)._asdict())

    @classmethod
    def from_folder(cls, path: os.PathLike[str] | str) -> Tokenizer:
        """Returns the tokenizer of a Hugging Face folder, as its tokenizer.json describes it.

        Where the chat template does not show it, the end of a turn is `eos_token` of
        tokenizer_config.json, else of special_tokens_map.json, else the (first) `eos_token_id` of
        generation_config.json. The chat template is
        chat_template.jinja, else `chat_template` of tokenizer_config.json.

        Args:
            path: The folder.

        Raises:
            InputError: tokenizer.json is missing or damaged, or no end of a turn is given.
        """
        folder = Path(path)
        file = folder / "tokenizer.json"
        if not file.exists():
            raise InputError(
                f"{file} is missing; other formats, such as tokenizer.model, are not supported"
            )
        content = read_bytes(file)
        try:
            backend = tokenizers.Tokenizer.from_str(content.decode("utf-8"))
        except Exception as error:  # the library raises nothing narrower
            raise InputError(f"{file} is not a tokenizer: {error}") from error
        # Settings of a training run that tokenizer.json may carry along.
        backend.no_truncation()
        backend.no_padding()
        config, special_map, generation = (
            read_json(folder / name) if os.path.lexists(folder / name) else {}
            for name in (
                "tokenizer_config.json",
                "special_tokens_map.json",
                "generation_config.json",
            )
        )

        def special(name: str) -> int | None:
            token = config.get(name) or special_map.get(name)
            content = token.get("content") if isinstance(token, dict) else token
            if content is None:
                return None
            found = backend.token_to_id(content) if isinstance(content, str) else None
            if found is None:
                raise InputError(f"{folder}: {name} {content!r} is not in tokenizer.json")
            return int(found)

        end_of_turn = special("eos_token")
        if end_of_turn is None:
            listed: Any = generation.get("eos_token_id")
            end_of_turn = listed[0] if isinstance(listed, list) and listed else listed
        if end_of_turn is None:
            raise InputError(
                f"{folder} names no token that ends a turn; give eos_token in tokenizer_config.json"
            )
        with naming(folder):
            return cls(
                backend,
                end_of_turn=end_of_turn,
                pad=special("pad_token"),
                bos=special("bos_token"),
                chat_template=_folder_template(folder, config),
                identity=content,
                folder=folder,
            )

    @classmethod
    def byte_level(cls) -> Tokenizer:
        """Returns the tokenizer whose ids 0 to 255 are the bytes of UTF-8.

        256 is `<|pad|>`, 257 `<|im_start|>` and 258 `<|im_end|>`, the end of a turn; the chat
        template is ChatML.
        """
        alphabet = _byte_characters()
        backend = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
        add_tokens(backend, ["<|pad|>", "<|im_start|>", "<|im_end|>"], special=True)
        return cls(
            backend,
            end_of_turn=258,
            pad=256,
            bos=None,
            chat_template=CHATML,
            identity=b"byte level, 3 special tokens",
        )

    def to_json(self) -> str:
        """Returns the content of a tokenizer.json that encodes and decodes as this does."""
        return str(self._backend.to_str(pretty=True))

    def token(self, index: int) -> str:
        """Returns the text of the token `index`, as the vocabulary has it."""
        return str(self._backend.id_to_token(index))

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text`.

        Special tokens written out in the text become their ids. Nothing is added: neither `bos`
        (a rendered chat has it if its template writes it; put `text_start` before other text) nor
        an end.

        Raises:
            InputError: `text` is no str, or has half of a surrogate pair, which is no character.
        """
        try:
            return list(self._backend.encode(text, add_special_tokens=False).ids)
        except TypeError as error:
            raise InputError(
                f"{type(text).__name__} {text!r:.80} cannot be encoded; it must be a str without "
                "halves of surrogate pairs"
            ) from error

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Returns the text of `ids`.

        Bytes that are not UTF-8 become U+FFFD. Ids that no token has (a model may have more rows
        than its tokenizer has tokens) become nothing.

        Args:
            ids: Token ids; integers of any library.
            skip_special: Whether to leave out special tokens.

        Raises:
            InputError: An id is negative or above 2^32 - 1.
        """
        numbers = [int(token) for token in ids]
        for token in numbers:
            if not 0 <= token < 1 << 32:
                raise InputError(f"token id {token} is not between 0 and {self.vocab_size - 1}")
        return str(self._backend.decode(numbers, skip_special_tokens=skip_special))

    def ordinary_ids(self) -> list[int]:
        """Returns the ids of all tokens that stand for text, in order: the special ones left out.

        Special are those that the files mark so, and `end_of_turn`, `pad` and `bos`. Those that
        stand for nothing are left out too.
        """
        added = self._backend.get_added_tokens_decoder()
        special = {self.end_of_turn, self.pad, self.bos, *self._unused}
        special |= {token for token, entry in added.items() if entry.special}
        vocabulary = self._backend.get_vocab(with_added_tokens=True).values()
        return sorted(token for token in vocabulary if token not in special)

    def render(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = False
    ) -> str:
        """Returns a conversation as text for `encode`, by the chat template.

        A template may print today's date (Llama 3.2's does); its text then changes by the day.

        Args:
            messages: Turns in order, each with "role" and "content".
            add_generation_prompt: Whether to end with what begins an assistant's answer.

        Raises:
            InputError: There is no chat template, or it fails on or refuses these messages.
        """
        if self._template is None:
            raise InputError(
                "this tokenizer has no chat template; use a model made for chat, or plain text"
            )
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                bos_token="" if self.bos is None else self._backend.id_to_token(self.bos),
                eos_token=self._backend.id_to_token(self.end_of_turn),
                pad_token=self._backend.id_to_token(self.pad),
                tools=None,
                documents=None,
            )
        except Exception as error:  # a template is a program of the file: it may raise anything
            raise InputError(f"the chat template failed on these messages: {error}") from error

    def fingerprint(self) -> str:
        """Returns a SHA-256, in hex, over vocabulary, merges, special ids and chat template.

        Equal for equal sources; a GGUF file and a folder of one model have different ones.
        """
        return self._fingerprint


def _folder_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if os.path.lexists(file):
        return read_text(file)
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = [entry for entry in template if isinstance(entry, dict)]
        chosen = [entry.get("template") for entry in named if entry.get("name") == "default"]
        template = chosen[0] if chosen else None
    if not isinstance(template, (str, type(None))):
        raise InputError(f"{folder}: chat_template must be text, not {type(template).__name__}")
    return template


def _byte_characters() -> list[str]:
    """Returns the character that stands for each byte in a byte-level vocabulary.

    Printable Latin-1 characters stand for themselves, the other bytes, in order, for the
    characters from U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
