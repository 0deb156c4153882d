"""An accelerator beside the CPU of the same process: equal results, times, memory.

Axis legend: B rows, S tokens of a row, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import optax

from mos_jax.adapters.methods import create_adapter
from mos_jax.data.batches import Batch
from mos_jax.errors import InputError
from mos_jax.evaluation.loss import summed_loss
from mos_jax.models.base import Base
from mos_jax.models.decoder import Decoder
from mos_jax.models.generation import Sampling, generate
from mos_jax.training.config import RunConfig
from mos_jax.training.optimizer import make_optimizer
from mos_jax.training.session import Loads
from mos_jax.training.step import AdapterParts, initial_state, make_train_step

# Largest difference to the CPU in units of its largest number, by dtype of the base. In fp32 both
# sides multiply in full fp32; a bf16 base is compared with the same base on the CPU.
TOLERANCES = {"float32": 1e-3, "bfloat16": 5e-2}
STEPS, NEW_TOKENS = 3, 8


@dataclasses.dataclass(frozen=True)
class Compared:
    """One result on both devices.

    Attributes:
      name: what was computed.
      dtype: of the base.
      attention: implementation on the accelerator; the CPU's is always "grouped".
      difference: the largest, in units of the CPU's largest number; of decoded tokens, the share
        that differs.
      tolerance: that it is held to; None if it is only reported.
    """

    name: str
    dtype: str
    attention: str
    difference: float
    tolerance: float | None

    @property
    def within(self) -> bool:
        """Whether the difference is a number that keeps to the tolerance."""
        return self.tolerance is None or self.difference <= self.tolerance


@dataclasses.dataclass(frozen=True)
class Step:
    """An optimiser and the training step that uses it, to be compiled where it is called."""

    optimizer: optax.GradientTransformation
    train: jax.stages.Wrapped

    @classmethod
    def of(cls, config: RunConfig) -> Step:
        """Those of a run, on one device."""
        section = config.training
        optimizer = make_optimizer(section, config.adapter.rate_ratios())
        return cls(
            optimizer, make_train_step(optimizer, section.dropout, 1, None, section.assembly)
        )


def check_alone(config: RunConfig) -> None:
    """Raises InputError for what no step of one batch on one device has."""
    for name, value in (
        ("training.accumulation", config.training.accumulation),
        *((f"mesh.{axis}", getattr(config.mesh, axis)) for axis in ("data", "fsdp", "tensor")),
    ):
        if value != 1:
            raise InputError(
                f"{name} is {value}; one device is checked with a batch a step, which needs 1"
            )


def find_devices() -> tuple[jax.Device, jax.Device]:
    """JAX's first device and the CPU, which is the same where there is no accelerator.

    Raises:
      InputError: if JAX was told to leave the CPU out.
    """
    try:
        return jax.devices()[0], jax.devices("cpu")[0]
    except RuntimeError:
        raise InputError(
            "JAX has no CPU to compare with: unset JAX_PLATFORMS, or end it with ',cpu'"
        ) from None


def random_batch(vocabulary: int, rows: int, width: int) -> Batch:
    """Random tokens, every one but the last of a row a position with a target."""
    tokens = np.random.default_rng(0).integers(0, vocabulary, (rows, width), np.int32)
    columns = np.broadcast_to(np.arange(width, dtype=np.int32), tokens.shape)
    weights = np.ones(tokens.shape, np.float32)
    weights[:, -1] = 0
    ones = np.ones_like(tokens)
    targets = np.roll(tokens, -1, axis=1)
    return Batch(tokens, columns, ones, columns, targets, weights, np.zeros_like(tokens))


def filled_parts(config: RunConfig, base: Base) -> tuple[AdapterParts, Any]:
    """An adapter whose trained arrays are all random, so that every one gets a gradient."""
    sites = config.adapted(base.sites)
    parts, trained = AdapterParts.split(create_adapter(config.adapter, sites, jax.random.key(0)))
    rng = np.random.default_rng(1)
    return parts, jax.tree.map(
        lambda leaf: rng.normal(0, 0.02, leaf.shape).astype(np.float32), trained
    )


# Compiled once for each device, dtype and attention.
_factors = jax.jit(lambda parts, trained: parts.merge(trained).factors())
_logits = jax.jit(lambda model, tokens, factors: model(tokens, factors))


@jax.jit
@jax.value_and_grad
def _loss(trained: Any, parts: AdapterParts, model: Decoder, batch: Batch) -> jax.Array:
    total = summed_loss(model, parts.merge(trained).factors(), batch)
    return total / jax.numpy.sum(batch.loss_weights)


def results_on(
    device: jax.Device, model: Decoder, parts: AdapterParts, trained: Any, batch: Batch, step: Step
) -> dict[str, Any]:
    """Everything that is compared, computed on one device.

    Args:
      device: that computes.
      model: the base; it and all else is moved to the device.
      parts: of the adapter.
      trained: its trained arrays.
      batch: what it is trained on.
      step: optimiser and compiled step.

    Returns:
      `logits`, fp32 [B, S, V]; `loss` and `gradient` of the mean loss; `losses` of a few training
      steps and `moments`, AdamW's first ones after them; `decoded`, the new tokens of each row.
    """
    with jax.default_device(device), jax.default_matmul_precision("highest"):
        model, parts, trained, batch = jax.device_put((model, parts, trained, batch), device)
        factors = _factors(parts, trained)
        loss, gradient = _loss(trained, parts, model, batch)
        prompts = [row[:NEW_TOKENS].tolist() for row in np.asarray(batch.tokens)]
        sampling = Sampling.create(max_new_tokens=NEW_TOKENS)
        decoded = generate(model, prompts, (), sampling, factors)
        found = {"logits": _logits(model, batch.tokens, factors), "loss": loss}
        found = jax.device_get({**found, "gradient": gradient})
        # The step gives the arrays of its state away, so it starts from copies.
        trained = jax.tree.map(jax.numpy.copy, trained)
        state, losses = initial_state(trained, step.optimizer, jax.random.key(2)), []
        for _ in range(STEPS):
            state, metrics = step.train(state, parts, model, batch)
            losses.append(metrics["loss"])
        moments = optax.tree_utils.tree_get(state.optimizer, "mu")
        return {
            **found,
            **jax.device_get({"losses": losses, "moments": moments}),
            "decoded": decoded,
        }


def compare(config: RunConfig, device: jax.Device, cpu: jax.Device) -> list[Compared]:
    """Results on `device` beside those on the CPU, for a base in fp32 and one in bf16.

    The base is that of the config in all else. The accelerator runs "grouped" attention and that of
    the config, which in the dtype that is not the config's is "auto".

    Raises:
      InputError: if the base or the adapter is refused, or by `check_alone`.
    """
    check_alone(config)
    compared, step = [], Step.of(config)
    for dtype, tolerance in TOLERANCES.items():
        with jax.default_device(cpu):
            plain = _load(config, dtype, "grouped")
            parts, trained = filled_parts(config, plain)
        batch = random_batch(plain.config.vocab_size, 2, 32)
        wanted = results_on(cpu, plain.model, parts, trained, batch, step)
        chosen = config.base.attention if dtype == config.base.dtype else "auto"
        # On the CPU alone "auto" is "grouped", so that the same program runs twice.
        others = () if device == cpu and chosen == "auto" else (chosen,)
        for attention in dict.fromkeys(("grouped", *others)):
            with jax.default_device(cpu):
                base = _load(config, dtype, attention)
            got = results_on(device, base.model, parts, trained, batch, step)
            for name in ("logits", "loss", "gradient", "losses", "moments"):
                difference = _difference(got[name], wanted[name])
                compared.append(Compared(name, dtype, attention, difference, tolerance))
            pairs = [
                (a, b)
                for ours, theirs in zip(got["decoded"], wanted["decoded"], strict=True)
                for a, b in zip(ours, theirs, strict=True)
            ]
            share = sum(a != b for a, b in pairs) / len(pairs)
            # In bf16 near ties fall either way.
            exact = 0.0 if dtype == "float32" else None
            compared.append(Compared("decoded", dtype, attention, share, exact))
    return compared


def _load(config: RunConfig, dtype: str, attention: str) -> Base:
    return Loads().base(dataclasses.replace(config.base, dtype=dtype, attention=attention))


def _difference(got: Any, wanted: Any) -> float:
    ours, theirs = (
        np.concatenate([np.ravel(np.asarray(leaf, np.float64)) for leaf in jax.tree.leaves(tree)])
        for tree in (got, wanted)
    )
    return float(np.max(np.abs(ours - theirs)) / np.max(np.abs(theirs)))


def time_step(
    config: RunConfig, device: jax.Device, rows: int, width: int, rounds: int
) -> dict[str, Any]:
    """Times training steps of `rows` x `width` tokens on `device`, on the base of the config.

    Returns:
      `compile_seconds`; `seconds`, the median, least and largest of `rounds` steps after two that
      warm up, each waited for; `tokens_per_second` of the median; `temporary_bytes` of the
      compiled step; and `memory`, what the device says of its own, empty where it says nothing.

    Raises:
      InputError: if the base or the adapter is refused, or by `check_alone`.
    """
    check_alone(config)
    made = Step.of(config)
    with jax.default_device(device):
        base = Loads().base(config.base)
        parts, trained = filled_parts(config, base)
        batch = random_batch(base.config.vocab_size, rows, width)
        model, parts, trained, batch = jax.device_put((base.model, parts, trained, batch), device)
        state = initial_state(trained, made.optimizer, jax.random.key(2))
        start = time.perf_counter()
        compiled = made.train.lower(state, parts, model, batch).compile()
        compiling = time.perf_counter() - start
        seconds = []
        for number in range(rounds + 2):
            start = time.perf_counter()
            state, metrics = compiled(state, parts, model, batch)
            jax.block_until_ready((state, metrics))
            if number > 1:
                seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds)
    analysis: Any = compiled.memory_analysis()
    return {
        "compile_seconds": compiling,
        "seconds": {"median": median, "min": min(seconds), "max": max(seconds)},
        "tokens_per_second": rows * width / median,
        "temporary_bytes": analysis.temp_size_in_bytes,
        "memory": _memory(device),
    }


def _memory(device: jax.Device) -> Mapping[str, int]:
    stats = device.memory_stats() or {}
    wanted = ("bytes_in_use", "peak_bytes_in_use", "bytes_limit")
    return {name: stats[name] for name in wanted if name in stats}
