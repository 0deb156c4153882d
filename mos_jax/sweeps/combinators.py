"""Small generators of dotted overrides, to put the arms of a sweep together.

An item maps dotted names of config fields to values (`{"adapter.rank": 8}`); the reserved name
"arm" labels it. Every combinator takes and returns iterables of items:

    yield from product(
        [arm("mos", {"adapter.method": "mos", "adapter.equivalent_rank": 2, "adapter.rank": 8})],
        grid("adapter.shards_per_vector", [1, 2, 4], label="l={}"),
    )
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from mos_jax.errors import InputError

Item = Mapping[str, Any]
ARM = "arm"


def arm(name: str, overrides: Item | None = None, **more: Any) -> dict[str, Any]:
    """One item called `name`.

    Args:
      name: of the arm, as the report shows it.
      overrides: dotted names and values.
      **more: fields of the adapter, without their "adapter.".

    Raises:
      InputError: if a field is given twice.
    """
    return _merge([{ARM: name}, overrides or {}, {f"adapter.{k}": v for k, v in more.items()}])


def grid(field: str, values: Iterable[Any], label: str = "") -> Iterator[dict[str, Any]]:
    """One item for each value of one field.

    Args:
      field: dotted name.
      values: its values.
      label: names the arms, `{}` stands for the value; default: the field's last word, "rank={}".
    """
    pattern = label or field.rpartition(".")[2] + "={}"
    for value in values:
        yield {ARM: pattern.format(value), field: value}


def product(*parts: Iterable[Item]) -> Iterator[dict[str, Any]]:
    """Every combination of one item of each part; the labels are joined.

    Raises:
      InputError: if two parts set one field.
    """
    for items in itertools.product(*map(list, parts)):
        yield _merge(items)


def zipped(*parts: Iterable[Item]) -> Iterator[dict[str, Any]]:
    """The first items of all parts together, then the second ones, and so on.

    Raises:
      InputError: if the parts differ in length, or two set one field.
    """
    lists = [list(part) for part in parts]
    if len({len(items) for items in lists}) > 1:
        raise InputError(
            f"zipped parts must be equally long, got {', '.join(str(len(x)) for x in lists)} items"
        )
    for items in zip(*lists, strict=True):
        yield _merge(items)


def chain(*parts: Iterable[Item]) -> Iterator[dict[str, Any]]:
    """The items of the first part, then those of the second, and so on."""
    for part in parts:
        yield from map(dict, part)


def _merge(items: Iterable[Item]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    labels: list[str] = []
    for item in items:
        for field, value in item.items():
            if field == ARM:
                labels.append(str(value))
            elif field in merged:
                raise InputError(
                    f"a sweep item sets {field} twice, to {merged[field]!r} and to {value!r}"
                )
            else:
                merged[field] = value
    label = " ".join(label for label in labels if label)
    return {ARM: label, **merged} if label else merged
