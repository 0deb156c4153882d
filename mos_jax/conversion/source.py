"""What is to be converted: found, loaded onto its base, and described."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from mos_jax.adapters.low_rank import Factors
from mos_jax.adapters.storage import make_card
from mos_jax.errors import InputError, suggest
from mos_jax.finished import AS_TRAINED, Finished, load_finished
from mos_jax.interop.adapter_gguf import read_adapter_gguf
from mos_jax.interop.as_lora import lora_from_factors
from mos_jax.interop.card import describe_card
from mos_jax.interop.detect import GGUF_ADAPTER, GGUF_MODEL, MODEL_FOLDER, detect
from mos_jax.models.base import NAMED_BASES, Base

NAMED_BASE = "named base"


@dataclasses.dataclass(frozen=True)
class Source:
    """A base in float32 or quantised, and an adapter on it or none.

    Attributes:
      kind: what was found: one of `detect.FOUND`, or `NAMED_BASE`.
      path: where, or the base's name.
      finished: base and adapter; a GGUF adapter as a LoRA.
    """

    kind: str
    path: str
    finished: Finished

    @property
    def base(self) -> Base:
        """The base."""
        return self.finished.base

    @property
    def factors(self) -> Factors | None:
        """The factors of the adapter, or None."""
        return self.finished.factors

    @property
    def card(self) -> dict[str, Any]:
        """How the adapter came about, JSON values by name; nothing for a base alone."""
        return {} if self.finished.card is None else describe_card(self.finished.card)

    @property
    def bytes(self) -> int | None:
        """Size of the files that were read, or None for a base that is known by name."""
        place = Path(self.path)
        if self.kind == NAMED_BASE:
            return None
        files = [place] if place.is_file() else [p for p in place.iterdir() if p.is_file()]
        return sum(file.stat().st_size for file in files)

    def rows(self) -> list[tuple[str, str]]:
        """What was found, as lines of a table."""
        base, config = self.base, self.base.config
        size = "" if self.bytes is None else f", {self.bytes:,} bytes"
        stored = base.quantization or base.dtype
        rows = [
            ("input", f"{self.kind} {self.path}{size}"),
            (
                "base",
                f"{base.name}: {config.family}, {config.num_layers} layers, "
                f"{config.num_parameters:,} parameters, held in {stored}",
            ),
        ]
        adapter = self.finished.adapter
        if adapter is None or self.factors is None:
            return rows
        trained = sum(adapter.count_trained_by_site().values())
        rows.append(("method", f"{adapter.config.method}, {trained:,} trained parameters"))
        alike: dict[str, list[str]] = {}
        for name, factors in self.factors.items():
            ranks = sorted(set(factors.ranks or (factors.rank,)))
            layers = "all layers" if factors.layers is None else f"layers {list(factors.layers)}"
            alike.setdefault(f"rank {', '.join(map(str, ranks))}, {layers}", []).append(name)
        return rows + [("sites", f"{', '.join(names)}: {text}") for text, names in alike.items()]


def load_source(
    given: str | os.PathLike[str],
    base: str | None = None,
    quantize: str = AS_TRAINED,
    as_lora: bool = False,
) -> Source:
    """Finds out what `given` is and loads it.

    Args:
      given: the folder of an adapter of ours or of PEFT, an adapter or model in GGUF, a Hugging
        Face model folder, or a base known by name.
      base: name or path of the base that an adapter is for; None = the one that it names.
      quantize: how to hold the base's weights, as for `load_finished`.
      as_lora: whatever the method of an adapter, make a LoRA of its factors.

    Raises:
      InputError: if nothing that is known lies there, for a damaged file, a base that is missing
        or does not fit, or a `base` or `as_lora` beside a model.
    """
    name = os.fspath(given)
    if not os.path.exists(name):
        if name not in NAMED_BASES:
            raise InputError(
                f"--in={name} is neither a file, nor a folder, nor a known base; "
                f"{suggest(name, NAMED_BASES)}"
            )
        kind = NAMED_BASE
    else:
        found = detect(name)
        kind = found.kind
    if kind in (NAMED_BASE, MODEL_FOLDER, GGUF_MODEL):
        if base or as_lora:
            option = f"--base={base}" if base else "--as_lora"
            raise InputError(f"--in={name} is a base itself; leave {option} out")
        return Source(kind, name, load_finished(None, name, quantize=quantize))
    if kind != GGUF_ADAPTER:
        # Of a VB-LoRA without its logits there is nothing but the factors.
        as_lora = as_lora or bool(found.details.get("save_only_topk_weights"))
        return Source(kind, name, load_finished(name, base, quantize=quantize, as_lora=as_lora))
    if not base:
        raise InputError(f"{name} does not say which base it is for; give --base")
    loaded = load_finished(None, base, quantize=quantize).base
    factors = read_adapter_gguf(name, loaded.config)
    adapter = lora_from_factors(factors, loaded.sites)
    metadata = {"base": loaded.name, "imported": dict(found.details)}
    card = make_card(adapter, "", base_fingerprint=loaded.fingerprint, metadata=metadata)
    return Source(kind, name, Finished(loaded, adapter, card, factors))
