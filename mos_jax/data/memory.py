"""The memory probe: random keys and the random values that belong to them.

Nothing about a pair can be inferred, so what a trained model knows of the values sits in what was
trained, and the bits it knows can be counted. The sets are one and the same on purpose: the
probe measures recall, and recall of pairs that were never shown is nil. Every other task keeps its
sets apart.

A pair is bare token ids: no template, no end of turn. Keys stay apart even where the text of two
tokens does not, and the targets are exactly the tokens of the values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from mos_jax.data.config import MEMORY, DataConfig
from mos_jax.data.examples import SPLITS, Example, Scoring, TokenIds, question_and_answer
from mos_jax.data.tokens import Tokenizer
from mos_jax.errors import InputError, suggest

# Pairs in a row where data.sequence_length is left open. Attention grows with the width of a row,
# the overhead of many small products with their number; on 2 CPU cores 8 and 16 were cheapest.
_PAIRS_PER_ROW = 16
_BOUNDS: Mapping[str, tuple[int, int]] = {
    "pairs": (64, 4096),
    "key_tokens": (1, 16),
    "value_tokens": (1, 16),
}


@dataclass(frozen=True)
class MemoryOptions:
    """`data.task_options` of the memory probe; make them with `create`, which checks them.

    Attributes:
        pairs: N, from 64 to 4096.
        key_tokens: tokens of a key, from 1 to 16.
        value_tokens: tokens of a value, from 1 to 16.
    """

    pairs: int = 512
    key_tokens: int = 3
    value_tokens: int = 2

    @classmethod
    def create(cls, **options: Any) -> MemoryOptions:
        """Returns the checked options; those not given keep their defaults.

        Raises:
            InputError: an unknown option, or a value out of its range.
        """
        known = [f.name for f in fields(cls)]
        for name, value in options.items():
            if name not in known:
                raise InputError(
                    f"data.task_options.{name} is not an option of the task {MEMORY}; "
                    f"{suggest(name, known)}"
                )
            low, high = _BOUNDS[name]
            whole = isinstance(value, int) and not isinstance(value, bool)
            if not whole or not low <= value <= high:
                raise InputError(
                    f"data.task_options.{name} is {value!r}; it must be an integer from {low} to "
                    f"{high}"
                )
        return cls(**options)

    @property
    def tokens(self) -> int:
        """Tokens of a pair."""
        return self.key_tokens + self.value_tokens


@dataclass(frozen=True)
class MemoryTask:
    """Random pairs to be learnt by heart; the three sets hold the same pairs.

    Attributes:
        options: number and shape of the pairs.
        vocabulary: number of ids that every token was drawn from.
        train: all N pairs.
        validation: the first of them, all unless data.validation_examples asks for fewer.
        test: likewise.
    """

    options: MemoryOptions
    vocabulary: int
    train: tuple[Example, ...] = field(repr=False)
    validation: tuple[Example, ...] = field(repr=False)
    test: tuple[Example, ...] = field(repr=False)
    name: str = MEMORY
    scoring: Scoring = "exact"

    @property
    def dropped(self) -> Mapping[str, Mapping[str, int]]:
        """Nothing is left out; see `Task`."""
        return {split: {} for split in SPLITS}

    @property
    def bits_per_pair(self) -> float:
        """Bits that a value holds for one who knows its key and how it was drawn."""
        return self.options.value_tokens * math.log2(self.vocabulary)

    @property
    def row_width(self) -> int:
        """Tokens of a row that whole pairs fill to the last."""
        return _PAIRS_PER_ROW * self.options.tokens

    def figures(self) -> dict[str, int | float | str]:
        """Returns what a report says of the probe beyond what it says of every task."""
        return {
            "evaluated_on": "the training set, on purpose: this task measures recall",
            "pairs": self.options.pairs,
            "vocabulary": self.vocabulary,
            "bits_per_pair": self.bits_per_pair,
            "bits": self.options.pairs * self.bits_per_pair,
        }

    def score(self, example: Example, answer: str) -> float:
        """Returns 1.0 if `answer` is the text of the value, else 0.0.

        Ids decide wherever they are at hand (`evaluation.answers.teacher_forced`); tokens that are
        parts of one character may differ and still have equal texts.
        """
        return float(answer == example.answer)


def draw_pairs(options: MemoryOptions, vocabulary: Sequence[int], seed: int) -> list[TokenIds]:
    """Draws the pairs: tokens independent and uniform over `vocabulary`, keys distinct.

    Under one seed, fewer pairs are the first of more.

    Args:
        options: number and shape of the pairs.
        vocabulary: ids to draw from.
        seed: 0 or more.

    Raises:
        InputError: `vocabulary` is too small for as many distinct keys.
    """
    if len(vocabulary) ** options.key_tokens < options.pairs or len(vocabulary) < 2:
        raise InputError(
            f"data.task_options.pairs is {options.pairs}, but {len(vocabulary)} ordinary tokens "
            f"make only {len(vocabulary) ** options.key_tokens} keys of {options.key_tokens} "
            "tokens; ask for fewer pairs or longer keys"
        )
    # Raw words: NumPy keeps their stream fixed for good, that of a Generator's methods it may not.
    words = np.random.PCG64(np.random.SeedSequence([seed, *MEMORY.encode()]))
    pairs: dict[tuple[int, ...], TokenIds] = {}
    while len(pairs) < options.pairs:
        # The remainder favours some ids by less than one part in 2^46, far too little to matter.
        drawn = words.random_raw(options.tokens) % np.uint64(len(vocabulary))
        ids = tuple(int(vocabulary[int(i)]) for i in drawn)
        key = ids[: options.key_tokens]
        pairs.setdefault(key, TokenIds(key, ids[options.key_tokens :]))
    return list(pairs.values())


def _example(ids: TokenIds, index: int, tokenizer: Tokenizer) -> Example:
    """Returns the pair with texts to show: ids beside the key's text, which may say little."""
    key = f"{' '.join(map(str, ids.prompt))} {tokenizer.decode(ids.prompt)!r}"
    shown = question_and_answer(key, tokenizer.decode(ids.answer), f"pair:{index}")
    return Example(shown.messages, shown.id, ids)


def load_memory(config: DataConfig, tokenizer: Tokenizer) -> MemoryTask:
    """Draws the pairs of the memory probe from the ordinary tokens of `tokenizer`.

    Raises:
        InputError: an option is unknown or out of range, a set is to be larger than the pairs or
            the training set smaller, or a row shorter than a pair.
    """
    options = MemoryOptions.create(**config.task_options)
    if config.train_examples not in (None, options.pairs):
        raise InputError(
            f"data.train_examples is {config.train_examples}, but the task {MEMORY} trains on all "
            f"of its {options.pairs} pairs; set data.task_options.pairs instead and leave it out"
        )
    for split in ("validation", "test"):
        size = config.sizes[split]
        if size is not None and size > options.pairs:
            raise InputError(
                f"data.{split}_examples is {size}, but the task {MEMORY} has "
                f"{options.pairs} pairs, of which its sets are made; ask for at most as many"
            )
    if config.sequence_length is not None and config.sequence_length < options.tokens:
        raise InputError(
            f"data.sequence_length is {config.sequence_length}, but a pair has {options.tokens} "
            "tokens and is never cut; set it to at least as many, or leave it out"
        )
    vocabulary = tokenizer.ordinary_ids()
    drawn = draw_pairs(options, vocabulary, config.seed)
    pairs = tuple(_example(ids, index, tokenizer) for index, ids in enumerate(drawn))
    return MemoryTask(
        options,
        len(vocabulary),
        pairs,
        pairs[: config.validation_examples],
        pairs[: config.test_examples],
    )
