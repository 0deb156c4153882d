"""From a run's configuration to what is compiled, with everything that had to be assumed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

from mos_jax.data.config import JSONL
from mos_jax.data.load import load_data
from mos_jax.distributed.mesh import resolve_sizes
from mos_jax.distributed.partition import check_rows
from mos_jax.errors import InputError, suggest
from mos_jax.models.base import NAMED_BASES, outline_base
from mos_jax.models.config import DecoderConfig
from mos_jax.models.known import KNOWN_CONFIGS, find_known
from mos_jax.models.sharding import whole_attention
from mos_jax.models.tokenizer import Tokenizer
from mos_jax.planning.chips import Slice
from mos_jax.planning.request import Request
from mos_jax.training.config import RunConfig


def make_request(
    config: RunConfig,
    chips: Slice,
    mesh: Sequence[int] | None = None,
    targets: int | None = None,
) -> tuple[Request, list[str]]:
    """The request of a run on a slice, and in words what was assumed for it.

    Where base and data are there, their sizes are taken from them. A base that is not there is
    taken from the sizes of public models, if it is named after one; rows of data that are not
    there have `data.sequence_length` tokens, all of which may be targets.

    Args:
      config: the run.
      chips: where it would run.
      mesh: sizes of data, fsdp and tensor, -1 for what is left; default: the config's, or, if that
        is for one device, `spread`.
      targets: room for targets in a row, M; default: the data's.

    Raises:
      InputError: for a base that is neither there nor known, data without a length, a mesh that is
        not the slice's size, or a batch that it does not divide.
    """
    notes: list[str] = []
    model, tokenizer = _find_base(config, notes)
    width, room = _find_layout(config, tokenizer, notes)
    if targets is not None:
        if not 1 <= targets <= width:
            raise InputError(f"--targets must be from 1 to the {width} tokens of a row: {targets}")
        notes.append(f"{targets} targets a row, as asked")
        room = targets
    given = (config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    sizes = given if mesh is None else tuple(mesh)
    if mesh is None and sizes == (1, 1, 1):
        sizes = spread(config.data.batch_size, chips.count)
        if chips.count > 1:
            notes.append("a mesh with fsdp as far as the rows go, and tensor for the rest")
    placed = place_on(config, sizes, chips)
    whole = whole_attention(model, dataclasses.asdict(placed.mesh))
    if whole is not None:
        notes.append(whole)
    return Request(placed, model, width, room, chips.name), notes


def spread(rows: int, chips: int) -> tuple[int, int, int]:
    """A mesh for `chips` chips: fsdp as large as the rows allow, tensor for what is left.

    Every other mesh that these rows allow has a multiple of that tensor, so where it does not
    divide the heads of a model, none does.
    """
    fsdp = math.gcd(rows, chips)
    return 1, fsdp, chips // fsdp


def place_on(config: RunConfig, sizes: Sequence[int], chips: Slice) -> RunConfig:
    """The run on a mesh of these sizes, -1 resolved.

    Raises:
      InputError: if their product is not the number of chips, or the rows do not divide.
    """
    data, fsdp, tensor = sizes
    resolved = resolve_sizes(data, fsdp, tensor, chips.count)
    if math.prod(resolved.values()) != chips.count:
        raise InputError(
            f"a mesh of 1,1,1 uses one of the {chips.count} chips of {chips.name}; choose sizes "
            f"whose product is {chips.count}, or a topology of one chip"
        )
    check_rows(config.data.batch_size, resolved)
    return dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, **resolved))


def whole_numbers(flag: str, words: Sequence[str], count: int | None = None) -> list[int]:
    """The numbers of a flag. Raises InputError for other words, or if there are not `count`."""
    try:
        numbers = [int(word) for word in words]
    except ValueError:
        numbers = []
    if len(numbers) != len(words) or (count is not None and len(numbers) != count):
        raise InputError(
            f"{flag} must be {'' if count is None else f'{count} '}whole numbers with commas, got "
            f"{','.join(words)!r}"
        )
    return numbers


def _find_base(config: RunConfig, notes: list[str]) -> tuple[DecoderConfig, Tokenizer | None]:
    name = config.base.name
    if name in NAMED_BASES or Path(name).exists():
        base = outline_base(name, config.base.dtype, config.base.remat, config.base.quantize)
        return base.config, base.tokenizer
    known = find_known(name)
    if known is None:
        raise InputError(
            f"base {name!r} is neither there nor named after a public model; "
            f"{suggest(name, [*NAMED_BASES, *KNOWN_CONFIGS])}"
        )
    notes.append(f"{name} is not here; its sizes are those of {known.name}")
    return known, None


def _find_layout(
    config: RunConfig, tokenizer: Tokenizer | None, notes: list[str]
) -> tuple[int, int]:
    """Tokens and room for targets of a row."""
    data = config.data
    there = data.task != JSONL or Path(data.train_path or "").is_file()
    if tokenizer is not None and there:
        layout = load_data(data, tokenizer).layout
        return layout.width, layout.targets
    if data.sequence_length is None:
        raise InputError(
            "the data or its tokenizer is not here, so data.sequence_length must say how long rows "
            "are, such as --config.data.sequence_length=512"
        )
    width = data.sequence_length
    notes.append(
        f"the data is not here; rows have data.sequence_length {width} tokens, every one of which "
        "may be a target (--targets says otherwise)"
    )
    return width, width
