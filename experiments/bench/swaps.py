"""What it takes to bring a tenant to the device, step by step, with no decoder beside it."""

from __future__ import annotations

import statistics
import threading
import time
from pathlib import Path
from typing import Any

import jax

from experiments.bench.worker import Facts
from mos_jax.adapters.bank import BASE_NAME
from mos_jax.models.base import load_base
from mos_jax.serving.options import BankOptions
from mos_jax.serving.tenants import TenantBank

SLOTS = 4


class Swaps:
    """Banks of few slots, through which more tenants go; see `worker.Side`.

    A contestant is a kind of tenant and where it comes from: "disk" each time, or "host" memory,
    where the bank keeps what it has read.
    """

    def __init__(self, base: str, folders: dict[str, str], count: int, dtype: str):
        """Registers `count` tenants of each kind in a bank for each contestant."""
        loaded = load_base(base, "float32")
        self._base, self._count = loaded, count
        self._banks: dict[str, TenantBank] = {}
        self._told: dict[str, dict[str, Any]] = {}
        self._names = [f"t{number:04d}" for number in range(count)]
        for kind in ("mos", "lora"):
            for place, host in (("disk", 0), ("host", 1 << 32)):
                options = BankOptions(slots=SLOTS, dtype=dtype, cached=SLOTS, host_bytes=host)
                bank = TenantBank(loaded, options)
                for name in self._names:
                    bank.register(name, Path(folders[kind], name))
                self._banks[f"{kind}, {place}"] = bank

    def prepare(self) -> dict[str, Facts]:
        """Compiles the writes, and reads all tenants once."""
        found = {}
        for name, bank in self._banks.items():
            bank.open()
            bank.warm_up()
            self.run(name)
            found[name] = {"known": self._count, "slots": SLOTS, "bank_bytes": bank.nbytes}
        return found

    def run(self, contestant: str) -> float:
        """Brings every tenant to the device once, each in the place of another."""
        bank, there = self._banks[contestant], threading.Event()
        bank.on_read(there.set)
        read, swapped = [], []
        start = time.perf_counter()
        for name in self._names:
            begin = time.perf_counter()
            there.clear()
            use = bank.request(name)
            there.wait(60.0)
            read.append(time.perf_counter() - begin)
            begin = time.perf_counter()
            bank.poll(timeout=1.0)
            assert use.ready
            jax.block_until_ready(jax.tree.leaves(bank.for_rows([name, BASE_NAME])))
            swapped.append(time.perf_counter() - begin)
            use.release()
        seconds = time.perf_counter() - start
        bank.on_read(None)
        self._told[contestant] = {
            # Read, checked and brought to the device in a thread beside the decoder; and what the
            # decoder waits for: the write into the slot, and the factors for its first row.
            "read": statistics.median(read),
            "swap": statistics.median(swapped),
            "swap_most": max(swapped),
            "swaps": self._count,
        }
        return seconds

    def told(self, contestant: str) -> Facts:
        """Of the last round."""
        return self._told[contestant]
