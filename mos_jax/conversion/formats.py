"""The formats that an adapter or a base can be written in, each read back and compared.

An adapter is compared with itself: the base with the factors as they were loaded, and with those
that the new file gives. A merged model is compared with the base that has the adapter beside it.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

import mos_jax.interop.huggingface_out as model_folder
from mos_jax.adapters import storage
from mos_jax.adapters.low_rank import Factors
from mos_jax.conversion.source import Source
from mos_jax.errors import InputError, suggest
from mos_jax.interop.adapter_gguf import (
    check_adapter_destination,
    read_adapter_gguf,
    write_adapter_gguf,
)
from mos_jax.interop.check import (
    largest_difference,
    largest_logit_difference,
    probe_logits,
    probe_tokens,
)
from mos_jax.interop.detect import OURS
from mos_jax.interop.merged import merge
from mos_jax.interop.peft_folder import check_destination
from mos_jax.interop.safetensors_out import check_dtype
from mos_jax.models.base import DTYPES, load_base

MERGED = "merged"


@dataclasses.dataclass(frozen=True)
class Options:
    """How to write; what does not belong to the format must be left at its default.

    Attributes:
      dtype: of the tensors of a merged model: "float32", "bfloat16" or "float16".
      max_shard_bytes: largest file of a merged model.
      pad_rank: the one rank of a PEFT LoRA, for vLLM.
      allow_rounding: let `pad_rank` round B where scales differ.
      overwrite: replace what stands at the destination, if it is of the same format.
    """

    dtype: str | None = None
    max_shard_bytes: int = model_folder.MAX_SHARD_BYTES
    pad_rank: int | None = None
    allow_rounding: bool = False
    overwrite: bool = False


@dataclasses.dataclass(frozen=True)
class Converted:
    """What was written, or would be, and how exact it is.

    Attributes:
      path: where.
      files: bytes of each file by name.
      facts: what else is to be said, as lines of a table.
      differences: the largest difference of logits (nats) after a reload, by the dtype that was
        computed in; empty where nothing was read back.
      tokens: how many tokens that was measured on.
    """

    path: Path
    files: Mapping[str, int]
    facts: list[tuple[str, str]]
    differences: Mapping[str, float]
    tokens: int

    @property
    def difference(self) -> float:
        """The one in float32."""
        return self.differences["float32"]

    def rows(self) -> list[tuple[str, str]]:
        """What was written, as lines of a table."""
        rows = [(name, f"{size:,} bytes") for name, size in self.files.items()]
        rows += self.facts
        for dtype, difference in self.differences.items():
            rows.append(
                (
                    "largest logit difference",
                    f"{difference:.3g} over {self.tokens} tokens, computed in {dtype}",
                )
            )
        return rows


# What is to be said of an adapter that was written, and the largest difference of logits.
_Written = tuple[list[tuple[str, str]], float]


@dataclasses.dataclass(frozen=True)
class _Format:
    """One format: its options, what may be replaced, and how an adapter is written and compared."""

    options: tuple[str, ...]
    check: Callable[[Path, Source, bool], None]
    write: Callable[[Path, Source, Options], _Written] | None


def check_request(source: Source, out: str | os.PathLike[str], kind: str, options: Options) -> None:
    """Checks what can be checked before anything is written.

    Raises:
      InputError: for an unknown format, one that the input has no way to, an option that does not
        belong to it, or a destination that must not be replaced.
    """
    wanted = FORMATS[format_name(kind)]
    if source.factors is None and kind != MERGED:
        raise InputError(
            f"{source.path} is a base without an adapter; the only format for it is {MERGED!r}"
        )
    made = "converted" in (source.finished.card.metadata if source.finished.card else {})
    if kind == "mos_jax" and source.kind == OURS and not made:
        raise InputError(
            f"{source.path} is a mos_jax adapter already; choose another format, or --as_lora"
        )
    defaults = Options()
    for field in dataclasses.fields(Options):
        if field.name in (*wanted.options, "overwrite"):
            continue
        if getattr(options, field.name) != getattr(defaults, field.name):
            owners = [name for name, format_ in FORMATS.items() if field.name in format_.options]
            raise InputError(f"--{field.name} is for --format={', '.join(owners)}, not for {kind}")
    if options.allow_rounding and options.pad_rank is None:
        raise InputError("--allow_rounding is for --pad_rank; without it nothing is rounded")
    if options.dtype is not None:
        check_dtype(options.dtype)
    path = Path(out)
    for read, what in ((source.path, "the input"), (source.base.name, "its base")):
        # A folder is replaced with all that is in it.
        if Path(read).exists() and Path(read).resolve().is_relative_to(path.resolve()):
            where = "is" if Path(read).resolve() == path.resolve() else f"has {read} in it,"
            raise InputError(f"--out={path} {where} {what} itself; choose another place")
    wanted.check(path, source, options.overwrite)


def format_name(kind: str | None) -> str:
    """Returns `kind`. Raises InputError if it is no format."""
    if not kind:
        raise InputError(f"--format is missing; known: {', '.join(FORMATS)}")
    if kind not in FORMATS:
        raise InputError(f"unknown --format={kind}; {suggest(kind, FORMATS)}")
    return kind


def convert(
    source: Source,
    out: str | os.PathLike[str],
    kind: str,
    options: Options | None = None,
    *,
    dry_run: bool = False,
) -> Converted:
    """Writes a source in another format, reads it back and compares logits.

    Args:
      source: what `load_source` gives. With the format "merged", a source with an adapter is used
        up: its base's weights become the merged ones.
      out: file or folder to write.
      kind: name of the format, one of `FORMATS`.
      options: how to write.
      dry_run: write nothing at `out`. Adapters are written, read back and compared in a temporary
        folder; a model's files are worked out, and its merge is not tried.

    Raises:
      InputError: as `check_request` and as the writers do.
    """
    options, path = options or Options(), Path(out)
    check_request(source, out, kind, options)
    if kind == MERGED:
        return _plan_model(path, source, options) if dry_run else _model(path, source, options)
    if not dry_run:
        return _adapter(path, path, source, kind, options)
    with tempfile.TemporaryDirectory() as folder:
        return _adapter(path, Path(folder) / (path.name or "out"), source, kind, options)


def _adapter(path: Path, place: Path, source: Source, kind: str, options: Options) -> Converted:
    """Writes the adapter to `place`, of which is spoken as `path`."""
    write = FORMATS[kind].write
    assert write is not None
    facts, difference = write(place, source, options)
    tokens = probe_tokens(source.base.config.vocab_size).size
    return Converted(path, _sizes(place), facts, {source.base.dtype: difference}, tokens)


def _sizes(place: Path) -> dict[str, int]:
    if place.is_file():
        return {place.name: place.stat().st_size}
    return {file.name: file.stat().st_size for file in sorted(place.iterdir())}


def _write_peft(path: Path, source: Source, options: Options) -> _Written:
    exported = source.finished.export_peft(
        path, options.overwrite, options.pad_rank, options.allow_rounding
    )
    return [("rank", str(exported.rank))], exported.difference


def _write_native(path: Path, source: Source, options: Options) -> _Written:
    exported = source.finished.export_native(path, options.overwrite)
    return [("rank", str(exported.rank))], exported.difference


def _write_ours(path: Path, source: Source, options: Options) -> _Written:
    source.finished.save(path, options.overwrite)
    sites, fingerprint = source.base.sites, source.base.fingerprint
    again = storage.load_adapter(path, sites=sites, base_fingerprint=fingerprint)
    return [("method", again.config.method)], _compare(source, again.factors())


def _write_gguf(path: Path, source: Source, options: Options) -> _Written:
    assert source.factors is not None
    name = f"{source.finished.method} for {source.base.config.name}"
    written = write_adapter_gguf(
        path, source.factors, source.base.config, name=name, overwrite=options.overwrite
    )
    facts = [("alpha", f"{written.alpha:g}, {written.sites} sites, rank {written.rank}")]
    if written.folded:
        size = f"rounded by up to {written.rounding:.2g}" if written.rounding else "exactly"
        facts.append(("scales", f"{written.folded} sites have another scale, in their B, {size}"))
    return facts, _compare(source, read_adapter_gguf(path, source.base.config))


def _compare(source: Source, again: Factors) -> float:
    tokens = probe_tokens(source.base.config.vocab_size)
    return largest_logit_difference(source.base.model, tokens, source.factors, again)


def _check_ours(path: Path, _: Source, overwrite: bool) -> None:
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists; set --overwrite or choose another folder")


def _model_card(source: Source, dtype: str, facts: list[tuple[str, str]]) -> dict[str, Any]:
    if source.factors is None:
        return {"Source": {"read from": source.path, "kind": source.kind}}
    return {"Adapter": dict(source.card), "Merge": {"dtype": dtype, **dict(facts)}}


def _plan_model(path: Path, source: Source, options: Options) -> Converted:
    dtype = options.dtype or source.base.dtype
    plan = model_folder.plan_model(
        source.base,
        dtype=dtype,
        max_shard_bytes=options.max_shard_bytes,
        card=_model_card(source, dtype, []),
    )
    files = {name: sum(tensor.bytes for tensor in tensors) for name, tensors in plan.shards.items()}
    files |= {name: len(content) for name, content in plan.files.items()}
    return Converted(path, files, [("tensors", f"in {dtype}")], {}, 0)


def _model(path: Path, source: Source, options: Options) -> Converted:
    base, dtype, facts = source.base, options.dtype or source.base.dtype, []
    if base.quantization:
        facts.append(("base", f"turned from {base.quantization} into {dtype}"))
    before = probe_logits(base.model, source.factors)
    if source.factors is not None:
        # Merged into what is written where there is such a base; float16 is the writer's to round.
        merged = merge(
            base, source.factors, dtype=dtype if dtype in DTYPES else "float32", keep=False
        )
        base = merged.base
        if not np.isfinite(before).all():
            raise InputError(
                f"with the adapter {source.path} its base gives logits that are not finite, so "
                "that there is nothing to compare a merged model with; nothing was written"
            )
        lost = max(merged.lost.values())
        if lost:
            facts.append(("lost to rounding", f"{lost:.2g} of the change of a site, at most"))
    facts.append(("tensors", f"in {dtype}"))
    model_folder.write_model(
        path,
        base,
        dtype=dtype,
        max_shard_bytes=options.max_shard_bytes,
        card=_model_card(source, dtype, facts),
        overwrite=options.overwrite,
    )
    del base
    # In bfloat16 as well, where it is made for that: rounding in between weighs more than in the
    # weights themselves.
    differences = {
        computed: largest_difference(before, probe_logits(load_base(path, computed).model))
        for computed in ("float32", *(("bfloat16",) if dtype == "bfloat16" else ()))
    }
    return Converted(path, _sizes(path), facts, differences, before.shape[0] * before.shape[1])


FORMATS = {
    "peft": _Format(
        ("pad_rank", "allow_rounding"),
        lambda path, _, overwrite: check_destination(path, overwrite),
        _write_peft,
    ),
    "peft-native": _Format(
        (), lambda path, _, overwrite: check_destination(path, overwrite), _write_native
    ),
    "mos_jax": _Format((), _check_ours, _write_ours),
    "gguf": _Format(
        (), lambda path, _, overwrite: check_adapter_destination(path, overwrite), _write_gguf
    ),
    MERGED: _Format(
        ("dtype", "max_shard_bytes"),
        lambda path, source, overwrite: model_folder.check_model_destination(
            path, source.base, overwrite
        ),
        None,
    ),
}
