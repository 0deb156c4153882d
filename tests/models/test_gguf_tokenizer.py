"""Tokenizers from GGUF metadata against plain loops and hand-made splits."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mos_jax.errors import InputError
from mos_jax.models.gguf_tokenizer import PRE_TOKENIZERS, merges_of_scores
from mos_jax.models.tokenizer import CHATML, Tokenizer
from tests.models.fixtures_models import byte_alphabet, greedy_merge
from tests.models.fixtures_sentencepiece import (
    CONTROL,
    NORMAL,
    SCORES,
    SPECIALS,
    TOKENS,
    TYPES,
    USER,
    sentencepiece,
    tokenizer_of,
)

TEXT = st.text(
    st.characters(exclude_categories=["Cs"]) | st.sampled_from(" \nanhelotging<b>é你好x")
)
ALIASES = {"llama3": "llama-bpe"}


def greedy(text, prefix):
    return greedy_merge(text, TOKENS, TYPES, SCORES, prefix)


EXAMPLES = [
    "",
    " ",
    "hello the hell  an   ananan",
    "\n\n\nthe <b>hello</b>\t\r\n",
    "<bos>the<end_of_turn>\n<unk> <0x41>",
    "你好 é e\u0301 \u200b\u00a0😀🇫🇷 12",
    "the [PAD0] xyz",
]


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("text", EXAMPLES)
def test_sentencepiece_is_the_greedy_merge(text, prefix):
    assert sentencepiece(ggml__add_space_prefix=prefix).encode(text) == greedy(text, prefix)


WITHOUT_PREFIX, WITH_PREFIX = sentencepiece(), sentencepiece(ggml__add_space_prefix=True)


@given(TEXT)
def test_sentencepiece_is_the_greedy_merge_for_any_text(text):
    assert WITHOUT_PREFIX.encode(text) == greedy(text, False)
    assert WITH_PREFIX.encode(text) == greedy(text, True)


@given(TEXT)
def test_sentencepiece_round_trip(text):
    text = text.replace("▁", "")  # the one character that comes back as another, a space
    assert WITHOUT_PREFIX.decode(WITHOUT_PREFIX.encode(text), skip_special=False) == text
    if not any(token in text for token in (*SPECIALS, *USER)):
        assert WITH_PREFIX.decode(WITH_PREFIX.encode(text), skip_special=False) == text


@pytest.mark.parametrize("prefix", [False, True])
def test_its_json_is_the_same_tokenizer(tmp_path, prefix):
    ours = sentencepiece(ggml__add_space_prefix=prefix)
    (tmp_path / "tokenizer.json").write_text(ours.to_json())
    settings = {"eos_token": "<eos>", "bos_token": "<bos>", "pad_token": "<pad>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    again = Tokenizer.from_folder(tmp_path)
    assert again.text_start == ours.text_start == "<bos>"
    for text in EXAMPLES:
        assert again.encode(text) == ours.encode(text)
        assert again.decode(ours.encode(text)) == ours.decode(ours.encode(text))


def test_equal_scores_merge_the_longer_left_part_first():
    runs = {"▁" * n: -1e9 for n in range(2, 9)} | {"▁": -5.0}
    merges = merges_of_scores(runs)
    assert len(merges) == sum(range(1, 8))
    assert [len(left) for left, _ in merges] == sorted((len(left) for left, _ in merges))[::-1]


def test_sentencepiece_settings():
    tokenizer = sentencepiece()
    assert (tokenizer.end_of_turn, tokenizer.pad, tokenizer.bos) == (1, 0, 2)
    assert tokenizer.text_start == "<bos>"  # this kind has one unless the file says otherwise
    assert sentencepiece(ggml__add_bos_token=False).text_start == ""
    assert sentencepiece(ggml__bos_token_id=None).text_start == ""
    assert sentencepiece(ggml__eot_token_id=4).end_of_turn == 4
    turns = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}<end_of_turn>\n{% endfor %}"
    assert sentencepiece(chat_template=turns).end_of_turn == 4
    prints = {sentencepiece(ggml__add_space_prefix=p).fingerprint() for p in (False, True)}
    assert len(prints | {sentencepiece(ggml__add_bos_token=False).fingerprint()}) == 3
    # Special and unused tokens stand for no text.
    assert tokenizer.ordinary_ids() == list(range(len(SPECIALS), len(TOKENS) - 1))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "ggml.model",
            "bert",
            r"tokenizer\.ggml\.model = 'bert' is not supported; 'gpt2', 'llama'",
        ),
        ("ggml.scores", None, "must have one number per token"),
        ("ggml.scores", SCORES[1:], "must have one number per token"),
        ("ggml.scores", [float("nan"), *SCORES[1:]], "must have one number per token"),
        ("ggml.token_type", [NORMAL] * len(TOKENS), r"no token <0x00> for a byte"),
        ("ggml.token_type", [9] * len(TOKENS), "unsupported type 9"),
        ("ggml.remove_extra_whitespaces", True, "remove_extra_whitespaces is not supported"),
        ("ggml.precompiled_charsmap", [1, 2], "precompiled_charsmap is not supported"),
        ("ggml.tokens", ["a"] * len(TOKENS), "has a token twice"),
        ("ggml.bos_token_id", len(TOKENS), "bos token"),
        ("ggml.tokens", [*TOKENS[:-2], "x" * 129, "[PAD0]"], "has 129 characters; at most 128"),
    ],
)
def test_sentencepiece_refusals(key, value, message):
    with pytest.raises(InputError, match=message):
        sentencepiece(**{key.replace(".", "__"): value})


def byte_level(pre, merges=("h i",), extra=(), **changes):
    specials = ["<|begin|>", "<|end|>"]
    tokens = [*specials, *byte_alphabet(), "hi", *extra]
    fields = {
        "ggml.model": "gpt2",
        "ggml.pre": pre,
        "ggml.tokens": tokens,
        "ggml.token_type": [CONTROL] * 2 + [NORMAL] * (len(tokens) - 2),
        "ggml.merges": list(merges),
        "ggml.bos_token_id": 0,
        "ggml.eos_token_id": 1,
    }
    return tokenizer_of(fields | {key.replace("__", "."): v for key, v in changes.items()})


def pieces(pre, text):
    """How `pre` splits a text, in the text's own characters."""
    tokenizer = byte_level(pre)
    split = tokenizer._backend.pre_tokenizer.pre_tokenize_str(text)
    return [text[start:stop] for _, (start, stop) in split]


SPLITS = {
    "gpt-2": ["I", "'ll", " pay", " 12345", "$...", "  ", " now", "\n\n", "\n", "x", "²"],
    "smollm": ["I", "'ll", " pay", " ", *"12345", "$...", "  ", " now", "\n\n", "\n", "x", "²"],
    "default": [
        "I", "'", "ll", " pay", " ", "123", "45", "$...", "  ", " now", "\n\n", "\n", "x", "²",
    ],
    "llama-bpe": ["I", "'ll", " pay", " ", "123", "45", "$...", "  ", " now", "\n\n\n", "x", "²"],
    "qwen2": ["I", "'ll", " pay", " ", *"12345", "$...", "  ", " now", "\n\n\n", "x", "²"],
}  # fmt: skip


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_pre_tokenizers(pre):
    assert pieces(pre, "I'll pay 12345$...   now\n\n\nx²") == SPLITS[ALIASES.get(pre, pre)]


def test_capitals_after_an_apostrophe_end_a_word_in_newer_splits_only():
    assert pieces("llama-bpe", "WE'LL") == pieces("qwen2", "WE'LL") == ["WE", "'LL"]
    assert pieces("gpt-2", "WE'LL") == ["WE", "'", "LL"]


def test_llama3_takes_whole_pieces_and_qwen_composes():
    # "hic" is a token that no merge makes.
    space, c = (2 + byte_alphabet().index(character) for character in "Ġc")
    assert byte_level("llama-bpe", extra=["hic"]).encode("hic hic") == [259, space, 258, c]
    assert len(byte_level("gpt-2", extra=["hic"]).encode("hic")) == 2
    composed, apart = "\u00e9", "e\u0301"
    assert byte_level("qwen2").encode(apart) == byte_level("qwen2").encode(composed)
    assert byte_level("llama-bpe").encode(apart) != byte_level("llama-bpe").encode(composed)


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_byte_level_round_trip(pre, text):
    tokenizer = BYTE_LEVEL[pre]
    if pre == "qwen2":
        assert tokenizer.encode(tokenizer.decode(tokenizer.encode(text))) == tokenizer.encode(text)
    else:
        assert tokenizer.decode(tokenizer.encode(text)) == text


BYTE_LEVEL = {pre: byte_level(pre) for pre in PRE_TOKENIZERS}


def test_byte_level_settings():
    assert {pre: t.text_start for pre, t in BYTE_LEVEL.items()} == {
        pre: "<|begin|>" if pre in ("llama-bpe", "llama3") else "" for pre in PRE_TOKENIZERS
    }
    assert byte_level("qwen2", ggml__add_bos_token=True).text_start == "<|begin|>"
    assert byte_level("llama-bpe", ggml__add_bos_token=False).text_start == ""
    template = CHATML.replace("<|im_end|>", "<|end|>")
    ended = byte_level("qwen2", ggml__eos_token_id=0, chat_template=template)
    assert ended.end_of_turn == 1
    for other in (None, ["gpt-2"], 3):
        with pytest.raises(InputError, match=r"tokenizer\.ggml\.pre = .* is not supported"):
            byte_level(other)
