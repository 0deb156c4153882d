"""A finished adapter with its base: where evaluating, generating and exporting start from."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from mos_jax.adapters.adapter import Adapter
from mos_jax.adapters.low_rank import Factors, LowRank
from mos_jax.adapters.storage import (
    CARD_FILE,
    AdapterCard,
    load_adapter,
    make_card,
    read_card,
    save_adapter,
)
from mos_jax.data.config import DataConfig
from mos_jax.data.load import Data, load_data
from mos_jax.errors import InputError, suggest
from mos_jax.interop.as_lora import lora_from_factors
from mos_jax.interop.card import describe_card
from mos_jax.interop.check import largest_logit_difference, probe_tokens
from mos_jax.interop.peft import export_peft, read_peft_factors
from mos_jax.interop.peft_config import CONFIG_FILE as PEFT_CONFIG
from mos_jax.interop.peft_folder import ARRAYS_FILE
from mos_jax.interop.peft_import import import_peft, peft_facts
from mos_jax.interop.peft_native import export_native
from mos_jax.models.base import NAMED_BASES, Base, load_base
from mos_jax.models.quantized import SCHEMES

# Ways to store the weights of the base that an adapter is loaded with.
AS_TRAINED = "as_trained"
QUANTIZE = (AS_TRAINED, "none", *SCHEMES)


@dataclasses.dataclass(frozen=True)
class Exported:
    """What was written and how exact it is.

    Attributes:
      rank: largest rank of a site.
      bytes: size of the file of arrays.
      difference: largest difference of logits (nats) between the adapter and what was read back.
      tokens: how many tokens that was measured on.
    """

    rank: int
    bytes: int
    difference: float
    tokens: int


@dataclasses.dataclass(frozen=True)
class Finished:
    """A base, and on it an adapter loaded from disk or none.

    Attributes:
      base: the base.
      adapter: the adapter, or None.
      card: of the adapter.
      factors: its assembled factors, or None.
    """

    base: Base
    adapter: Adapter | None
    card: AdapterCard | None
    factors: Factors | None

    @property
    def note(self) -> str | None:
        """What to know of how base and adapter go together; None where nothing is to be said.

        An adapter whose card does not say how its base was held, such as an imported one, has none.
        """
        if self.card is None or "base" not in self.card.metadata.get("config", {}):
            return None
        trained, used = trained_quantization(self.card), self.base.quantization
        if trained == used:
            return None
        return (
            f"note: the adapter was trained on this base {_in_words(trained)} and is used on it "
            f"{_in_words(used)}; it corrects other rounding errors than the base has here"
        )

    @property
    def method(self) -> str:
        """Name of the adapter's method, or "base"."""
        return self.card.method if self.card is not None else "base"

    def data(self, task: str | None, split: str, examples: int | None) -> Data:
        """The data to evaluate on.

        Args:
          task: name of a task; None = what the adapter was trained for, with the same sets.
          split: the set that `examples` counts.
          examples: how many, None = as many as the adapter's run had.

        Raises:
          InputError: for an unknown task, or none known.
        """
        trained = {} if self.card is None else self.card.metadata.get("config", {}).get("data", {})
        fields: dict[str, Any] = dict(trained)
        if task is not None and task != fields.get("task"):
            fields = {"task": task}
        if "task" not in fields:
            raise InputError("--task is missing, and the adapter does not say what it is for")
        if examples is not None:
            fields[f"{split}_examples"] = examples
        return load_data(DataConfig.create(**fields), self.base.tokenizer)

    def export_peft(
        self,
        path: str | os.PathLike[str],
        overwrite: bool = False,
        pad_rank: int | None = None,
        allow_rounding: bool = False,
    ) -> Exported:
        """Writes the adapter as a PEFT LoRA folder, reads it back and compares the logits.

        Args:
          path: the folder.
          overwrite: replace a PEFT adapter that stands there.
          pad_rank: one rank and alpha for all sites, as vLLM needs it; see `export_peft`.
          allow_rounding: with `pad_rank`, also where B is rounded by it.

        Raises:
          InputError: if `path` exists and `overwrite` is not set, or for a `pad_rank` that cannot
            be had.
        """
        _, card, factors = self._loaded()
        export_peft(
            path,
            factors,
            base_name=self.base.name,
            num_layers=self.base.config.num_layers,
            card=describe_card(card),
            overwrite=overwrite,
            pad_rank=pad_rank,
            allow_rounding=allow_rounding,
        )
        return self._compared(path, read_peft_factors(path, self.base.sites))

    def export_native(self, path: str | os.PathLike[str], overwrite: bool = False) -> Exported:
        """Writes the adapter as PEFT's own type of its method, reads it back and compares.

        Raises:
          InputError: if PEFT has no such type, or `path` exists and `overwrite` is not set.
        """
        adapter, card, _ = self._loaded()
        export_native(
            path,
            adapter,
            base_name=self.base.name,
            num_layers=self.base.config.num_layers,
            card=describe_card(card),
            overwrite=overwrite,
        )
        return self._compared(path, import_peft(path, self.base).factors())

    def save(self, path: str | os.PathLike[str], overwrite: bool = False) -> Path:
        """Writes the adapter as one of mos_jax, with what its card says.

        Raises:
          InputError: if something stands at `path`, unless it is such an adapter and `overwrite`
            is set.
        """
        adapter, card, _ = self._loaded()
        if Path(path).exists() and not overwrite:
            raise InputError(f"{path} exists; choose another folder")
        return save_adapter(
            path,
            adapter,
            base_fingerprint=card.base_fingerprint or self.base.fingerprint,
            metadata=card.metadata,
        )

    def _loaded(self) -> tuple[Adapter, AdapterCard, Factors]:
        if self.adapter is None or self.card is None or self.factors is None:
            raise InputError("there is no adapter to export; give --adapter")
        return self.adapter, self.card, self.factors

    def _compared(self, path: str | os.PathLike[str], again: Mapping[str, LowRank]) -> Exported:
        _, _, factors = self._loaded()
        tokens = probe_tokens(self.base.config.vocab_size)
        difference = largest_logit_difference(self.base.model, tokens, factors, again)
        return Exported(
            max(factor.rank for factor in again.values()),
            (Path(path) / ARRAYS_FILE).stat().st_size,
            difference,
            tokens.size,
        )


def load_finished(
    adapter: str | os.PathLike[str] | None,
    base: str | Base | None = None,
    dtype: str = "float32",
    quantize: str = AS_TRAINED,
    as_lora: bool = False,
) -> Finished:
    """Loads an adapter and its base, checking that they belong together.

    Args:
      adapter: folder of the adapter, one of mos_jax or of PEFT; None for the base alone.
      base: name or path of the base, or the base itself, which is then taken as it is; None = the
        one the adapter was trained on.
      dtype: of the base.
      quantize: how the base's weights are stored, one of `QUANTIZE`: as in the training of the
        adapter, "none" for `dtype`, or a scheme.
      as_lora: whatever the adapter's method or type, make a LoRA of its factors.

    Raises:
      InputError: for a missing or damaged adapter, another base than it was trained on, or an
        unknown way to store it.
    """
    if quantize not in QUANTIZE:
        raise InputError(f"unknown quantize = {quantize!r}; {suggest(quantize, QUANTIZE)}")
    scheme = quantize if quantize in SCHEMES else None
    if not adapter:
        if not base:
            raise InputError("--adapter is missing; for example --adapter=runs/q/adapter")
        return Finished(_as_base(base, dtype, scheme), None, None, None)
    folder = Path(adapter)
    if (folder / PEFT_CONFIG).is_file() and not (folder / CARD_FILE).is_file():
        return _load_peft(folder, base, dtype, scheme, as_lora)
    card = read_card(adapter)
    name = base or card.metadata.get("base")
    if not name:
        raise InputError(f"{adapter} does not say which base it is for; give --base")
    if quantize == AS_TRAINED:
        scheme = trained_quantization(card)
    loaded = _as_base(name, dtype, scheme)
    module = load_adapter(adapter, sites=loaded.sites, base_fingerprint=loaded.fingerprint)
    if as_lora and card.method != "lora":
        module = lora_from_factors(module.factors(), loaded.sites)
        metadata = {"base": loaded.name, "converted": describe_card(card)}
        card = make_card(module, "", base_fingerprint=card.base_fingerprint, metadata=metadata)
    factors = jax.jit(lambda module: module.factors())(module)
    return Finished(loaded, module, card, factors)


def _as_base(base: str | Base, dtype: str, scheme: str | None) -> Base:
    return base if isinstance(base, Base) else load_base(base, dtype, quantize=scheme)


def _load_peft(
    folder: Path, base: str | Base | None, dtype: str, scheme: str | None, as_lora: bool
) -> Finished:
    facts = peft_facts(folder)
    wanted: str | Base | None = base or facts.get("base_model_name_or_path")
    if not wanted:
        raise InputError(f"{folder} does not say which base it is for; give --base")
    if not base and wanted not in NAMED_BASES and not Path(str(wanted)).exists():
        raise InputError(
            f"{folder} is for the base {wanted!r}, which is neither a known name nor a path here; "
            "give --base"
        )
    loaded = _as_base(wanted, dtype, scheme)
    module = import_peft(folder, loaded, as_lora=as_lora)
    factors = jax.jit(lambda module: module.factors())(module)
    metadata = {"base": loaded.name, "imported": facts}
    card = make_card(module, "", base_fingerprint=loaded.fingerprint, metadata=metadata)
    return Finished(loaded, module, card, factors)


def trained_quantization(card: AdapterCard) -> str | None:
    """How the weights of the base were stored while the adapter was trained: a scheme, or None."""
    section = card.metadata.get("config", {}).get("base", {})
    return section.get("quantize") if isinstance(section, Mapping) else None


def _in_words(scheme: str | None) -> str:
    return f"in {scheme}" if scheme else "without quantisation"
