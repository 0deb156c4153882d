"""The stream of training batches, on grain.

The batch of a step is a pure function of the examples, the layout, the seed and the step, so the
position of the stream is one number, and a resumed run sees the batches it would have seen.
"""

from __future__ import annotations

import hashlib
import threading
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mos_jax.data.batches import Batch, make_batch
from mos_jax.data.packing import Layout, Row, lengths_of, plan_epoch
from mos_jax.data.tokens import TokenExample
from mos_jax.errors import InputError

NO_END = 2**31 - 1
_PLANS_KEPT = 4


class BatchSource:
    """Training batches by step, for random access from any number of threads.

    The rows of all epochs form one endless sequence, and step i takes its own stretch of it. A
    batch may thus begin in one epoch and end in the next: none is incomplete, and no example is
    lost. Reaching a step in epoch e plans the epochs before it once, a few milliseconds per
    thousand examples each.
    """

    def __init__(
        self,
        examples: Sequence[TokenExample],
        layout: Layout,
        pad: int,
        seed: int = 0,
        accumulation: int = 1,
        steps: int = NO_END,
        rows: Sequence[int] | None = None,
    ) -> None:
        """Makes the source.

        Args:
            examples: the training set, at least one, each fitting `layout`.
            layout: shapes of a batch.
            pad: the id where no token is.
            seed: of the order of training.
            accumulation: batches per step, A; above 1 they are stacked on a leading axis.
            steps: number of steps.
            rows: which rows of a batch are made, in order; None: all B. They are what they are in
                the whole batch, so processes that each make some make one batch together.

        Raises:
            InputError: there are no examples, `accumulation` or `steps` is below 1, or `seed`
                below 0.
        """
        if not examples:
            raise InputError("training batches of an empty set were asked for; give some examples")
        for name, value, least in (
            ("accumulation", accumulation, 1),
            ("steps", steps, 1),
            ("seed", seed, 0),
        ):
            if value < least:
                raise InputError(f"{name} is {value}; it must be at least {least}")
        self._examples = examples
        self._layout = layout
        self._pad = pad
        self._seed = seed
        self._accumulation = accumulation
        self._steps = steps
        self._rows = range(layout.rows) if rows is None else [int(row) for row in rows]
        self._lengths, self._targets = lengths_of(examples, layout.prefix)
        self._lock = threading.Lock()
        self._plans: dict[int, list[Row]] = {}
        # Entry e is the number of the first row of epoch e.
        self._starts = [0]

    def __len__(self) -> int:
        """Returns the number of steps."""
        return self._steps

    def __getitem__(self, step: int) -> Batch:
        """Returns the batch of `step`: [B, ...], or [A, B, ...] with accumulation.

        B is the number of rows that are made.

        Raises:
            IndexError: `step` is not in [0, len).
        """
        batch = make_batch(self._examples, self._rows_of(step, self._rows), self._layout, self._pad)
        if self._accumulation == 1:
            return batch
        shape = (self._accumulation, len(self._rows))
        return Batch._make(array.reshape(*shape, *array.shape[1:]) for array in batch)

    def count_tokens(self, step: int) -> int:
        """Returns the tokens of the whole batch of `step`, without padding.

        Raises:
            IndexError: `step` is not in [0, len).
        """
        rows = self._rows_of(step, range(self._layout.rows))
        own = sum(int(self._lengths[list(row)].sum()) for row in rows)
        return own + len(rows) * len(self._layout.prefix)

    def _rows_of(self, step: int, wanted: Sequence[int]) -> list[Row]:
        if not 0 <= step < self._steps:
            raise IndexError(f"step {step} is not in [0, {self._steps})")
        size, start = self._layout.rows, step * self._layout.rows * self._accumulation
        with self._lock:
            return [
                self._row(start + micro * size + row)
                for micro in range(self._accumulation)
                for row in wanted
            ]

    def epoch(self, step: int) -> int:
        """Returns the epoch in which `step` begins, from 0."""
        with self._lock:
            return self._epoch_of(step * self._layout.rows * self._accumulation)

    @property
    def fingerprint(self) -> str:
        """Names the stream: equal for two sources exactly when all their batches are equal."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update(repr((self._layout, self._pad, self._seed, self._accumulation)).encode())
        for example in self._examples:
            digest.update(example.length.to_bytes(8, "little"))
            digest.update(example.tokens.tobytes())
            digest.update(example.is_target.tobytes())
        return digest.hexdigest()

    def _plan(self, epoch: int) -> list[Row]:
        if epoch not in self._plans:
            plan = plan_epoch(self._lengths, self._targets, self._layout, self._seed, epoch)
            if epoch == len(self._starts) - 1:
                self._starts.append(self._starts[-1] + len(plan))
            while len(self._plans) >= _PLANS_KEPT:
                del self._plans[next(iter(self._plans))]
            self._plans[epoch] = plan
        return self._plans[epoch]

    def _epoch_of(self, number: int) -> int:
        while self._starts[-1] <= number:
            self._plan(len(self._starts) - 1)
        return bisect_right(self._starts, number) - 1

    def _row(self, number: int) -> Row:
        epoch = self._epoch_of(number)
        return self._plan(epoch)[number - self._starts[epoch]]


class Loader(Iterator[Batch]):
    """Iterates over the batches of a source from any step, made ahead in a thread.

    `get_state` and `set_state` carry the position; the state is a small JSON-able mapping.
    """

    def __init__(self, source: BatchSource, prefetch: int = 4) -> None:
        """Makes a loader that stands at step 0.

        Args:
            source: of the batches.
            prefetch: batches made ahead.

        Raises:
            InputError: `prefetch` is below 1.
        """
        # grain imports JAX, which has no place in programs that only look at data.
        import grain

        if prefetch < 1:
            raise InputError(f"prefetch is {prefetch}; it must be at least 1")
        self.source = source
        self._fingerprint = source.fingerprint
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=prefetch)
        self._iterator = iter(grain.MapDataset.source(source).to_iter_dataset(options))

    def __next__(self) -> Batch:
        """Returns the next batch.

        Raises:
            StopIteration: the source has no more steps.
        """
        return next(self._iterator)

    def get_state(self) -> dict[str, Any]:
        """Returns the position after the last batch that `next` returned."""
        return {"iterator": self._iterator.get_state(), "data": self._fingerprint}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes to the position that `get_state` returned, in this process or another.

        Raises:
            InputError: `state` is none of a loader, or is one of other batches.
        """
        if not isinstance(state, Mapping) or set(state) != {"iterator", "data"}:
            raise InputError(
                f"the loader's state is {state!r:.200}; it must be what get_state returned"
            )
        if state["data"] != self._fingerprint:
            raise InputError(
                "the position in the data is one of other batches: the examples, the tokenizer, "
                "the shape of batches, the seed or the accumulation have changed since it was "
                f"saved (data {state['data']}, now {self._fingerprint}); restore them, or start "
                "a new run"
            )
        self._iterator.set_state(state["iterator"])

    def close(self) -> None:
        """Stops making batches ahead."""
        self._iterator.close()
