"""Several adapters from their folders on one base: to answer side by side, or to be combined."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

from mos_jax.adapters.bank import BASE_NAME, AdapterBank, check_name
from mos_jax.adapters.low_rank import LowRank
from mos_jax.data import prompt_text
from mos_jax.errors import InputError
from mos_jax.finished import AS_TRAINED, load_finished
from mos_jax.interop.card import describe_card
from mos_jax.models.base import Base
from mos_jax.models.decoder import FactorsSource
from mos_jax.models.generation import Sampling, generate


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

    def ask(
        self,
        prompts: Sequence[str],
        names: Sequence[str] | None = None,
        *,
        system: str | None = None,
        raw: bool = False,
        sampling: Sampling | None = None,
    ) -> list[dict[str, str]]:
        """Puts each prompt to each adapter, all in one batch.

        Args:
          prompts: the user's turns.
          names: which adapters answer, "__base__" for the base alone; default: all adapters, or
            the base where there are none.
          system: a system turn before each prompt.
          raw: continue the prompts as they stand, without the base's chat template.
          sampling: default greedy, 64 tokens.

        Returns:
          For each prompt, the answers by name, in the order of `names`.
        """
        names = list(names if names is not None else self.factors or [BASE_NAME])
        tokenizer = self.base.tokenizer
        if raw:
            start = tokenizer.text_start
            texts = [text if text.startswith(start) else start + text for text in prompts]
        else:
            first = [] if system is None else [{"role": "system", "content": system}]
            turns = [[*first, {"role": "user", "content": text}] for text in prompts]
            texts = [prompt_text(messages, tokenizer) for messages in turns]
        rows = [ids for ids in map(tokenizer.encode, texts) for _ in names]
        factors = self.for_rows(names * len(texts))
        answers = generate(self.base.model, rows, [tokenizer.end_of_turn], sampling, factors)
        decoded = iter(map(tokenizer.decode, answers))
        return [{name: next(decoded) for name in names} for _ in texts]


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
