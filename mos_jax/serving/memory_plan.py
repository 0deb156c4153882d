"""What a server will hold in memory, from shapes alone, before any of it is allocated."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import jax

from mos_jax.errors import InputError
from mos_jax.models.config import DecoderConfig
from mos_jax.serving.capacity import base_bytes, cache_bytes, in_gib
from mos_jax.serving.engine_options import EngineOptions
from mos_jax.serving.tenants import TenantBank

# Where Linux says how much a container may use.
_CGROUP = Path("/sys/fs/cgroup/memory.max")


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """Where the bytes of a server go.

    Attributes:
      slots: tenants on the device, of each slab.
      total: bytes that are allocated once, and never more.
      lines: the account, for people.
    """

    slots: int
    total: int
    lines: tuple[str, ...]


def device_memory() -> int:
    """Bytes of the default device; of a CPU, what this process may use of the machine's."""
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        stats = device.memory_stats() or {}
        if "bytes_limit" in stats:
            return int(stats["bytes_limit"])
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if _CGROUP.is_file() and (limit := _CGROUP.read_text().strip()).isdecimal():
        total = min(total, int(limit))
    return total


def plan_memory(
    config: DecoderConfig,
    dtype: str,
    quantize: str | None,
    bank: TenantBank,
    options: EngineOptions,
    *,
    memory: int,
    reserve: float,
    slots: int | None = None,
) -> MemoryPlan:
    """The account of a server, which fits into its memory.

    Args:
      config: of the base.
      dtype: of the base's weights and of the key-value cache.
      quantize: how the sites' weights are held.
      bank: with its tenants registered, not open yet.
      options: of the engine.
      memory: bytes there are.
      reserve: share of them that is left for programs, activations and fragments.
      slots: tenants on the device, of each slab; None is as many as there are tenants, at least
        one a row, or as many as fit.

    Raises:
      InputError: if it does not fit, with the account and what would help.
    """
    if not 0 <= reserve < 1:
        raise InputError(f"reserve must be from 0 to below 1, got {reserve!r}")
    positions = -(-options.length // max(options.pieces)) * max(options.pieces)
    weights = base_bytes(config, dtype, quantize)
    rows = cache_bytes(config, options.rows, positions, dtype)
    kept = int(memory * reserve)
    # On a CPU, what a tenant's files are read into is of the same memory.
    host = bank.options.host_bytes if jax.default_backend() == "cpu" else 0
    once = bank.planned_bytes(1) - (each := bank.planned_bytes(2) - bank.planned_bytes(1))
    free = memory - weights - rows - options.prefix_bytes - kept - host - once
    chosen = slots
    if chosen is None:
        chosen = max(options.rows, len(bank))
        chosen = max(min(chosen, free // each), 1) if each else chosen
    total = memory - free - kept + chosen * each
    lines = [
        f"memory              {memory:>16,}  {in_gib(memory)}",
        f"- base              {weights:>16,}  {config.name} in {quantize or dtype}",
        f"- key-value cache   {rows:>16,}  {options.rows} rows x {positions} positions",
        f"- prefix cache      {options.prefix_bytes:>16,}  at most",
        f"- bank              {once + chosen * each:>16,}  {chosen} slots of {each:,} bytes in "
        f"all slabs, and {once:,} once",
        f"- tenants read      {host:>16,}  at most, in host memory",
        f"- reserve           {kept:>16,}  {reserve:.0%} for programs, activations, gaps",
        f"= left              {memory - kept - total:>16,}  {len(bank)} tenants are known",
    ]
    if memory - kept - total < 0:
        short = in_gib(total + kept - memory)
        raise InputError(
            f"{short} too little memory: base {in_gib(weights)}, key-value cache {in_gib(rows)}, "
            f"prefix cache {in_gib(options.prefix_bytes)}, bank {in_gib(once + chosen * each)}, "
            f"tenants read {in_gib(host)} and reserve {in_gib(kept)} of {in_gib(memory)}; take "
            "fewer rows or slots, a shorter length, bfloat16, or a quantised base"
        )
    return MemoryPlan(chosen, total, tuple(lines))
