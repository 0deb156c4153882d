"""Several adapters from their folders on one base: to answer side by side, or to be combined."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

from mos_jax.adapters.bank import BASE_NAME, AdapterBank, check_name
from mos_jax.adapters.low_rank import LowRank
from mos_jax.errors import InputError
from mos_jax.finished import AS_TRAINED, load_finished
from mos_jax.interop.card import describe_card
from mos_jax.models.base import Base
from mos_jax.models.decoder import FactorsSource


@dataclasses.dataclass(frozen=True)
class Several:
    """A base and adapters for it.

    Attributes:
      base: the base.
      factors: those of each adapter, by its name; without adapters empty.
      notes: what to know of how they go together, one line each.
      cards: by name, how each came about, as JSON values; see `describe_card`.
    """

    base: Base
    factors: dict[str, Mapping[str, LowRank]]
    notes: tuple[str, ...]
    cards: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)

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
      adapters: of each, "FOLDER" or "NAME=FOLDER", as `load_finished` takes them. Without a name it
        has that of its method.
      base: name or path of the base; None = the one that the first adapter was trained on.
      dtype: of the base.
      quantize: of the base, see `load_finished`; "as_trained" is as the first adapter was.

    Raises:
      InputError: for no adapters and no base, two of one name, a missing or damaged adapter, or
        one for another base.
    """
    if not adapters:
        return Several(load_finished(None, base, dtype, quantize).base, {}, ())
    named = [_split(text) for text in adapters]
    _check_different([name for name, _ in named if name is not None])
    shared: Base | str | None = base
    loaded = []
    for _, folder in named:
        one = load_finished(folder, shared, dtype, quantize)
        loaded.append(one)
        shared = one.base
    names = [name or one.method for (name, _), one in zip(named, loaded, strict=True)]
    _check_different(names)
    found = dict(zip(names, loaded, strict=True))
    return Several(
        loaded[-1].base,
        {name: one.factors for name, one in found.items() if one.factors is not None},
        tuple(f"{name}: {one.note}" for name, one in found.items() if one.note),
        {name: describe_card(one.card) for name, one in found.items() if one.card is not None},
    )


def _check_different(names: list[str]) -> None:
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(
            f"two adapters are called {twice!r}; name each by itself: --adapter=NAME=FOLDER"
        )


def _split(text: str) -> tuple[str | None, str]:
    """The name, where one is given, and the folder."""
    name, equals, folder = text.partition("=")
    if not equals or os.sep in name:
        return None, text
    check_name(name)
    return name, folder
