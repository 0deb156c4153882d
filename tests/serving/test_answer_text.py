import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mos_jax.models.tokenizer import Tokenizer
from mos_jax.serving.answer_text import CONTEXT, AnswerText, Characters, StopTexts
from tests.models.fixtures_sentencepiece import sentencepiece

BYTES = Tokenizer.byte_level()
SPACED = sentencepiece(ggml__add_space_prefix=True)
# Few letters, so that stop texts occur and overlap; a character of each length in UTF-8.
TEXTS = st.text(alphabet="aab\u00e9\u20ac\U0001f600", max_size=30)
# Parts of characters, so that many are broken off.
PARTS = list(b"a\xe2\x82\xac\xf0\x9f\x98\x80\xff")
BROKEN = st.lists(st.sampled_from(PARTS), max_size=8)
STOPS = st.lists(st.text(alphabet="ab\u20ac", min_size=1, max_size=4), max_size=4)


def in_pieces(tokens, stop=(), tokenizer=BYTES, prompt=()):
    """The pieces of an answer, up to where it stops."""
    text, pieces = AnswerText(tokenizer, stop, prompt), []
    for token in tokens:
        pieces.append(text.push(token))
        if text.stopped:
            break
    pieces.append(text.finish())
    return pieces, text.stopped


def cut(text, stops):
    """Where a text stops, by trying every place."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[: end - max(map(len, ending))], True
    return text, False


class TestCharacters:
    @settings(max_examples=200)
    @given(st.lists(st.integers(0, 258) | st.sampled_from(PARTS), max_size=40))
    def test_pieces_of_any_bytes_are_the_text(self, tokens):
        pieces, _ = in_pieces(tokens)
        assert "".join(pieces) == BYTES.decode(tokens)

    @given(TEXTS)
    def test_a_character_comes_with_its_last_byte(self, text):
        characters = Characters(BYTES)
        for character in text:
            *first, last = character.encode()
            assert [characters.push(byte) for byte in first] == [""] * len(first)
            assert characters.push(last) == character

    def test_bytes_that_are_never_a_character_do_not_pile_up(self):
        characters = Characters(BYTES)
        pieces = [characters.push(0x80) for _ in range(200)]
        assert "".join(pieces) + characters.finish() == "\ufffd" * 200
        assert len(characters._window) < 12
        assert all(pieces[10:])

    def test_the_window_is_short_however_long_the_answer(self):
        characters = Characters(BYTES)
        for _ in range(300):
            for byte in "a\u20ac".encode():
                characters.push(byte)
        assert len(characters._window) < 8

    @given(st.text(alphabet="thean \u00e9\u4f60\U0001f600", max_size=20), st.data())
    def test_an_answer_goes_on_where_the_prompt_ends(self, text, data):
        # This kind drops the space before the first word of a text, but not inside one.
        tokens = SPACED.encode(text)
        assert SPACED.decode(SPACED.encode("the")) == "the"
        split = data.draw(st.integers(0, len(tokens)))
        prompt = SPACED.decode(tokens[:split])
        if not prompt.endswith("\ufffd"):
            pieces, _ = in_pieces(tokens[split:], tokenizer=SPACED, prompt=tokens[:split])
            assert prompt + "".join(pieces) == SPACED.decode(tokens)

    @given(BROKEN, BROKEN)
    def test_the_prompt_leaves_no_trace_in_the_text(self, prompt, answer):
        # Not even where a character is half in the prompt and half in the answer.
        for end in range(max(0, len(prompt) - CONTEXT), len(prompt) + 1):
            pieces, _ = in_pieces(answer, prompt=prompt[:end])
            assert "".join(pieces) == BYTES.decode(answer)

    @settings(max_examples=200)
    @given(st.lists(BROKEN.map(bytes), max_size=20))
    def test_tokens_of_several_bytes_that_end_inside_characters(self, chunks):
        class Chunks:
            def decode(self, ids):
                return b"".join(chunks[index] for index in ids).decode("utf-8", "replace")

        pieces, _ = in_pieces(range(len(chunks)), tokenizer=Chunks())
        assert "".join(pieces) == b"".join(chunks).decode("utf-8", "replace")


class TestStopTexts:
    @settings(max_examples=300)
    @given(TEXTS, STOPS)
    def test_the_answer_ends_before_the_first_and_nothing_of_it_is_sent(self, text, stops):
        pieces, stopped = in_pieces(text.encode(), stops)
        assert ("".join(pieces), stopped) == cut(text, stops)

    @given(TEXTS, STOPS, st.data())
    def test_it_does_not_matter_how_the_text_comes(self, text, stops, data):
        ends = [*sorted(data.draw(st.sets(st.integers(0, len(text))))), len(text)]
        found, sent = StopTexts(stops), ""
        for start, end in zip([0, *ends], ends, strict=False):
            piece, stopped = found.push(text[start:end])
            sent += piece
            if stopped:
                break
        else:
            sent += found.finish()
        assert (sent, stopped) == cut(text, stops)

    @given(TEXTS, STOPS)
    def test_no_more_is_held_back_than_could_begin_one(self, text, stops):
        found, sent = StopTexts(stops), ""
        for end in range(1, len(text) + 1):
            piece, stopped = found.push(text[end - 1])
            if stopped:
                break
            sent += piece
            begun = [n for stop in stops for n in range(len(stop)) if text[:end].endswith(stop[:n])]
            assert len(sent) == end - max(begun, default=0)

    def test_one_may_end_with_a_character_that_never_was_finished(self):
        assert in_pieces([97, 0xE2], ["\ufffd"]) == (["a", "", ""], True)

    @pytest.mark.parametrize("stop", ["<|im_end|>", "end"])
    def test_special_tokens_have_no_text(self, stop):
        pieces, stopped = in_pieces([*b"a", 258, *b"b"], [stop])
        assert ("".join(pieces), stopped) == ("ab", False)
