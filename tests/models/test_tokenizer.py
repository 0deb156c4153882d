import json
import struct
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from mos_jax.errors import InputError
from mos_jax.models.gguf import open_gguf
from mos_jax.models.packaged import find_packaged_gguf
from mos_jax.models.tiny import tiny_config, tiny_weights
from mos_jax.models.tokenizer import CHATML, Tokenizer
from tests.models.fixtures_models import byte_alphabet, write_gguf

BYTES = Tokenizer.byte_level()
CONFIG = tiny_config()
TEXT = st.text(st.characters(exclude_categories=["Cs"]))
CHAT = [{"role": "user", "content": "Hi!"}, {"role": "assistant", "content": "Yes?"}]


@pytest.fixture(scope="module")
def smollm2():
    try:
        return Tokenizer.from_gguf(find_packaged_gguf())
    except InputError as error:
        pytest.skip(str(error))


@pytest.fixture
def gguf_file(tmp_path):
    def write(**options):
        path = tmp_path / "m.gguf"
        return write_gguf(path, CONFIG, tiny_weights(CONFIG), vocabulary=True, **options)

    return write


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "tokenizer.json").write_text(BYTES._backend.to_str())
    settings = {"eos_token": "<|im_end|>", "pad_token": {"content": "<|pad|>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "chat_template.jinja").write_text(CHATML)
    return tmp_path


def test_byte_level_ids_are_bytes():
    assert (BYTES.vocab_size, BYTES.end_of_turn, BYTES.pad, BYTES.bos) == (259, 258, 256, None)
    assert BYTES.encode("aé 1\n") == list("aé 1\n".encode())
    assert BYTES.encode("a<|im_end|>b") == [97, 258, 98]
    assert BYTES.encode("") == []
    assert all(BYTES.decode([byte]) == chr(byte) for byte in range(128))


@given(TEXT.filter(lambda text: "<|" not in text))  # special tokens become one id
def test_byte_level_round_trip(text):
    ids = BYTES.encode(text)
    assert ids == list(text.encode())
    assert BYTES.decode(ids, skip_special=False) == text


@given(st.text(st.characters(exclude_categories=["Cs", "Cc", "Cn"])))
def test_smollm2_round_trip(smollm2, text):
    assert smollm2.decode(smollm2.encode(text), skip_special=False) == text


def test_decode_of_special_unknown_and_foreign_ids():
    ids = np.array([257, 72, 105, 258, 300, 256], np.int32)
    assert BYTES.decode(ids) == "Hi"
    assert BYTES.decode(ids, skip_special=False) == "<|im_start|>Hi<|im_end|><|pad|>"
    assert BYTES.decode([0xFF]) == "\ufffd"
    for bad in (-1, 1 << 32):
        with pytest.raises(InputError, match=f"token id {bad}"):
            BYTES.decode([bad])


def test_ordinary_ids_are_all_but_the_special_ones(smollm2, folder):
    assert BYTES.ordinary_ids() == list(range(256))
    assert Tokenizer.from_folder(folder).ordinary_ids() == list(range(256))
    # The first 17 of SmolLM2's vocabulary are special, and no other.
    assert smollm2.ordinary_ids() == list(range(17, 49152))
    assert not {smollm2.end_of_turn, smollm2.pad, smollm2.bos} & set(smollm2.ordinary_ids())


def test_encode_refuses_what_is_not_text():
    bad_texts: list[Any] = ["a\ud800", None, 3, b"x"]
    for bad in bad_texts:
        with pytest.raises(InputError, match="cannot be encoded"):
            BYTES.encode(bad)


def test_smollm2(smollm2):
    assert (smollm2.vocab_size, smollm2.end_of_turn, smollm2.pad, smollm2.bos) == (49152, 2, 2, 1)
    assert smollm2.has_chat_template
    # Digits stand alone, so that spaces before a number do not attach to it.
    pieces = [smollm2.decode([token]) for token in smollm2.encode("a  12 345x")]
    assert pieces == ["a", "  ", "1", "2", " ", "3", "4", "5", "x"]
    assert smollm2.encode("<|im_start|>user\nHi<|im_end|>") == [1, 4093, 198, 26843, 2]


def test_smollm2_chat(smollm2):
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    turns = "<|im_start|>user\nHi!<|im_end|>\n<|im_start|>assistant\nYes?<|im_end|>\n"
    expected = f"<|im_start|>system\n{system}<|im_end|>\n{turns}"
    assert smollm2.render(CHAT) == expected
    assert smollm2.render(CHAT, add_generation_prompt=True) == expected + "<|im_start|>assistant\n"
    own = [{"role": "system", "content": "S"}, *CHAT]
    assert smollm2.render(own) == f"<|im_start|>system\nS<|im_end|>\n{turns}"
    assert smollm2.decode(smollm2.encode(expected), skip_special=False) == expected


def test_byte_level_chat():
    expected = "<|im_start|>user\nHi!<|im_end|>\n<|im_start|>assistant\nYes?<|im_end|>\n"
    assert BYTES.render(CHAT) == expected
    assert BYTES.render(CHAT[:0], True) == "<|im_start|>assistant\n"


def test_gguf_tokenizer_with_merges(gguf_file):
    path = gguf_file()
    tokenizer = Tokenizer.from_gguf(path)
    alphabet = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *byte_alphabet(), "hi"]
    assert tokenizer.vocab_size == 260
    assert tokenizer.encode("hih<|im_end|>") == [259, alphabet.index("h"), 2]
    assert (tokenizer.end_of_turn, tokenizer.pad, tokenizer.bos) == (2, 2, 1)
    assert tokenizer.render(CHAT) == BYTES.render(CHAT)
    again = Tokenizer.from_gguf(open_gguf(path))
    assert again.fingerprint() == tokenizer.fingerprint() != BYTES.fingerprint()
    assert len(tokenizer.fingerprint()) == 64


def test_gguf_tokenizer_refusals(gguf_file, tmp_path):
    with pytest.raises(InputError, match=r"tokenizer\.ggml\.pre = 'tekken'.*'qwen2'"):
        Tokenizer.from_gguf(gguf_file(pre="tekken"))
    with pytest.raises(InputError, match=r"tokenizer\.ggml\.model = None"):
        Tokenizer.from_gguf(write_gguf(tmp_path / "no.gguf", CONFIG, tiny_weights(CONFIG)))
    with pytest.raises(InputError, match="No such file"):
        Tokenizer.from_gguf(tmp_path / "absent.gguf")
    header = open_gguf(gguf_file())
    for key, value, message in (
        ("ggml.tokens", None, "ggml.tokens is missing"),
        ("ggml.merges", [3], "ggml.merges is missing or not a list of strings"),
        ("ggml.merges", ["hi"], "ggml.merges is damaged"),
        ("ggml.merges", ["h zz"], "ggml.merges is damaged"),
        ("ggml.token_type", [1], "one per token"),
        ("ggml.token_type", [6] * 260, "unsupported type 6"),
        ("ggml.tokens", ["a"] * 260, "has a token twice"),
        ("ggml.eos_token_id", None, "eos_token_id is missing"),
        ("ggml.eos_token_id", 260, "end_of_turn token 260"),
        ("ggml.bos_token_id", -1, "bos token -1"),
        ("chat_template", "{% for", "chat template is not valid"),
    ):
        fields = header.fields | {f"tokenizer.{key}": value}
        if value is None:
            del fields[f"tokenizer.{key}"]
        changed = type(header)(header.path, fields, header.tensors)
        with pytest.raises(InputError, match=message):
            Tokenizer.from_gguf(changed)


def test_cut_off_gguf(gguf_file):
    path = gguf_file()
    path.write_bytes(path.read_bytes()[:2000] + struct.pack("<Q", 1))
    with pytest.raises(InputError, match="not a whole GGUF file"):
        Tokenizer.from_gguf(path)


def test_folder(folder):
    tokenizer = Tokenizer.from_folder(folder)
    assert (tokenizer.end_of_turn, tokenizer.pad, tokenizer.bos) == (258, 256, None)
    assert tokenizer.encode("é<|im_end|>") == [195, 169, 258]
    assert tokenizer.render(CHAT) == BYTES.render(CHAT)
    first = tokenizer.fingerprint()
    assert Tokenizer.from_folder(folder).fingerprint() == first
    (folder / "chat_template.jinja").write_text("{{ eos_token }}{{ bos_token }}")
    changed = Tokenizer.from_folder(folder)
    assert changed.fingerprint() != first
    assert changed.render(CHAT) == "<|im_end|>"


def test_the_template_decides_what_ends_a_turn(folder):
    # As Gemma's and Qwen's files have it: what ends a text is not what ends a turn.
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|pad|>"}))
    assert Tokenizer.from_folder(folder).end_of_turn == 258
    turns = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + ' <|im_end|>' }}"
    for template, end in (
        (turns + "{% endfor %}", 258),
        (turns.replace(" <|im_end|>", "<|im_start|><|im_end|>") + "{% endfor %}", 257),
        (turns.replace("<|im_end|>", "the <|im_end|>") + "{% endfor %}", 256),
        ("{{ raise_exception('tools only') }}", 256),
    ):
        (folder / "chat_template.jinja").write_text(template)
        assert Tokenizer.from_folder(folder).end_of_turn == end
    (folder / "chat_template.jinja").unlink()
    assert Tokenizer.from_folder(folder).end_of_turn == 256


def test_text_start_is_what_the_post_processor_puts_first(folder):
    assert (BYTES.text_start, Tokenizer.from_folder(folder).text_start) == ("", "")
    content = json.loads((folder / "tokenizer.json").read_text())
    begin = {"id": "<|im_start|>", "ids": [257], "tokens": ["<|im_start|>"]}
    single = [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}]
    single += [{"Sequence": {"id": "A", "type_id": 0}}]
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [],
        "special_tokens": {"<|im_start|>": begin},
    }
    (folder / "tokenizer.json").write_text(json.dumps(content))
    assert Tokenizer.from_folder(folder).text_start == ""  # the files name no bos
    settings = {"eos_token": "<|im_end|>", "bos_token": "<|im_start|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.text_start == "<|im_start|>"
    assert tokenizer.encode("a") == [97]  # still, nothing is added
    assert tokenizer.encode(tokenizer.text_start + "a") == [257, 97]


def test_folder_ignores_truncation_and_padding(folder):
    content = json.loads((folder / "tokenizer.json").read_text())
    cut = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    content["truncation"] = cut
    (folder / "tokenizer.json").write_text(json.dumps(content))
    assert Tokenizer.from_folder(folder).encode("abcd") == [97, 98, 99, 100]


def test_folder_sources_of_the_end_of_turn_and_template(folder):
    settings = {"chat_template": [{"name": "default", "template": "D"}]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(InputError, match="names no token that ends a turn"):
        Tokenizer.from_folder(folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": [257, 258]}')
    tokenizer = Tokenizer.from_folder(folder)
    assert (tokenizer.end_of_turn, tokenizer.pad) == (257, 257)
    assert tokenizer.render(CHAT) == "D"
    settings = {"chat_template": [[], {"name": "default", "template": "D"}]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert Tokenizer.from_folder(folder).render(CHAT) == "D"
    (folder / "special_tokens_map.json").write_text('{"eos_token": "<|im_end|>"}')
    assert Tokenizer.from_folder(folder).end_of_turn == 258
    (folder / "special_tokens_map.json").write_text('{"eos_token": "<|none|>"}')
    with pytest.raises(InputError, match=r"eos_token '<\|none\|>' is not in tokenizer\.json"):
        Tokenizer.from_folder(folder)


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"version": "1.0"}'])
def test_damaged_folder(folder, content):
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(InputError, match="is not a tokenizer"):
        Tokenizer.from_folder(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"tokenizer\.model"):
        Tokenizer.from_folder(folder)


def with_template(folder, template):
    (folder / "chat_template.jinja").write_text(template)
    return Tokenizer.from_folder(folder)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ 'x' + messages[0]['absent'] }}", "absent"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages.append(1) }}", "messages"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
    ],
)
def test_template_failures(folder, template, message):
    with pytest.raises(InputError, match=message):
        with_template(folder, template).render(CHAT)


def test_template_features(folder):
    template = (
        "{%- for m in messages %}\n  {%- if loop.index > 1 %}\n    {%- break %}\n  {%- endif %}\n"
        "{% generation %}{{ m['content'] | tojson }}{% endgeneration %}{%- endfor %}"
        "{{ tools is none }}{{ strftime_now('%Y') | length }}"
    )
    chat = [{"role": "user", "content": "<é>"}, *CHAT]
    assert with_template(folder, template).render(chat) == '"<é>"True4'


def test_no_template(folder):
    (folder / "chat_template.jinja").unlink()
    tokenizer = Tokenizer.from_folder(folder)
    assert not tokenizer.has_chat_template
    with pytest.raises(InputError, match="no chat template"):
        tokenizer.render(CHAT)


def test_json_of_a_tokenizer_encodes_alike_and_a_folder_is_remembered(folder):
    again = tokenizers.Tokenizer.from_str(BYTES.to_json())
    text = "<|im_start|>user é\n<|im_end|>"
    assert again.encode(text).ids == BYTES.encode(text)
    assert (BYTES.token(258), BYTES.chat_template, BYTES.folder) == ("<|im_end|>", CHATML, None)
    assert Tokenizer.from_folder(folder).folder == folder


@pytest.mark.parametrize("name", ["tokenizer_config.json", "chat_template.jinja"])
def test_something_else_in_the_place_of_a_file_is_refused(folder, name):
    (folder / name).unlink(missing_ok=True)
    (folder / name).mkdir()
    with pytest.raises(InputError, match=f"{name}: it is a folder"):
        Tokenizer.from_folder(folder)
    (folder / name).rmdir()
    (folder / name).symlink_to("nowhere")
    with pytest.raises(InputError, match=f"cannot read .*{name}"):
        Tokenizer.from_folder(folder)
