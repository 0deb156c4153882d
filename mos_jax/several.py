"""Several adapters from their folders on one base: to answer side by side, or to be combined."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from mos_jax.adapters.bank import BASE_NAME, AdapterBank, check_name
from mos_jax.adapters.low_rank import LowRank
from mos_jax.adapters.storage import CARD_FILE, read_card
from mos_jax.errors import InputError
from mos_jax.finished import AS_TRAINED, Finished, load_finished
from mos_jax.interop.peft_config import CONFIG_FILE
from mos_jax.interop.peft_fields import read_raw
from mos_jax.interop.peft_import import import_peft
from mos_jax.models.base import Base
from mos_jax.models.decoder import FactorsSource


@dataclasses.dataclass(frozen=True)
class Several:
    """A base and adapters for it.

    Attributes:
      base: the base.
      factors: those of each adapter, by its name; without adapters empty.
      notes: what to know of how they go together, one line each.
    """

    base: Base
    factors: dict[str, Mapping[str, LowRank]]
    notes: tuple[str, ...]

    def for_rows(self, names: Sequence[str]) -> FactorsSource:
        """Factors for a batch whose row i uses the adapter `names[i]`, "__base__" for none.

        Rows that all use the same need no bank.
        """
        if len(set(names)) > 1:
            return AdapterBank.holding(self.base.sites, self.factors).for_rows(names)
        return None if names[0] == BASE_NAME else self.factors[names[0]]


def load_several(
    adapters: Sequence[str],
    base: str | None = None,
    dtype: str = "float32",
    quantize: str = AS_TRAINED,
) -> Several:
    """Loads adapters and the base they share.

    Args:
      adapters: of each, "FOLDER" or "NAME=FOLDER", the folder of an adapter, ours or PEFT's.
        Without a name it has that of its method; for a PEFT folder "peft".
      base: name or path of the base; None = the one that the first adapter was trained on.
      dtype: of the base.
      quantize: of the base, see `load_finished`; "as_trained" is as the first adapter was.

    Raises:
      InputError: for no adapters and no base, two of one name, a missing or damaged adapter, or
        one for another base.
    """
    paths: dict[str, Path] = {}
    for text in adapters:
        name, path = _split(text)
        if name in paths:
            raise InputError(
                f"two adapters are called {name!r}, {paths[name]} and {path}; name them: "
                "--adapter=NAME=FOLDER"
            )
        paths[name] = path
    if not paths:
        return Several(load_finished(None, base, dtype, quantize).base, {}, ())
    shared: Base | str | None = base
    found: dict[str, Finished] = {}
    for name, path in paths.items():
        found[name] = _load(path, shared, dtype, quantize)
        shared = found[name].base
    return Several(
        found[name].base,
        {name: one.factors for name, one in found.items() if one.factors is not None},
        tuple(f"{name}: {one.note}" for name, one in found.items() if one.note),
    )


def _split(text: str) -> tuple[str, Path]:
    name, equals, path = text.partition("=")
    if equals and os.sep not in name:
        check_name(name)
        return name, Path(path)
    return "peft" if _is_peft(Path(text)) else read_card(text).method, Path(text)


def _is_peft(folder: Path) -> bool:
    return not (folder / CARD_FILE).is_file() and (folder / CONFIG_FILE).is_file()


def _load(folder: Path, base: Base | str | None, dtype: str, quantize: str) -> Finished:
    if not _is_peft(folder):
        return load_finished(folder, base, dtype, quantize)
    base = base or read_raw(folder).get("base_model_name_or_path")
    if not base:
        raise InputError(f"{folder} does not say which base it is for; give --base")
    loaded = load_finished(None, base, dtype, quantize).base
    # Only its factors count here, and as a LoRA every type has them.
    adapter = import_peft(folder, loaded, as_lora=True)
    return Finished(loaded, adapter, None, adapter.factors())
