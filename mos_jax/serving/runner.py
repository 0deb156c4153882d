"""What a serving engine runs on the device: prompts in pieces, and one decode step for all rows.

A row is a place for one request: a part of the key-value cache, and an entry of every array of the
step. Rows may be of any tenants. All shapes are fixed, so that its thread compiles nothing after
`warm_up` (loading an adapter of a kind new to the bank may compile beside it, in the thread that
loads), and that the numbers of a row do not depend, to the bit, on who is in the others: a prompt
is cut into pieces that depend on it alone, each computed by itself, and the decode step computes
every row in the same way whatever the others hold.

Axis legend: B rows, S tokens of a piece, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mos_jax.adapters.bank import BASE_NAME
from mos_jax.errors import InputError
from mos_jax.models.base import Base
from mos_jax.models.choosing import Controls, choose, log_probabilities
from mos_jax.models.decoder import Decoder, FactorsSource
from mos_jax.models.kv_cache import Cache
from mos_jax.serving.compilations import Compilations
from mos_jax.serving.engine_options import EngineOptions
from mos_jax.serving.prefixes import Node, Prefixes
from mos_jax.serving.requests import MOST_TOP_LOGPROBS, TokenInfo, TokenSampling
from mos_jax.serving.tenants import TenantBank


class Step:
    """A decode step that was dispatched; the device may still be at it."""

    def __init__(self, rows: Sequence[tuple[int, int | None]], tokens: jax.Array, likely: Likely):
        """Of `rows`, their indices and how many alternatives they want (None: nothing)."""
        self._rows, self._tokens, self._likely = rows, tokens, likely

    def fetch(self) -> list[tuple[int, TokenInfo]]:
        """Waits for it. Returns the row and the token of each row that took part."""
        tokens = jax.device_get(self._tokens).tolist()
        if all(wanted is None for _, wanted in self._rows):
            return [(row, TokenInfo(tokens[row])) for row, _ in self._rows]
        own, ids, largest = jax.device_get(self._likely)
        found = []
        for row, wanted in self._rows:
            info = TokenInfo(tokens[row])
            if wanted is not None:
                top = dict(zip(ids[row, :wanted].tolist(), largest[row].tolist(), strict=False))
                info = TokenInfo(tokens[row], float(own[row]), top)
            found.append((row, info))
        return found


class Runner:
    """The rows of one base on the device. One thread calls it.

    A row goes through `start`, `prefill` until that says True, any number of `decode`, and `free`,
    which may come at any time. The tenant of a row is in use in the bank from before `start` until
    after `free`.

    Attributes:
      rows: B, how many rows there are.
      length: positions of a row, prompt and answer together.
    """

    def __init__(self, base: Base, bank: TenantBank, options: EngineOptions):
        """Allocates all that it will ever hold.

        Args:
          base: on one device.
          bank: of tenants of this base.
          options: sizes.

        Raises:
          InputError: for rows longer than the positions that the base knows, a base on a mesh, or
            a bank whose cache holds fewer tenants than there are rows, or `prefix_bytes` that
            hold no piece.
        """
        config = base.model.config
        if options.length > config.max_positions:
            raise InputError(
                f"length = {options.length} exceeds the {config.max_positions} positions of "
                f"{config.name}"
            )
        if base.model.mesh is not None:
            raise InputError("a runner takes a base on one device, this one lies on a mesh")
        if bank.options.assembly == "cached" and bank.options.cached < options.rows:
            raise InputError(
                f"BankOptions.cached = {bank.options.cached} must be at least the {options.rows} "
                "rows, whose tenants may all differ"
            )
        self.rows, self.length = options.rows, options.length
        self._model, self._bank, self._pieces = base.model, bank, options.pieces
        self._largest = max(options.pieces)
        # Pieces of the largest size follow one another from 0 on, so the last one ends in here.
        slots = -(-options.length // self._largest) * self._largest
        self._cache = base.model.empty_cache(options.rows, slots)
        self._current = jnp.zeros(options.rows, jnp.int32)
        self._prefixes: Prefixes | None = None
        if options.prefix_bytes:
            self._prefixes = Prefixes(base.model, self._largest, options.prefix_bytes)
        self._row: list[_Row | None] = [None] * options.rows
        self._compilations = Compilations()

    @property
    def nbytes(self) -> int:
        """Bytes that it holds on the device, base and bank aside; they never change."""
        own = sum(leaf.nbytes for leaf in jax.tree.leaves((self._cache, self._current)))
        return own + (self._prefixes.nbytes if self._prefixes is not None else 0)

    @property
    def compilations(self) -> int:
        """Programs compiled in the thread that called `warm_up`, then and since."""
        return self._compilations.count

    def warm_up(self) -> None:
        """Compiles every program that this thread will ever run, those of the bank included.

        Raises:
          InputError: if a row is taken.
        """
        if any(row is not None for row in self._row):
            raise InputError("warm_up comes before the first row is started")
        self._compilations.watch()
        self._bank.warm_up()
        for size in self._pieces:
            self._piece(0, 0, np.zeros(size, np.int32), BASE_NAME)
        if self._prefixes is not None:
            self._cache = self._prefixes.warm_up(self._cache)
        self.decode().fetch()

    def start(self, row: int, prompt: Sequence[int], tenant: str, sampling: TokenSampling) -> int:
        """Takes a free row for a request.

        Args:
          row: its index.
          prompt: token ids, from 1 to `length`.
          tenant: whose adapter the row uses, in use and ready; "__base__" for none.
          sampling: how tokens are chosen, with a seed.

        Returns:
          How many tokens of the prompt were found in the tenant's prefix cache.

        Raises:
          InputError: if the row is taken, or the prompt is empty, too long, or holds an id outside
            the vocabulary.
        """
        if self._row[row] is not None:
            raise InputError(f"row {row} is taken; free it first")
        tokens, vocabulary = np.asarray(prompt, np.int32), self._model.config.vocab_size
        if not 1 <= len(tokens) <= self.length:
            raise InputError(f"a prompt must have 1 to {self.length} tokens, got {len(tokens)}")
        if tokens.min() < 0 or tokens.max() >= vocabulary:
            raise InputError(f"the prompt holds a token id outside 0..{vocabulary - 1}")
        own = _Row(tokens, tenant, sampling)
        if self._prefixes is not None:
            registration = 0 if tenant == BASE_NAME else self._bank.registration(tenant)
            chain = self._prefixes.find(tenant, tokens[:-1], registration)
            self._cache = self._prefixes.restore(self._cache, row, chain)
            own.filled, own.piece = self._prefixes.size * (len(chain) - 1), chain[-1]
        self._row[row] = own
        return own.filled

    def prefill(self, row: int) -> bool:
        """Computes the next piece of a row's prompt.

        Returns:
          Whether the row takes part in `decode` from now on. The last token of a prompt is the
          first input of `decode`, so a prompt of one token has no piece.
        """
        own = self._of(row)
        left = len(own.prompt) - 1 - own.filled
        if left > 0:
            size = next((size for size in self._pieces if size >= left), self._pieces[-1])
            piece = np.zeros(size, np.int32)
            new = own.prompt[own.filled : min(own.filled + size, len(own.prompt) - 1)]
            piece[: len(new)] = new
            self._piece(row, own.filled, piece, own.tenant)
            if self._prefixes is not None and own.piece is not None and len(new) == self._largest:
                own.piece = self._prefixes.keep(
                    own.tenant, own.piece, new, self._cache, row, own.filled
                )
            own.filled += len(new)
        own.decoding = own.filled == len(own.prompt) - 1
        return own.decoding

    def decode(self) -> Step:
        """Dispatches one step of all rows that are past prefill, and does not wait for it.

        A row that is full takes no part.
        """
        taking, names = [], [BASE_NAME] * self.rows
        told = np.zeros((len(_TOLD), self.rows), np.int32)
        told[_POSITION], told[_GIVEN] = -1, -1
        for index, own in enumerate(self._row):
            if own is None:
                continue
            names[index] = own.tenant
            if own.decoding and own.filled < self.length:
                told[:, index] = own.told()
                own.filled += 1
                taking.append((index, own.sampling.logprobs))
        factors = self._bank.for_rows(names)
        self._current, likely, self._cache = _decode(
            self._model, self._cache, self._current, jax.device_put(told), factors
        )
        return Step(taking, self._current, likely)

    def free(self, row: int) -> None:
        """Gives a row back, at any time; what a step that was dispatched says of it is void."""
        self._row[row] = None

    def forget(self, tenant: str) -> None:
        """Drops what is kept of a tenant's prompts; it was unloaded or changed."""
        if self._prefixes is not None:
            self._prefixes.forget(tenant)

    def summary(self) -> dict[str, Any]:
        """Sizes and counts as JSON values."""
        return {
            "rows": self.rows,
            "length": self.length,
            "taken": sum(row is not None for row in self._row),
            "bytes": self.nbytes,
            "compilations": self.compilations,
            "prefixes": self._prefixes.summary() if self._prefixes is not None else None,
        }

    def _of(self, row: int) -> _Row:
        own = self._row[row]
        if own is None:
            raise InputError(f"row {row} is free; start it first")
        return own

    def _piece(self, row: int, start: int, piece: np.ndarray, tenant: str) -> None:
        factors = self._bank.for_rows([tenant])
        tokens, at = jax.device_put((piece[None], np.asarray([row, start], np.int32)))
        self._cache = _prefill(self._model, self._cache, tokens, at, factors)


@dataclasses.dataclass
class _Row:
    """A row that is taken.

    Attributes:
      prompt: int32.
      filled: tokens whose keys and values are in the cache, those of steps dispatched included.
      decoding: whether it is past prefill.
      piece: the last that is kept of the whole pieces so far; None where one of them is not.
    """

    prompt: np.ndarray
    tenant: str
    sampling: TokenSampling
    filled: int = 0
    decoding: bool = False
    piece: Node | None = None

    def told(self) -> np.ndarray:
        """What the next step is told about it: int32, in the order of `_TOLD`."""
        sampling = self.sampling
        first = self.filled == len(self.prompt) - 1
        return np.asarray(
            [
                self.filled,
                self.prompt[-1] if first else -1,
                _bits(np.uint32(sampling.seed or 0)),
                _bits(np.float32(sampling.temperature)),
                _bits(np.float32(sampling.top_p)),
                min(sampling.top_k, np.iinfo(np.int32).max),
                sampling.logprobs is not None,
            ],
            np.int32,
        )


# One array tells the step all about its rows, for each transfer costs as much as it does.
_TOLD = ("position", "given", "seed", "temperature", "top_p", "top_k", "logprobs")
_POSITION, _GIVEN = _TOLD.index("position"), _TOLD.index("given")
# Log-probabilities fp32 [B] of the tokens, ids int32 [B, n] of the likeliest, and theirs.
Likely = tuple[jax.Array, jax.Array, jax.Array]


def _bits(number: np.generic) -> np.int32:
    return number.view(np.int32)  # type: ignore[no-any-return]


@functools.partial(jax.jit, donate_argnames="cache")
def _prefill(
    model: Decoder, cache: Cache, tokens: jax.Array, at: jax.Array, factors: FactorsSource
) -> Cache:
    """Enters a piece, int32 [1, S], into the cache; `at` is its row and its first slot."""
    return model.extend(tokens, at[1:], cache, factors, row=at[0])[1]


@functools.partial(jax.jit, donate_argnames="cache")
def _decode(
    model: Decoder,
    cache: Cache,
    current: jax.Array,
    told: jax.Array,
    factors: FactorsSource,
) -> tuple[jax.Array, Likely, Cache]:
    """One token for every row: its id int32 [B], log-probabilities where asked, and the cache."""
    position, given, seed, temperature, top_p, top_k, asked = told
    active = position >= 0
    tokens = jnp.where(given >= 0, given, current)
    start = jnp.where(active, position, jnp.int32(cache.slots))  # others enter nothing
    hidden, cache = model.extend(tokens[:, None], start, cache, factors)
    logits = model.logits(hidden[:, 0])
    seed = jax.lax.bitcast_convert_type(seed, jnp.uint32)
    controls = Controls(
        jax.lax.bitcast_convert_type(temperature, jnp.float32),
        jax.lax.bitcast_convert_type(top_p, jnp.float32),
        top_k,
        jnp.stack([seed, jnp.zeros_like(seed)], axis=1),
    )
    chosen = choose(logits, position + 1, controls)
    count, rows = min(MOST_TOP_LOGPROBS, logits.shape[1]), logits.shape[0]
    likely = jax.lax.cond(
        jnp.any(asked > 0),
        lambda: log_probabilities(logits, chosen, count),
        lambda: (
            jnp.zeros(rows, jnp.float32),
            jnp.zeros((rows, count), jnp.int32),
            jnp.zeros((rows, count), jnp.float32),
        ),
    )
    return jnp.where(active, chosen, current), likely, cache
