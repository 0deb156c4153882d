"""Several runs trained in one compiled step.

Runs that differ in seed, learning rate or routing seed alone share their base, so its weights meet
the tokens of all of them in one product. Each run ends as a folder of its own, as if it had been
trained alone; the state of the group is saved in one place until then.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import statistics
import time
from collections.abc import Collection, Sequence
from typing import Any

import jax
import numpy as np
from rich.console import Console

from mos_jax.data.batches import Batch
from mos_jax.errors import InputError
from mos_jax.evaluation.answers import Evaluation
from mos_jax.training.checkpoint import Checkpoints, state_as_target, state_as_tree
from mos_jax.training.config import RunConfig
from mos_jax.training.endings import DIVERGED_ADVICE, Diverged, disk_errors_in_words
from mos_jax.training.finish import Course, describe, finish, validate, validation_record
from mos_jax.training.loop import Loop, Pending, count_tokens, not_finite, say_changes
from mos_jax.training.metrics import Log, Reporter, RunLog, check_logging
from mos_jax.training.session import Loads
from mos_jax.training.stacking import Group, check_stackable, mark, silence, stack_batches
from mos_jax.training.workdir import WorkDir


def train_stacked(
    configs: Sequence[RunConfig],
    workdirs: Sequence[str | os.PathLike[str]],
    console: Console | None = None,
    loads: Loads | None = None,
    *,
    group: str | os.PathLike[str] | None = None,
) -> list[dict[str, Any] | Diverged]:
    """Trains runs that differ in `MAY_DIFFER` alone, all in one compiled step.

    Every run ends with the files of `train`, whose results it equals up to rounding, and is
    skipped when it is finished already. Only its checkpoints are missing: the group has them, and
    goes on from there after a kill. In the summary, `seconds` are a run's share of the group's
    training, and `stacked` tells how many took part and what their step took.

    Args:
      configs: of the runs.
      workdirs: their folders, in the same order.
      console: where progress goes.
      loads: shared by the runs of one process, so that they load base and data once.
      group: folder of the group's checkpoints, refused when it holds other runs; by default one
        in the first run's folder, named after the runs.

    Returns:
      The summaries, in the order of `configs`. A run that diverged has its `Diverged` there, which
      error.json in its folder repeats; it does not disturb the others.

    Raises:
      InputError: for runs that cannot be stacked, naming the field, or what `train` refuses;
        nothing is written then.
      Stopped: after a signal of `STOPPING`, with the state saved.
      RunEnded: if a checkpoint cannot be written; the last one stays.
    """
    console = console if console is not None else Console()
    check_stackable(configs)
    folders = _folders(configs, workdirs)
    changes = [
        folder.check_config(config.to_dict())
        for config, folder in zip(configs, folders, strict=True)
    ]
    steps, logging = configs[0].training.steps, configs[0].logging
    results: list[Any] = [folder.read_summary() for folder in folders]
    results = [s if s is not None and s["steps"] == steps else None for s in results]
    if None not in results:
        return results
    check_logging(logging)
    if logging.wandb_project:
        raise InputError(
            f"logging.wandb_project is {logging.wandb_project!r}, but stacked runs cannot log to "
            "Weights & Biases; leave the field empty, or train the runs one by one"
        )
    place = WorkDir(folders[0].path / _group_name(configs) if group is None else group)
    numbers = _members(place, configs, [i for i, found in enumerate(results) if found is None])
    team = Group.create([configs[i] for i in numbers], loads)
    theirs = [folders[i] for i in numbers]
    done = {n for n, i in enumerate(numbers) if results[i] is not None}
    with contextlib.ExitStack() as stack:
        stack.enter_context(disk_errors_in_words(place.path))
        for folder in (*theirs, place):
            stack.enter_context(folder.lock())
        say_changes(console, changes[numbers[0]], configs[0])
        checkpoints = Checkpoints(place.checkpoints, configs[0].checkpoint)
        stack.callback(checkpoints.close)
        run = StackedLoop(team, theirs, place, checkpoints, console, done)
        stack.callback(run.close)
        place.write_config({"runs": [mark(configs[i]) for i in numbers]})
        for number in run.live:
            theirs[number].write_config(configs[numbers[number]].to_dict())
            theirs[number].remove_outcome()
        for number, found in run.outcomes().items():
            results[numbers[number]] = found
    return results


def _folders(
    configs: Sequence[RunConfig], workdirs: Sequence[str | os.PathLike[str]]
) -> list[WorkDir]:
    folders = [WorkDir(path) for path in workdirs]
    if len(folders) != len(configs):
        raise InputError(f"{len(configs)} runs and {len(folders)} folders; give each run its own")
    paths = [folder.path.resolve() for folder in folders]
    for number, path in enumerate(paths):
        if path in paths[:number]:
            raise InputError(f"two runs share the folder {path}; give each its own")
    return folders


def _group_name(configs: Sequence[RunConfig]) -> str:
    # Another group that begins with the same run gets another folder.
    marks = json.dumps([mark(config) for config in configs])
    return f"stacked-{hashlib.blake2b(marks.encode(), digest_size=4).hexdigest()}"


def _members(place: WorkDir, configs: Sequence[RunConfig], unfinished: list[int]) -> list[int]:
    """Indices of the runs that the group in `place` holds, or of a new group: the unfinished.

    Raises:
      InputError: if `place` holds a group that lacks one of these or has others too.
    """
    stored = place.read_config()
    if stored is None:
        return unfinished
    marks = [mark(config) for config in configs]
    runs = stored.get("runs")
    if (
        not isinstance(runs, list)
        or any(run not in marks for run in runs)
        or any(marks[i] not in runs for i in unfinished)
    ):
        raise InputError(
            f"{place.path} holds {runs or 'something else than stacked runs'}, not the runs to "
            "train; give exactly those, or another folder for the group"
        )
    return [marks.index(run) for run in runs]


class StackedLoop(Loop):
    """One call of `train_stacked`, from the restored states to the summaries.

    Runs are numbered as in the group.

    Attributes:
      live: runs that neither diverged nor were finished before.
      failed: runs that diverged, with what there is to say.
    """

    def __init__(
        self,
        group: Group,
        folders: Sequence[WorkDir],
        place: WorkDir,
        checkpoints: Checkpoints,
        console: Console,
        done: Collection[int],
    ):
        first = group.sessions[0]
        super().__init__(first.config, first.base.model, place, checkpoints, console)
        self.group = group
        self.folders = folders
        self.validations: dict[int, Evaluation] = {}
        self.loaders = [
            session.data.loader(session.config.training.seed, self.config.training.accumulation)
            for session in group.sessions
        ]
        self.state, self.parts = group.initial()
        self.failed: dict[int, str] = {}
        if self.first:
            like = state_as_target(self.state, self.parts)
            tree, kept = checkpoints.restore_tree(self.first, like)
            self.state, self.parts = group.restore(tree)
            for loader, position in zip(self.loaders, kept["loaders"], strict=True):
                loader.set_state(position)
            self.failed = {int(number): words for number, words in kept["failed"].items()}
        self.live = [n for n in range(len(group)) if n not in self.failed and n not in done]
        self._logged = tuple(self.live)

    def close(self) -> None:
        """Stops making batches ahead."""
        for loader in self.loaders:
            loader.close()

    def logs(self) -> Sequence[Log]:
        """See base class."""
        return [
            RunLog(
                self.folders[number].path,
                self.config.logging,
                self.first,
                self.group.sessions[number].config.to_dict(),
            )
            for number in self._logged
        ]

    def next_batch(self) -> tuple[Batch, list[int]]:
        """See base class."""
        batches = [next(loader) for loader in self.loaders]
        return jax.device_put(stack_batches(batches)), [count_tokens(batch) for batch in batches]

    def train_step(self) -> jax.stages.Wrapped:
        """See base class."""
        return self.group.train_step()

    def report(self, reporter: Reporter, pending: Pending, evaluating: bool = False) -> None:
        """See base class; a run that diverged is left out from here on."""
        found = jax.device_get(pending.metrics)
        records: dict[int, dict[str, float]] = {}
        for number in list(self.live):
            own = {name: float(values[number]) for name, values in found.items()}
            if all(map(math.isfinite, own.values())):
                records[number] = own
            else:
                words = f"{not_finite(pending.step, own)}; stopped. {DIVERGED_ADVICE}"
                self._fail(number, words, reporter)
        seconds = self.clock.step()
        if evaluating:
            for number, record in records.items():
                adapter = self.group.adapter(number, self.state, self.parts)
                valid, samples = validate(self.group.sessions[number], adapter)
                self.validations[number] = valid
                record |= validation_record(valid)
                name = self.folders[number].path.name
                reporter.say(f"step {pending.step}: {name}: validation {describe(valid)}")
                for line in samples:
                    reporter.say(line)
            self.clock.restart()
        reporter.step(
            pending.step,
            [records.get(number) for number in self._logged],
            [pending.tokens[number] for number in self._logged],
            seconds,
        )

    def save(self, reporter: Reporter) -> None:
        """See base class."""
        self.state, finite = silence(self.state, self._mask())
        for number in [n for n in self.live if not finite[n]]:
            words = f"step {self.state.step[0]}: the adapter's values are not finite any more"
            self._fail(number, words, reporter)
            self.state, _ = silence(self.state, self._mask())
        kept = {
            "loaders": [loader.get_state() for loader in self.loaders],
            "failed": {str(number): words for number, words in self.failed.items()},
        }
        tree = state_as_tree(self.state, self.parts)
        self.checkpoints.save_tree(int(self.state.step[0]), tree, kept)

    def _mask(self) -> np.ndarray:
        return np.isin(np.arange(len(self.group)), list(self.failed))

    def _fail(self, number: int, words: str, reporter: Reporter) -> None:
        self.live.remove(number)
        self.failed[number] = words
        self.folders[number].write_error(Diverged(words))
        reporter.say(f"{self.folders[number].path.name}: {words}")

    @property
    def over(self) -> bool:
        """See base class: when no run is left."""
        return not self.live

    def outcomes(self) -> dict[int, dict[str, Any] | Diverged]:
        """Runs the remaining steps; returns what became of each run that was not finished."""
        if self.live:
            self.run()
        training = time.perf_counter() - self.clock.started
        count = len(self.group)
        steps = self.clock.steps
        facts = {
            # The memory and the time of a step are the group's, so no run's own.
            "compiled": {},
            "stacked": {
                "runs": count,
                "median_step": statistics.median(steps) if steps else None,
                **self.compiled,
            },
        }
        course = Course(self.clock, training, count, facts)
        found: dict[int, dict[str, Any] | Diverged] = {}
        for number, words in self.failed.items():
            self.folders[number].write_error(Diverged(words))
            found[number] = Diverged(words)
        for number in self.live:
            found[number] = finish(
                self.group.sessions[number],
                self.folders[number],
                self.group.adapter(number, self.state, self.parts),
                self.validations.get(number),
                course,
                self.console,
            )
        return found
