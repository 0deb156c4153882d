"""A tokenizer as the files of a Hugging Face folder.

One that came from a folder is copied byte for byte. One that came from a GGUF file is written as
the `tokenizers` library describes it, with its special tokens and chat template.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mos_jax.errors import InputError
from mos_jax.models.tokenizer import Tokenizer

# What transformers reads a tokenizer from, beside tokenizer.json.
_COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)
GENERATION_FILE = "generation_config.json"


def tokenizer_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """Returns the tokenizer's files by name.

    Raises:
      InputError: if the folder it was read from has gone.
    """
    if tokenizer.folder is not None:
        folder = tokenizer.folder
        files = {name: _read(folder / name) for name in _COPIED if (folder / name).is_file()}
        if "tokenizer.json" not in files:
            raise InputError(f"{folder / 'tokenizer.json'}, which the base was read from, is gone")
        return files
    config: dict[str, Any] = {
        # Plain `tokenizers`: no class of a family, which would change how text is split.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "eos_token": tokenizer.token(tokenizer.end_of_turn),
        "pad_token": tokenizer.token(tokenizer.pad),
    }
    if tokenizer.bos is not None:
        config["bos_token"] = tokenizer.token(tokenizer.bos)
    if tokenizer.chat_template is not None:
        config["chat_template"] = tokenizer.chat_template
    return {
        "tokenizer.json": tokenizer.to_json().encode(),
        "tokenizer_config.json": to_json(config),
    }


def generation_file(tokenizer: Tokenizer) -> bytes:
    """Returns generation_config.json: that of the base's folder, or where a text ends."""
    if tokenizer.folder is not None and (tokenizer.folder / GENERATION_FILE).is_file():
        return _read(tokenizer.folder / GENERATION_FILE)
    return to_json(special_ids(tokenizer))


def special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """The ids of special tokens, as config.json and generation_config.json call them."""
    ids = {"eos_token_id": tokenizer.end_of_turn, "pad_token_id": tokenizer.pad}
    return ids if tokenizer.bos is None else {"bos_token_id": tokenizer.bos} | ids


def to_json(value: dict[str, Any]) -> bytes:
    """A JSON file of `value`."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}") from error
