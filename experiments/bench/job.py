"""The job: real examples from their text to the updated adapter.

This is the side of this library: tokenise, pack, transfer, the compiled train step with AdamW.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from experiments.bench.worker import Facts
from mos_jax.data.batches import Batch, make_batch
from mos_jax.data.load import Data
from mos_jax.data.packing import Row, lengths_of, plan_epoch
from mos_jax.data.tokens import tokenize_example
from mos_jax.errors import RunEnded
from mos_jax.training.config import RunConfig
from mos_jax.training.session import Session

PLANS = 5


def planned_steps(data: Data, seed: int, steps: int) -> list[list[Row]]:
    """The examples in each row of the first batches of a run, as indices into `data.train`."""
    source = data.source(seed)
    return [_rows(source[step]) for step in range(steps)]


def _rows(batch: Batch) -> list[Row]:
    # Every example has a target, and targets lie in the order of the examples.
    return [tuple(dict.fromkeys(row[row >= 0].tolist())) for row in batch.loss_examples]


class OurJob:
    """The side of MoS; see `worker.Side`."""

    def __init__(self, config: Mapping[str, Any], steps: int):
        self._session = Session.create(RunConfig.from_mapping(config))
        self._state, self._parts = self._session.initial()
        self._step = self._session.train_step()
        data, seed = self._session.data, self._session.config.training.seed
        self._plan = planned_steps(data, seed, steps)
        for step, rows in enumerate(self._plan):
            made, planned = self._batch(rows), data.source(seed)[step]
            # The numbering of examples starts anew in each batch that is made here.
            if not all(map(np.array_equal, made[:-1], planned[:-1])):
                raise RunEnded(f"batch {step} made from text is not that of the plan")

    def _batch(self, rows: list[Row]) -> Batch:
        data, tokenizer = self._session.data, self._session.base.tokenizer
        numbers = [index for row in rows for index in row]
        examples = [tokenize_example(data.train[index], tokenizer) for index in numbers]
        place = {index: here for here, index in enumerate(numbers)}
        there = [tuple(place[index] for index in row) for row in rows]
        return make_batch(examples, there, data.layout, data.pad)

    def _advance(self, rows: list[Row]) -> dict[str, jax.Array]:
        model = self._session.base.model
        self._state, metrics = self._step(self._state, self._parts, model, self._batch(rows))
        return metrics

    def prepare(self) -> dict[str, Facts]:
        """Compiles the step and takes it once, with the first batch."""
        start = time.perf_counter()
        loss = float(self._advance(self._plan[0])["loss"])
        seconds = time.perf_counter() - start
        layout, train = self._session.data.layout, self._session.data.tokens["train"].examples
        examples = [index for rows in self._plan for row in rows for index in row]
        own, _ = lengths_of([train[index] for index in examples], layout.prefix)
        room = len(self._plan) * layout.rows * layout.room
        facts = {
            "loss": loss,
            "start_seconds": seconds,
            "examples": len(examples),
            "steps": len(self._plan),
            "planning_seconds": self._planning_seconds() * len(examples) / len(train),
            "padding_share": 1 - int(own.sum()) / room,
            "batch": f"{layout.rows} packed rows of {layout.width}",
            "trained_parameters": self._session.adapter.count_trained(),
        }
        return {"mos": facts}

    def _planning_seconds(self) -> float:
        """What packing a whole epoch takes; a round is charged its share of examples."""
        data = self._session.data
        lengths, targets = lengths_of(data.tokens["train"].examples, data.layout.prefix)
        start = time.perf_counter()
        for epoch in range(PLANS):
            plan_epoch(lengths, targets, data.layout, 0, epoch)
        return (time.perf_counter() - start) / PLANS

    def run(self, contestant: str) -> float:
        """All steps of the plan, once."""
        start = time.perf_counter()
        for rows in self._plan:
            metrics = self._advance(rows)
        jax.block_until_ready((self._state, metrics))
        seconds = time.perf_counter() - start
        if self._step._cache_size() != 1:
            raise RunEnded("the train step was compiled more than once")
        return seconds
