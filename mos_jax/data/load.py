"""From a configuration to everything a run needs of its data."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from mos_jax.data.batches import Batch, evaluation_batches, packing_figures
from mos_jax.data.config import JSONL, MEMORY, DataConfig
from mos_jax.data.examples import SPLITS, Example, Task, commonest_answer
from mos_jax.data.gym import load_gym
from mos_jax.data.jsonl import load_jsonl
from mos_jax.data.loader import NO_END, BatchSource, Loader
from mos_jax.data.memory import MemoryTask, load_memory
from mos_jax.data.packing import Layout, choose_layout, shared_prefix, widen
from mos_jax.data.tokens import TokenExample, Tokenised, Tokenizer, tokenize_all
from mos_jax.errors import InputError

Report = dict[str, int | float | str]


@dataclass(frozen=True)
class Data:
    """The three sets of a task, as examples and as tokens.

    `train`, `validation` and `test` hold the examples that were kept; `tokens[split].examples`
    are the same ones in the same order as tokens.

    Attributes:
        config: what the data was loaded from.
        task: judges answers.
        train: examples to learn from.
        validation: examples for choices made during development.
        test: examples for the final figures.
        tokens: by split.
        layout: shapes of training batches.
        evaluation_layout: shapes of evaluation batches; those of training if everything fits.
        pad: the padding id.
    """

    config: DataConfig
    task: Task = field(repr=False)
    train: tuple[Example, ...] = field(repr=False)
    validation: tuple[Example, ...] = field(repr=False)
    test: tuple[Example, ...] = field(repr=False)
    tokens: dict[str, Tokenised] = field(repr=False)
    layout: Layout
    evaluation_layout: Layout
    pad: int

    def source(
        self,
        seed: int,
        accumulation: int = 1,
        steps: int = NO_END,
        rows: Sequence[int] | None = None,
    ) -> BatchSource:
        """Returns the training batches by step; the arguments are those of `BatchSource`."""
        train = self.tokens["train"].examples
        return BatchSource(train, self.layout, self.pad, seed, accumulation, steps, rows)

    def loader(
        self, seed: int, accumulation: int = 1, steps: int = NO_END, prefetch: int = 4
    ) -> Loader:
        """Returns the stream of training batches."""
        return Loader(self.source(seed, accumulation, steps), prefetch)

    def batches(self, split: str) -> list[Batch]:
        """Returns the evaluation batches of a split, in which each example occurs once.

        Rows of training examples are packed anew, in `evaluation_layout`.
        """
        return evaluation_batches(self.tokens[split].examples, self.evaluation_layout, self.pad)

    @cached_property
    def fingerprint(self) -> str:
        """Names the three sets: equal exactly when all their texts, or given ids, are equal."""
        digest = hashlib.blake2b(digest_size=16)
        for examples in (self.train, self.validation, self.test):
            digest.update(len(examples).to_bytes(8, "little"))
            for example in examples:
                answer = example.answer if example.ids is None else example.ids.answer
                digest.update(repr((example.question_key, answer)).encode())
        return digest.hexdigest()

    def report(self) -> Report:
        """Returns figures on the data, JSON-able; shares and rates are from 0 to 1.

        Of the memory probe also `pairs`, `bits` and what its sets are; see `MemoryTask.figures`.
        """
        report: Report = {"task": self.task.name, "scoring": self.task.scoring}
        if isinstance(self.task, MemoryTask):
            report |= self.task.figures()
        for split in SPLITS:
            tokenised = self.tokens[split]
            report[f"{split}_examples"] = len(tokenised.examples)
            for reason, count in sorted(self.task.dropped[split].items()):
                report[f"{split}_dropped_{reason}"] = count
            report[f"{split}_skipped_too_long"] = len(tokenised.skipped)
            report[f"{split}_truncated"] = len(tokenised.truncated)
        lengths = [example.length for example in self.tokens["train"].examples]
        answer, rate = commonest_answer(self.test)
        figures = packing_figures(self.tokens["train"].examples, self.layout, seed=0)
        return report | {
            "mean_tokens": sum(lengths) / len(lengths),
            "longest_tokens": max(lengths),
            "rows": self.layout.rows,
            "width": self.layout.width,
            "targets_per_row": self.layout.targets,
            "shared_prefix_tokens": len(self.layout.prefix),
            **figures._asdict(),
            "test_commonest_answer": answer,
            "test_commonest_answer_rate": rate,
            "fingerprint": self.fingerprint,
        }

    def summary(self) -> str:
        """Returns the report as text, one figure a line."""
        return "\n".join(
            f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}"
            for name, value in self.report().items()
        )


def load_task(config: DataConfig, tokenizer: Tokenizer | None = None) -> Task:
    """Returns the task of a configuration with its sets, not tokenised.

    Args:
        config: the configuration.
        tokenizer: from whose vocabulary the memory probe draws; no other task needs it.

    Raises:
        InputError: as `gym.load_gym`, `jsonl.load_jsonl` or `memory.load_memory`, or the memory
            probe is to be drawn without a tokenizer.
    """
    if config.task == MEMORY:
        if tokenizer is None:
            raise InputError(f"the task {MEMORY!r} draws token ids; give load_task the tokenizer")
        return load_memory(config, tokenizer)
    return load_jsonl(config) if config.task == JSONL else load_gym(config)


def _kept(examples: Sequence[Example], tokenised: Tokenised) -> tuple[Example, ...]:
    skipped = set(tokenised.skipped)
    return tuple(example for example in examples if example.id not in skipped)


def load_data(config: DataConfig, tokenizer: Tokenizer) -> Data:
    """Loads, checks and tokenises the three sets and chooses the shapes of batches.

    Raises:
        InputError: as `load_task`, `tokens.tokenize_all` or `packing.choose_layout`.
    """
    task = load_task(config, tokenizer)
    width = config.sequence_length
    if width is None and config.packing and isinstance(task, MemoryTask):
        width = task.row_width
    sets = {"train": task.train, "validation": task.validation, "test": task.test}
    tokens = {
        split: tokenize_all(examples, tokenizer, config.sequence_length, config.too_long)
        for split, examples in sets.items()
    }
    everything: list[TokenExample] = [e for t in tokens.values() for e in t.examples]
    prefix = shared_prefix(everything) if config.packing and config.share_prefix else ()
    layout = choose_layout(
        tokens["train"].examples,
        config.batch_size,
        width,
        config.packing,
        prefix=prefix,
    )
    return Data(
        config=config,
        task=task,
        train=_kept(task.train, tokens["train"]),
        validation=_kept(task.validation, tokens["validation"]),
        test=_kept(task.test, tokens["test"]),
        tokens=tokens,
        layout=layout,
        evaluation_layout=widen(layout, everything),
        pad=tokenizer.pad,
    )
