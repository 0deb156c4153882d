"""What lies at a path: an adapter or a model, in which format.

Looks at names, magic numbers and small headers only, so it is cheap and safe for anything. A pickle
is refused by its name, without opening it; under another name by its first bytes.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mos_jax.adapters import storage
from mos_jax.errors import InputError, one_line
from mos_jax.interop.peft_config import CONFIG_FILE
from mos_jax.interop.peft_fields import KINDS
from mos_jax.interop.peft_folder import ARRAYS_FILE
from mos_jax.interop.peft_import import peft_facts
from mos_jax.models import gguf
from mos_jax.reading import missing_file, open_regular, pickle_message, refuse_pickle

OURS = "mos_jax adapter"
PEFT = {kind: f"PEFT {kind}" for kind in KINDS}
MODEL_FOLDER = "Hugging Face model folder"
GGUF_MODEL = "GGUF model"
GGUF_ADAPTER = "GGUF adapter"
FOUND = (OURS, *PEFT.values(), MODEL_FOLDER, GGUF_MODEL, GGUF_ADAPTER)

# A zip file, as torch.save writes since 1.6, and the start of a pickle of protocol 2 or later.
_PICKLE_MAGIC = (b"PK\x03\x04", *(b"\x80" + bytes([version]) for version in range(2, 6)))


@dataclasses.dataclass(frozen=True)
class Found:
    """What `detect` found.

    Attributes:
      path: where.
      kind: one of `FOUND`.
      description: one line for people.
      details: what its header or configuration says, JSON values by name; for the card of what is
        made of it.
    """

    path: Path
    kind: str
    description: str
    details: Mapping[str, Any]

    @property
    def is_adapter(self) -> bool:
        """Whether it is an adapter that `load_finished` can put on a base."""
        return self.kind == OURS or self.kind in PEFT.values()


def detect(path: str | os.PathLike[str]) -> Found:
    """Says what lies at `path`, a folder or a file.

    Raises:
      InputError: if nothing is there, for a pickle (with how to convert it), for a PEFT folder of a
        type or variant that is not read, by name, and for anything that is not known.
    """
    place = Path(path)
    if place.is_dir():
        return _detect_folder(place)
    if not place.is_file():
        raise InputError(f"there is neither a file nor a folder at {place}")
    return _detect_file(place)


def _detect_folder(folder: Path) -> Found:
    if (folder / storage.CARD_FILE).is_file():
        card = storage.read_card(folder)
        details = {
            "format": OURS,
            "method": card.method,
            **{f"{card.method}.{name}": value for name, value in card.config.items()},
            "sites": sorted(card.sites),
            "base": card.metadata.get("base"),
        }
        about = f"method {card.method} on {', '.join(card.sites)}"
        return Found(folder, OURS, _line(OURS, about, card.metadata.get("base")), details)
    if (folder / CONFIG_FILE).is_file():
        facts = peft_facts(folder)
        if not (folder / ARRAYS_FILE).is_file():
            raise missing_file(folder, f"{folder} has an {CONFIG_FILE} but no {ARRAYS_FILE}")
        targets = facts["target_modules"]
        about = f"rank {facts['rank']} on {targets if isinstance(targets, str) else _some(targets)}"
        base = facts.get("base_model_name_or_path")
        return Found(folder, facts["format"], _line(facts["format"], about, base), facts)
    if (folder / "config.json").is_file():
        if not any(folder.glob("*.safetensors")):
            message = f"{folder} has a config.json but no safetensors file beside it"
            raise missing_file(folder, message)
        return Found(folder, MODEL_FOLDER, f"{MODEL_FOLDER} {folder}", {"format": MODEL_FOLDER})
    names = ", ".join(sorted(entry.name for entry in folder.iterdir())[:5]) or "nothing"
    raise InputError(
        f"{folder} is no adapter and no model: it has none of {storage.CARD_FILE}, {CONFIG_FILE} "
        f"and config.json, but {names}"
    )


def _detect_file(file: Path) -> Found:
    refuse_pickle(file)
    with open_regular(file) as stream:
        magic = stream.read(4)
    if magic == b"GGUF":
        fields = gguf.open_gguf(file).fields
        kind = GGUF_ADAPTER if fields.get("general.type") == "adapter" else GGUF_MODEL
        details = {"format": kind}
        for key in ("general.architecture", "general.name", "adapter.type", "adapter.lora.alpha"):
            if key in fields:
                details[key] = fields[key]
        name = fields.get("general.name", file.name)
        about = f"{name}, architecture {fields.get('general.architecture', 'not named')}"
        return Found(file, kind, one_line(f"{kind}: {about}"), details)
    if magic.startswith(_PICKLE_MAGIC):
        raise InputError(pickle_message(file))
    if file.name in (storage.ARRAYS_FILE, storage.CARD_FILE, ARRAYS_FILE, CONFIG_FILE):
        raise InputError(f"{file} is one file of an adapter; give its folder, {file.parent}")
    raise InputError(
        f"{file} is neither a GGUF file nor a folder with an adapter or a model; known are: "
        f"{', '.join(FOUND)}"
    )


def _line(kind: str, about: str, base: Any) -> str:
    return one_line(f"{kind}: {about}{f', for the base {base}' if base else ''}")


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:7]) or "no module"
    return shown if len(names) <= 7 else f"{shown} and {len(names) - 7} more"
