"""Ranks and alphas that differ by site: `rank_pattern` and `alpha_pattern`.

A pattern maps regular expressions to values. Its keys match modules as PEFT's do: a key belongs to
a site when it matches the end of its dotted name, `model.layers.3.self_attn.q_proj`, from a dot or
the beginning on; of several such keys the first counts; a site that none matches has the default.

The arrays of a site type are as wide as its largest rank. A block of a lower rank ends in rows that
are no part of the adapter: they are zeros, get no gradient and are not counted.

Axis legend: L blocks, r largest rank of a site type.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from mos_jax.adapters.low_rank import LowRank
from mos_jax.adapters.sites import Sites, compile_key, module_name
from mos_jax.adapters.strictness import strict
from mos_jax.errors import InputError, suggest

T = TypeVar("T")


class Pattern(Mapping[str, T]):
    """A mapping that can be hashed and cannot be changed; the order of its keys is part of it."""

    def __init__(self, items: Mapping[str, T] | None = None):
        self._items: dict[str, T] = dict(items or {})

    def __getitem__(self, key: str) -> T:
        """The value of the key `key` itself; what a site gets is `by_block`'s to say."""
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        """The keys, in order."""
        return iter(self._items)

    def __len__(self) -> int:
        """Number of keys."""
        return len(self._items)

    def __eq__(self, other: object) -> bool:
        """Whether `other` is a mapping of the same values, in the same order."""
        return isinstance(other, Mapping) and [*self.items()] == [*other.items()]

    def __hash__(self) -> int:
        """Equal patterns have equal ones."""
        return hash(tuple(self._items.items()))

    def __repr__(self) -> str:
        """As the dict it is written as."""
        return repr(self._items)


NONE: Pattern[Any] = Pattern()


def make_pattern(value: Any, where: str) -> Pattern[Any]:
    """Returns `value`, a mapping, as a pattern, with its keys checked.

    Args:
      value: by regular expression, the value of the sites that it matches.
      where: what the pattern is called in messages.

    Raises:
      InputError: if it is no mapping, or a key is no regular expression.
    """
    if not isinstance(value, Mapping):
        raise InputError(
            f"{where} must map names or regular expressions to values, as in "
            f'{{"q_proj": 4}}, got {value!r}'
        )
    for key in value:
        if not isinstance(key, str) or not key:
            raise InputError(f"{where}: a key must be a string that is not empty, got {key!r}")
        compile_key(key, where)
    return Pattern(value)


def by_block(
    pattern: Mapping[str, T], default: T, sites: Sites, where: str
) -> dict[str, tuple[T, ...]]:
    """The value of every adapted block, in order, by site type.

    Args:
      pattern: values by key, as `make_pattern` gives them.
      default: value of the sites that no key matches.
      sites: the adapted sites, checked.
      where: what the pattern is called in messages.

    Raises:
      InputError: if a key matches none of the sites, with the candidates.
    """
    if not pattern:
        return {name: (default,) * site.num_layers for name, site in sites.items()}
    modules = {
        name: [module_name(name, block) for block in site.blocks] for name, site in sites.items()
    }
    expressions = {key: compile_key(key, where) for key in pattern}
    every = [module for own in modules.values() for module in own]
    for key, expression in expressions.items():
        if not any(map(expression.match, every)):
            raise InputError(
                f"{where}: {key!r} matches none of the adapted sites; "
                f"{suggest(key, [*sites] if '.' not in key else every)}"
            )

    def value(module: str) -> T:
        matching = (key for key, expression in expressions.items() if expression.match(module))
        key = next(matching, None)
        return default if key is None else pattern[key]

    return {name: tuple(map(value, own)) for name, own in modules.items()}


def differ(values: Sequence[Any]) -> bool:
    """Whether not all of `values` are the same."""
    return len(set(values)) > 1


def missing_rows(ranks: Sequence[int]) -> int:
    """How many rows the arrays of a site type have beyond the ranks of its blocks, over all."""
    return len(ranks) * max(ranks) - sum(ranks)


def row_mask(ranks: Sequence[int]) -> np.ndarray:
    """Which rows belong to a block: bool [L, r]."""
    return np.arange(max(ranks))[None, :] < np.asarray(ranks)[:, None]


@strict
def zero_tails(array: jax.Array, ranks: Sequence[int]) -> jax.Array:
    """`array` [L, r, ...] with zeros in the rows beyond each block's rank; itself if none are."""
    if not differ(ranks):
        return array
    mask = row_mask(ranks).reshape(len(ranks), max(ranks), *(1,) * (array.ndim - 2))
    return jnp.where(jnp.asarray(mask), array, jnp.zeros((), array.dtype))


@strict
def keep_ranks(factors: LowRank, ranks: Sequence[int], index: jax.Array | slice) -> LowRank:
    """The factors with zeros in the rows beyond each block's rank, whatever stands there.

    So these rows are never a part of the adapter, and no gradient reaches what they came from.

    Args:
      factors: of all blocks, a [L, r, h], or of one, a [r, h].
      ranks: of the L blocks; the largest is r.
      index: of the blocks among the L, as `choose_blocks` gives it.
    """
    if not differ(ranks):
        return factors
    mask = jnp.asarray(row_mask(ranks))[index][..., None]
    a, b = (jnp.where(mask, part, jnp.float32(0)) for part in (factors.a, factors.b))
    whole = isinstance(index, slice)
    return dataclasses.replace(factors, a=a, b=b, ranks=tuple(ranks) if whole else None)
