from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from mos_jax.data import (
    Example,
    Tokenizer,
    answer_ids,
    prompt_ids,
    prompt_text,
    question_and_answer,
    tokenize_all,
    tokenize_example,
)
from mos_jax.errors import InputError
from tests.data.conftest import ByteTokenizer


def conversation(*contents: str) -> Example:
    roles = ("user", "assistant")
    turns = ({"role": roles[i % 2], "content": c} for i, c in enumerate(contents))
    return Example(tuple(turns), "talk")


def learnt(example: Example, tokenizer: Tokenizer) -> str:
    made = tokenize_example(example, tokenizer)
    return tokenizer.decode([int(t) for t in made.tokens[made.is_target]], skip_special=False)


def test_targets_are_the_answer_and_the_end_of_turn(tokenizer: Tokenizer) -> None:
    example = question_and_answer("Who?", "Ann", "e")
    made = tokenize_example(example, tokenizer)
    text = tokenizer.decode([int(t) for t in made.tokens], skip_special=False)
    assert text == "<s>user\nWho?</s>\n<s>assistant\nAnn</s>"
    assert learnt(example, tokenizer) == "Ann</s>"
    assert made.is_target[-4:].all()
    assert made.targets == 4
    assert made.length == len(made.tokens)
    assert (str(made.tokens.dtype), str(made.is_target.dtype), made.id) == ("int32", "bool", "e")


def test_training_and_generation_share_their_prompt(tokenizer: Tokenizer) -> None:
    example = conversation("q", "a", "r", "b")
    made = tokenize_example(example, tokenizer)
    assert [*prompt_ids(example, tokenizer), *answer_ids(example, tokenizer)] == list(made.tokens)
    rendered = tokenizer.render(example.messages[:-1], True)
    assert prompt_ids(example, tokenizer) == tokenizer.encode(rendered)
    assert answer_ids(example, tokenizer) == [ord("b"), tokenizer.end_of_turn]


def test_all_assistant_turns_are_targets(tokenizer: Tokenizer, plain_tokenizer: Tokenizer) -> None:
    example = conversation("q", "one", "r", "two", "s", "three")
    for each in (tokenizer, plain_tokenizer):
        assert learnt(example, each) == "one</s>two</s>three</s>"


def test_without_a_chat_template(plain_tokenizer: Tokenizer) -> None:
    example = conversation("q", "one", "r", "two")
    made = tokenize_example(example, plain_tokenizer)
    text = plain_tokenizer.decode([int(t) for t in made.tokens], skip_special=False)
    assert text == "q\none</s>\nr\ntwo</s>"
    assert prompt_text(example.messages[:1], plain_tokenizer) == "q\n"


def test_a_text_start_stands_once_and_only_without_a_template(tokenizer: Tokenizer) -> None:
    example = conversation("q", "one", "r", "two")
    plain = ByteTokenizer(has_chat_template=False, text_start="<s>")
    made = tokenize_example(example, plain)
    text = plain.decode([int(t) for t in made.tokens], skip_special=False)
    assert text == "<s>q\none</s>\nr\ntwo</s>"
    assert prompt_text(example.messages[:1], plain) == "<s>q\n"
    with_both = ByteTokenizer(has_chat_template=True, text_start="<pad>")
    assert prompt_text(example.messages, with_both) == prompt_text(example.messages, tokenizer)


def test_a_template_that_rewrites_earlier_turns(tokenizer: Tokenizer) -> None:
    def render(messages: Sequence[Mapping[str, str]], add_generation_prompt: bool) -> str:
        return f"{len(messages)} turns: " + " ".join(m["content"] for m in messages)

    tokenizer.render = render  # type: ignore[method-assign]
    assert learnt(conversation("q", "a"), tokenizer) == "a</s>"
    with pytest.raises(InputError, match=r"talk: the chat template is not prefix-stable"):
        tokenize_example(conversation("q", "a", "r", "b"), tokenizer)


def test_an_answer_with_the_end_of_turn_in_it(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="contains the end-of-turn token '</s>'"):
        tokenize_example(conversation("q", "a</s>b"), tokenizer)


def test_an_empty_prompt(tokenizer: Tokenizer) -> None:
    tokenizer.render = lambda messages, add_generation_prompt: ""  # type: ignore[method-assign]
    with pytest.raises(InputError, match="prompt has no tokens"):
        tokenize_example(conversation("", "a"), tokenizer)


class TestTooLong:
    short = question_and_answer("q", "a", "short")
    long = question_and_answer("q" * 20, "abc", "long")

    def test_error(self, plain_tokenizer: Tokenizer) -> None:
        with pytest.raises(InputError, match=r"example long has 25 tokens, .* is 10; .*'skip'"):
            tokenize_all([self.short, self.long], plain_tokenizer, 10)
        fits = tokenize_all([self.short, self.long], plain_tokenizer, 25)
        assert [e.length for e in fits.examples] == [4, 25]

    def test_no_limit(self, plain_tokenizer: Tokenizer) -> None:
        assert len(tokenize_all([self.short, self.long], plain_tokenizer).examples) == 2

    def test_skip(self, plain_tokenizer: Tokenizer) -> None:
        result = tokenize_all([self.long, self.short], plain_tokenizer, 10, "skip")
        assert [e.id for e in result.examples] == ["short"]
        assert (result.skipped, result.truncated) == (("long",), ())
        with pytest.raises(InputError, match="all 1 examples of a set, from long on"):
            tokenize_all([self.long], plain_tokenizer, 10, "skip")

    def test_truncate_keeps_the_answer_and_the_end_of_the_prompt(
        self, plain_tokenizer: Tokenizer
    ) -> None:
        result = tokenize_all([self.short, self.long], plain_tokenizer, 10, "truncate")
        cut = result.examples[1]
        assert plain_tokenizer.decode([int(t) for t in cut.tokens]) == "qqqqq\nabc"
        assert cut.is_target.tolist() == [False] * 6 + [True] * 4
        assert (result.skipped, result.truncated) == ((), ("long",))

    def test_truncate_inside_an_earlier_answer(self, plain_tokenizer: Tokenizer) -> None:
        talk = conversation("q", "early", "r", "b")
        cut = tokenize_all([talk], plain_tokenizer, 9, "truncate").examples[0]
        assert plain_tokenizer.decode([int(t) for t in cut.tokens], False) == "rly</s>\nr\nb</s>"
        assert np.flatnonzero(cut.is_target).tolist() == [1, 2, 3, 7, 8]

    def test_truncate_never_cuts_the_answer(self, plain_tokenizer: Tokenizer) -> None:
        assert tokenize_all([self.long], plain_tokenizer, 5, "truncate").examples[0].targets == 4
        with pytest.raises(InputError, match=r"answer alone has 4 tokens .* at least 5"):
            tokenize_all([self.long], plain_tokenizer, 4, "truncate")
