"""Checkpoints of a run: adapter, optimiser, step, key and the loader's position, with Orbax."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

from mos_jax.adapters.adapter import Adapter
from mos_jax.adapters.storage import arrays_by_path, with_arrays
from mos_jax.errors import InputError, RunEnded
from mos_jax.training.config import CheckpointSection
from mos_jax.training.step import AdapterParts, TrainState


class Checkpoints:
    """Asynchronous checkpoints in a folder; a step's folder appears only when it is whole.

    Several processes that share a run write each checkpoint together, every one what its devices
    hold, so all must see the same folder.

    The whole adapter is saved, routing tables too, so that a resumed run goes on with the tables
    it began with, whatever a newer version would draw.
    """

    def __init__(self, folder: Path, config: CheckpointSection):
        self._folder = folder.absolute()
        self._manager = ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=config.keep, enable_async_checkpointing=True
            ),
        )

    @property
    def latest_step(self) -> int | None:
        """The newest whole checkpoint."""
        return self._manager.latest_step()

    def save(self, state: TrainState, parts: AdapterParts, loader: dict[str, Any]) -> None:
        """`save_tree` of a run's state, its whole adapter and its loader's position."""
        self.save_tree(int(state.step), state_as_tree(state, parts), loader)

    def restore(
        self, step: int, state: TrainState, adapter: Adapter
    ) -> tuple[TrainState, AdapterParts, dict[str, Any]]:
        """Restores the checkpoint of `step`.

        Args:
          step: a step with a checkpoint.
          state: a fresh state, for the structure.
          adapter: a fresh adapter of the same configuration, for the structure.

        Returns:
          The state, the adapter's parts, and the loader's position.

        Raises:
          InputError: if the checkpoint does not have this structure.
        """
        parts, _ = AdapterParts.split(adapter)
        tree, loader = self.restore_tree(step, state_as_target(state, parts))
        return *state_from_tree(tree, adapter), loader

    def save_tree(self, step: int, tree: Any, loader: dict[str, Any]) -> None:
        """Starts saving; arrays are copied before it returns, so they may be donated next.

        Args:
          step: its number; a step that is saved already is not saved again.
          tree: arrays.
          loader: JSON values: the position in the data.

        Raises:
          RunEnded: if this or an earlier asynchronous save failed, for example on a full disk.
        """
        if step == self._manager.latest_step():
            return
        with self._in_words(step):
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(tree), loader=ocp.args.JsonSave(loader)
                ),
            )

    def restore_tree(self, step: int, target: Any) -> tuple[Any, dict[str, Any]]:
        """Restores what `save_tree` saved as `step`, as `state_as_target` says.

        Raises:
          InputError: if the checkpoint does not have this structure.
        """
        try:
            found = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(target), loader=ocp.args.JsonRestore()
                ),
            )
        except (ValueError, KeyError, FileNotFoundError) as error:
            raise InputError(
                f"checkpoint {step} cannot be restored ({str(error).splitlines()[0]}); delete it "
                "to go on from an older one, or choose another --workdir"
            ) from error
        return found["state"], found["loader"]

    def wait(self) -> None:
        """Waits for the save under way. Raises RunEnded if it failed."""
        with self._in_words(None):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Frees the folder."""
        self._manager.close()

    @contextlib.contextmanager
    def _in_words(self, step: int | None) -> Iterator[None]:
        try:
            yield
        # TensorStore reports a failed write as ValueError, the rest of Orbax as OSError.
        except (OSError, ValueError) as error:
            latest = self._whole_step()
            kept = "no checkpoint is left" if latest is None else f"step {latest} is kept"
            what = (
                "a checkpoint" if step is None else f"a checkpoint, at the latest of step {step},"
            )
            raise RunEnded(
                f"{what} could not be written ({' '.join(str(error).split())[:300]}); {kept} in "
                f"{self._folder}. Free some space and run the same command again"
            ) from error

    def _whole_step(self) -> int | None:
        # Asked of the disk: the manager also counts a save that it believes under way.
        steps = (path.name for path in self._folder.iterdir())
        return max((int(name) for name in steps if name.isdigit()), default=None)


def state_as_tree(state: TrainState, parts: AdapterParts) -> dict[str, Any]:
    """What is saved of a run, or of stacked ones."""
    adapter = nnx.merge(parts.graphdef, state.trained, parts.frozen)
    return {
        "adapter": arrays_by_path(adapter),
        "optimizer": state.optimizer,
        "key": jax.random.key_data(state.key),
        "step": state.step,
    }


def state_as_target(state: TrainState, parts: AdapterParts) -> dict[str, Any]:
    """Where `state_as_tree` is restored to: the adapter to the host, the rest to where it lies."""
    tree = state_as_tree(state, parts)
    # Views of one number: placeholders that take no memory.
    on_host = {
        path: np.broadcast_to(np.zeros((), array.dtype), array.shape)
        for path, array in tree["adapter"].items()
    }
    return jax.tree.map(ocp.utils.to_shape_dtype_struct, tree) | {"adapter": on_host}


def state_from_tree(tree: dict[str, Any], adapter: Adapter) -> tuple[TrainState, AdapterParts]:
    """The inverse for one run; `adapter` gives the structure.

    Raises:
      InputError: if the arrays are not those of such an adapter, or not finite.
    """
    parts, trained = AdapterParts.split(with_arrays(adapter, tree["adapter"]))
    key = jax.random.wrap_key_data(tree["key"])
    return TrainState(jnp.asarray(tree["step"]), trained, tree["optimizer"], key), parts
