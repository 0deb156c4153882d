import json
import os
import sys

import pytest

from mos_jax.adapters.sites import SiteShape
from mos_jax.adapters.storage import load_adapter
from mos_jax.errors import MAX_MESSAGE, InputError, naming
from mos_jax.interop.detect import detect
from mos_jax.interop.peft import read_peft_factors
from mos_jax.models import gguf, huggingface
from mos_jax.models.tiny import tiny_config
from mos_jax.models.tokenizer import Tokenizer
from mos_jax.reading import MAX_TEXT_BYTES, read_bytes, read_json


@pytest.fixture
def file(tmp_path):
    return tmp_path / "config.json"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "b": {"a": 1, "a": 2}}', "key 'a' occurs twice"),
        ("[" * 100_000, "not valid JSON"),
        ('{"a":' * 100_000, "not valid JSON"),
        ('{"a": 1' + "0" * 30 + "}", "1000000.* more than 64 bits"),
        ('{"a": ' + "9" * 9000 + "}", "more than 64 bits"),
        ('{"a": 18446744073709551616}', "more than 64 bits"),
        ('{"a": "\\ud800"}', "surrogates not allowed"),
        ("[]", "must hold a JSON object, not list"),
        ("\udcff", "is not UTF-8"),
        ("\ufeff{}", "not valid JSON"),
    ],
)
def test_ambiguous_json_is_refused(file, text, message):
    file.write_bytes(text.encode("utf-8", errors="surrogateescape"))
    with pytest.raises(InputError, match=message) as caught:
        read_json(file)
    assert str(file) in str(caught.value)


def test_sound_json_is_what_it_says(file):
    file.write_text('{"a": [18446744073709551615, -9223372036854775808], "b": "\\ud83d\\ude00"}')
    assert read_json(file) == {"a": [(1 << 64) - 1, -(1 << 63)], "b": "\U0001f600"}


def test_size_is_compared_before_anything_is_read(file):
    with file.open("wb") as stream:
        stream.truncate(1 << 40)  # a hole: nothing on the disk
    with pytest.raises(InputError, match=f"1099511627776 bytes; .* at most {MAX_TEXT_BYTES}"):
        read_json(file)


def test_what_is_no_regular_file(file):
    with pytest.raises(InputError, match="No such file"):
        read_bytes(file)
    os.mkfifo(file)
    with pytest.raises(InputError, match="no regular file"):
        read_bytes(file)
    file.unlink()
    file.symlink_to("/dev/zero")
    with pytest.raises(InputError, match="no regular file"):
        read_bytes(file)
    file.unlink()
    file.symlink_to(file.name)
    with pytest.raises(InputError, match="cannot read"):
        read_bytes(file)


def test_messages_are_one_readable_line():
    message = str(InputError("a\nb\x1b[31m\ud800" + "x" * 100_000 + "the end"))
    assert message.isprintable()
    assert message.startswith("a\\nb\\x1b[31m\\ud800xxx")
    assert message.endswith("the end")
    assert len(message) < MAX_MESSAGE


def test_the_file_is_named_once(file):
    for message in ("wrong", f"{file}: wrong"):
        with pytest.raises(InputError) as caught, naming(file):
            raise InputError(message)
        assert str(caught.value) == f"{file}: wrong"


# Audit hooks stay for good, so there is one for all tests.
_OPENED: list[str] = []
sys.addaudithook(lambda event, args: _OPENED.append(str(args[0])) if event == "open" else None)


_SITES = {"q_proj": SiteShape(1, 4, 4)}


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("pytorch_model.bin", lambda file: huggingface.read_weights(file.parent, tiny_config())),
        ("model.pt", gguf.read_config),
        ("model.bin", detect),
        ("model.ckpt", Tokenizer.from_gguf),
        ("adapter_model.bin", lambda file: read_peft_factors(file.parent, _SITES)),
        ("adapter_model.bin", lambda file: read_peft_factors(file, _SITES)),
        ("adapter.pth", load_adapter),
    ],
)
def test_a_pickle_is_never_opened_and_the_message_says_how_to_convert_it(tmp_path, name, read):
    pickled = tmp_path / name
    pickled.write_bytes(b"\x80\x04.")
    config = '{"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q_proj"]}'
    (tmp_path / "adapter_config.json").write_text(config)
    _OPENED.clear()
    with pytest.raises(InputError, match=rf"{name} is a pickle.*convert it to safetensors"):
        read(pickled)
    assert str(pickled) not in _OPENED
    assert pickled.read_bytes()
    assert str(pickled) in _OPENED  # the hook would have seen it


def test_a_tokenizer_without_a_longest_text_is_read(tmp_path):
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({"model_max_length": int(1e30)}))
    assert read_json(path) == {"model_max_length": int(1e30)}
