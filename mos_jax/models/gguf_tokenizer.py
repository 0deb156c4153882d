"""The tokenizer in the metadata of a GGUF file, as a tokenizer of the `tokenizers` library.

Two kinds are read. Byte-level BPE ("gpt2") has its merges in the file and, by name, the expression
that splits a text before them. SentencePiece's BPE ("llama": Llama 2, Mistral, Gemma) has a score
for each token instead: of all neighbours that form a token together, those whose token has the
highest score merge first. As merges are ranked by pair here, equal scores are the one case that can
differ: the pair with the longer left part goes first, not the one further left in the text.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors

from mos_jax.errors import InputError
from mos_jax.models.gguf import GGUFFile

# Types of tokens.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_TYPES = {
    "gpt2": (_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED),
    "llama": (_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE),
}
# Llama 3's and Qwen's splits differ in how many digits stand together.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Expressions by the name of the pre-tokenizer. Each splits what those before it left, and its
# matches and what is between them become pieces.
_SPLITS = {
    "smollm": (r"\p{N}", _GPT2),
    "gpt-2": (_GPT2,),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
    "qwen2": (_WORDS.replace("DIGITS", ""),),
    "llama-bpe": (_WORDS.replace("DIGITS", "{1,3}"),),
    "llama3": (_WORDS.replace("DIGITS", "{1,3}"),),
}
GGUF_TOKENIZERS = ("gpt2", "llama")
PRE_TOKENIZERS = tuple(_SPLITS)
# Those of Llama 3 take a piece that is a token as that token, whatever the merges say, and begin
# a text with `bos` unless the file says otherwise; Qwen's composes characters first.
_LLAMA3 = ("llama-bpe", "llama3")
_COMPOSED = ("qwen2",)
# Characters of a token that is merged; SentencePiece makes at most 16. Each has as many possible
# merges, so that a file of hostile ones would take its size times this in memory.
_LONGEST = 128


class TokenizerParts(NamedTuple):
    """What `Tokenizer` takes; see there.

    Attributes:
        backend: Encodes and decodes. Its post-processor puts `bos` before a text if the file asks
            for that.
        end_of_turn: Id that the file names as the end of a turn, else of a text.
        pad: Id to fill with, or None.
        bos: Id that begins a text, or None.
        chat_template: Jinja source, or None.
        identity: What determines the behaviour of `backend`.
        unused: Ids that fill up the vocabulary and stand for nothing.
    """

    backend: tokenizers.Tokenizer
    end_of_turn: int
    pad: int | None
    bos: int | None
    chat_template: str | None
    identity: bytes
    unused: tuple[int, ...]


def read_tokenizer(header: GGUFFile) -> TokenizerParts:
    """Returns the tokenizer that a GGUF file describes.

    Raises:
        InputError: A kind or a pre-tokenizer that is not known; a key missing or damaged.
    """
    fields = {
        key.removeprefix("tokenizer."): value
        for key, value in header.fields.items()
        if key.startswith("tokenizer.")
    }
    kind = fields.get("ggml.model")
    if kind not in GGUF_TOKENIZERS:
        raise InputError(
            f"{header.path}: tokenizer.ggml.model = {kind!r} is not supported; "
            f"{_listed(GGUF_TOKENIZERS)} are; read the tokenizer from a folder with tokenizer.json"
        )
    tokens = _strings(header, "ggml.tokens")
    types = fields.get("ggml.token_type", [_NORMAL] * len(tokens))
    if not isinstance(types, list) or len(types) != len(tokens):
        raise InputError(f"{header.path}: tokenizer.ggml.token_type must have one per token")
    for token, of in zip(tokens, types, strict=True):
        if of not in _TYPES[kind]:
            raise InputError(f"{header.path}: token {token!r} has unsupported type {of!r}")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise InputError(f"{header.path}: tokenizer.ggml.tokens has a token twice")

    build = _byte_level if kind == "gpt2" else _sentencepiece
    backend, parts, starts = build(header, fields, vocabulary, types)
    special = (_CONTROL, _UNKNOWN)
    for chosen, is_special in ((special, True), ((_USER_DEFINED,), False)):
        contents = [token for token, of in zip(tokens, types, strict=True) if of in chosen]
        add_tokens(backend, contents, special=is_special)
    end_of_turn = fields.get("ggml.eot_token_id", fields.get("ggml.eos_token_id"))
    if end_of_turn is None:
        raise InputError(f"{header.path}: tokenizer.ggml.eos_token_id is missing")
    bos = fields.get("ggml.bos_token_id")
    if fields.get("ggml.add_bos_token", starts) and isinstance(bos, int) and 0 <= bos < len(tokens):
        begin = processors.TemplateProcessing(
            single=f"{bos} $A",
            special_tokens=[{"id": str(bos), "ids": [bos], "tokens": [tokens[bos]]}],
        )
        backend.post_processor = begin
    return TokenizerParts(
        backend,
        end_of_turn,
        fields.get("ggml.padding_token_id"),
        bos,
        fields.get("chat_template"),
        json.dumps([*parts, types]).encode(),
        tuple(index for index, of in enumerate(types) if of == _UNUSED),
    )


# A backend, what determines it, and whether its kind puts `bos` before a text by default.
_Built = tuple[tokenizers.Tokenizer, list[Any], bool]


def _byte_level(
    header: GGUFFile, fields: Mapping[str, Any], vocabulary: dict[str, int], types: list[int]
) -> _Built:
    del types
    pre = fields.get("ggml.pre")
    if not isinstance(pre, str) or pre not in _SPLITS:
        raise InputError(
            f"{header.path}: tokenizer.ggml.pre = {pre!r} is not supported; "
            f"{_listed(PRE_TOKENIZERS)} are; read the tokenizer from a folder with tokenizer.json"
        )
    pairs = (merge.partition(" ") for merge in _strings(header, "ggml.merges"))
    merges = [(first, second) for first, _, second in pairs]
    try:
        backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges, ignore_merges=pre in _LLAMA3))
    except Exception as error:  # the library raises nothing narrower
        raise InputError(f"{header.path}: tokenizer.ggml.merges is damaged: {error}") from error
    if pre in _COMPOSED:
        backend.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(split), "isolated") for split in _SPLITS[pre]]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    return backend, [f"gpt2/{pre}", list(vocabulary), merges], pre in _LLAMA3


def _sentencepiece(
    header: GGUFFile, fields: Mapping[str, Any], vocabulary: dict[str, int], types: list[int]
) -> _Built:
    scores = fields.get("ggml.scores")
    numbers = isinstance(scores, list) and all(
        isinstance(score, (int, float)) and math.isfinite(score) for score in scores
    )
    if not isinstance(scores, list) or not numbers or len(scores) != len(vocabulary):
        raise InputError(f"{header.path}: tokenizer.ggml.scores must have one number per token")
    for key in ("ggml.remove_extra_whitespaces", "ggml.precompiled_charsmap"):
        if fields.get(key):
            raise InputError(
                f"{header.path}: tokenizer.{key} is not supported; text is encoded as it stands"
            )
    for byte in range(256):
        if types[vocabulary.get(f"<0x{byte:02X}>", 0)] != _BYTE:
            raise InputError(
                f"{header.path}: the vocabulary has no token <0x{byte:02X}> for a byte"
            )
    normal = {
        token: scores[index] for token, index in vocabulary.items() if types[index] == _NORMAL
    }
    longest = max(normal, key=len, default="")
    if len(longest) > _LONGEST:
        raise InputError(
            f"{header.path}: token {longest!r:.40} has {len(longest)} characters; "
            f"at most {_LONGEST} are supported"
        )
    unknown = [token for token, index in vocabulary.items() if types[index] == _UNKNOWN]
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocabulary,
            merges_of_scores(normal),
            unk_token=unknown[0] if unknown else None,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = bool(fields.get("ggml.add_space_prefix", True))
    spaces = normalizers.Replace(" ", "▁")
    plain = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces])
        plain.append(decoders.Strip(" ", 1, 0))
    else:
        backend.normalizer = spaces
    backend.decoder = decoders.Sequence(plain)
    return backend, ["llama", prefix, list(vocabulary), scores], True


def merges_of_scores(scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """Returns the merges of SentencePiece's BPE, first the one that goes first.

    Args:
        scores: Of each token that a merge may take or make.
    """
    found = []
    for token, score in scores.items():
        for cut in range(1, len(token)):
            first, second = token[:cut], token[cut:]
            if first in scores and second in scores:
                found.append((-score, -cut, first, second))
    # By score, then by length; stable, so that the vocabulary's order decides the rest.
    found.sort(key=lambda merge: merge[:2])
    return [(first, second) for _, _, first, second in found]


def add_tokens(backend: tokenizers.Tokenizer, contents: Sequence[str], special: bool) -> None:
    """Makes `contents`, where they stand in a text, tokens before anything else is done to it."""
    backend.add_tokens(
        [tokenizers.AddedToken(c, special=special, normalized=False) for c in contents]
    )


def _strings(header: GGUFFile, key: str) -> list[str]:
    value = header.fields.get(f"tokenizer.{key}")
    if not isinstance(value, list) or not value or not isinstance(value[0], str):
        raise InputError(f"{header.path}: tokenizer.{key} is missing or not a list of strings")
    return value


def _listed(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names)
