"""Random load on an engine whose tenants' folders come, go and break while it serves."""

import dataclasses
import gc
import json
import os
import random
import shutil
import threading
import time
from pathlib import Path

import jax

from experiments.bench.tenant_folders import write_tenants
from mos_jax import InputError, LoRAConfig, MoSConfig, load_base
from mos_jax.serving.engine import Engine
from mos_jax.serving.engine_options import EngineOptions
from mos_jax.serving.options import BankOptions
from mos_jax.serving.requests import Refused, Request, TokenSampling
from mos_jax.serving.tenants import TenantBank
from tests.soak.cases import check_sampling_refusals, random_case
from tests.soak.ledger import Ledger

MOS = MoSConfig(equivalent_rank=2, rank=3, shards_per_vector=2, private_rank=1)
# Beside what the allocator keeps of what was freed.
GROWTH = 48 << 20
# The last step's tokens and controls, which are kept until the next.
SMALL = 1024
# Tokens of a request with a known answer: more than the largest piece, which alone is kept.
GOLDEN = 40


@dataclasses.dataclass
class Sample:
    """One look at the process.

    Attributes:
      seconds: since the start.
      resident: bytes of memory, as the system counts them.
      open: requests that have not ended.
      accepted: requests so far.
      on_device: tenants.
    """

    seconds: float
    resident: int
    open: int
    accepted: int
    on_device: int


def resident_bytes():
    """Of this process (Linux)."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def device_bytes():
    """Of all arrays that are alive on the device."""
    gc.collect()
    return sum(array.nbytes for array in jax.live_arrays())


def handles():
    """Threads, and open files."""
    return threading.active_count(), len(os.listdir("/proc/self/fd"))


class Tenants:
    """Folders of tenants, some of which are never touched and some of which are.

    Attributes:
      steady: names of those that stay as they are.
      shaky: names of those that are deleted, damaged, unloaded and loaded again.
    """

    def __init__(self, folder, base, count=12):
        self.folder = folder
        self.steady = write_tenants(folder, base, MOS, count, size=0.1, prefix="mos")
        self.steady += write_tenants(folder, base, LoRAConfig(rank=2), 4, size=0.1, prefix="lora")
        self._kept = folder.with_name(folder.name + "-kept")
        self.shaky = write_tenants(self._kept, base, MOS, 6, size=0.1, prefix="shaky")
        for name in self.shaky:
            self.restore(name)

    def restore(self, name):
        """Puts the folder as it was."""
        shutil.rmtree(self.folder / name, ignore_errors=True)
        shutil.copytree(self._kept / name, self.folder / name)

    def disturb(self, engine, rng):
        """Does something to one of the shaky tenants. Returns what."""
        name = rng.choice(self.shaky)
        path = self.folder / name
        arrays = path / "adapter.safetensors"
        kind = rng.choice(("delete", "truncate", "flip", "restore", "restore", "unload", "load"))
        if kind == "delete":
            shutil.rmtree(path, ignore_errors=True)
        elif kind in ("truncate", "flip"):
            self.restore(name)
            payload = arrays.read_bytes()
            # As a full disk leaves it; and a bit that fell over.
            cut = rng.randrange(len(payload))
            flipped = payload[:cut] + bytes([payload[cut] ^ 8]) + payload[cut + 1 :]
            arrays.write_bytes(payload[:cut] if kind == "truncate" else flipped)
        elif kind == "restore":
            self.restore(name)
        elif kind == "unload" and name in engine.bank:
            try:
                engine.unload(name)
            except InputError:
                pass  # it is leaving already
        elif kind == "load" and name not in engine.bank:
            try:
                engine.load(name, path)
            except InputError:
                pass  # its folder is damaged, or the old one has not left
        return kind


@dataclasses.dataclass
class Report:
    """What a soak found.

    Attributes:
      problems: in words; empty if all is well.
      numbers: counts and sizes, as JSON values.
      samples: of the process over time.
    """

    problems: list
    numbers: dict
    samples: list

    def to_json(self):
        return json.dumps(
            {
                "problems": self.problems,
                **self.numbers,
                "samples": [dataclasses.astuple(sample) for sample in self.samples],
            },
            indent=1,
        )


def soak(folder, *, requests=0, seconds=0.0, seed=0, rows=6, length=64, say=lambda text: None):
    """Runs it.

    Args:
      folder: an empty place for tenants.
      requests: stops when so many have been sent, good and bad, ...
      seconds: ... and so long has passed.
      seed: of all choices.
      rows: of the engine.
      length: of a row.
      say: told of the progress.
    """
    rng, base = random.Random(seed), load_base("tiny-random")
    tenants = Tenants(Path(folder) / "tenants", base)
    bank = TenantBank(
        base, BankOptions(slots=rows, cached=rows, dtype="bfloat16", host_bytes=1 << 18)
    )
    assert bank.register_folder(tenants.folder) == {}
    options = EngineOptions(
        rows=rows, length=length, pieces=(8, 32), prefix_bytes=1 << 19, queue=48, tenant_queue=16
    )
    with Engine(base, bank, options) as engine:
        report = _soak(engine, tenants, rng, requests, seconds, say)
    bank.close()
    return report


def _soak(engine, tenants, rng, requests, seconds, say):
    ledger, vocabulary = Ledger(), engine.base.config.vocab_size
    golden = _golden(engine, tenants, rng)
    before = {
        "device": device_bytes(),
        "handles": handles(),
        "compilations": engine.summary()["runner"]["compilations"],
        "hits": engine.summary()["runner"]["prefixes"]["hits"],
    }
    start, samples, sent, disturbed, asked = time.monotonic(), [], 0, 0, 0
    settled = None
    while sent < requests or time.monotonic() - start < seconds:
        sent += 1
        elapsed = time.monotonic() - start
        if not samples or elapsed - samples[-1].seconds > max(0.5, seconds / 1000):
            samples.append(_sample(engine, ledger, elapsed))
        if rng.random() < 0.01:
            tenants.disturb(engine, rng)
            disturbed += 1
        if rng.random() < 0.02:
            ledger.refused["sampling"] += check_sampling_refusals(rng)
        if rng.random() < 0.02:
            asked += 1
            _ask_again(engine, ledger, golden, rng)
            continue
        case = random_case(rng, tenants.steady, tenants.shaky, engine.options.length, vocabulary)
        _submit(engine, ledger, case)
        if ledger.open > 40 and rng.random() < 0.9:
            # Let some end: else most requests would find the queue full.
            _wait(lambda: ledger.open <= 30, 60)
        if settled is None and sent >= 0.25 * requests and elapsed >= 0.25 * seconds:
            settled = resident_bytes()
        if sent % 1000 == 0:
            say(f"{elapsed:.0f} s: {sent} sent, {ledger.accepted} accepted, {dict(ledger.ends)}")
    if not engine.drain(120):
        ledger.problems.append("the engine did not drain within two minutes")
    _wait(lambda: ledger.open == 0, 30)
    elapsed = time.monotonic() - start
    samples.append(_sample(engine, ledger, elapsed))
    return _judge(engine, ledger, before, settled, samples, sent, disturbed, asked)


def _judge(engine, ledger, before, settled, samples, sent, disturbed, asked):
    problems, summary = list(ledger.problems), engine.summary()
    problems += [f"never ended: {lost}" for lost in ledger.lost()]
    if sum(ledger.ends.values()) != ledger.accepted:
        problems.append(f"{ledger.accepted} accepted, {sum(ledger.ends.values())} ended")
    if not summary["alive"]:
        problems.append(f"the engine is not alive: {summary['failed']}")
    after = {
        "device": device_bytes(),
        "handles": handles(),
        "compilations": summary["runner"]["compilations"],
    }
    if after["device"] > before["device"] + SMALL:
        problems.append(f"device: {before['device']} bytes before, {after['device']} after")
    if after["compilations"] != before["compilations"]:
        problems.append(f"compilations: {before['compilations']} before, {after['compilations']}")
    if any(a > b for a, b in zip(after["handles"], before["handles"], strict=True)):
        problems.append(
            f"threads, open files: {before['handles']} before, {after['handles']} after"
        )
    in_use = [slab["in_use"] for slab in summary["bank"]["slabs"]]
    if any(in_use) or summary["bank"]["loading"]:
        problems.append(f"tenants still in use or loading: {in_use}")
    last = resident_bytes()
    if settled is not None and last > settled + GROWTH:
        problems.append(f"resident memory grew from {settled:,} to {last:,} bytes")
    numbers = {
        "sent": sent,
        "accepted": ledger.accepted,
        "ends": dict(ledger.ends),
        "refused": dict(ledger.refused),
        "asked_again": asked,
        "disturbances": disturbed,
        "seconds": samples[-1].seconds,
        "device_bytes": [before["device"], after["device"]],
        "resident_bytes": [settled, last],
        "compilations_after_warm_up": after["compilations"] - before["compilations"],
        "evictions": sum(slab["evictions"] for slab in summary["bank"]["slabs"]),
        "prefix_hits": summary["runner"]["prefixes"]["hits"] - before["hits"],
        "loads": summary["bank"]["placed"],
        "failed_loads": summary["bank"]["failed"],
    }
    return Report(problems, numbers, samples)


def _submit(engine, ledger, case):
    number = ledger.open_entry(case.request, case.behaviour)
    ticket, seen = [], []

    def listen(event):
        seen.append(None)
        ledger.event(number, event)
        if len(seen) > case.after:
            if case.behaviour == "vanish" and ticket:
                ticket[0].cancel()
            if case.behaviour == "raise":
                raise ConnectionResetError("the client has gone")

    try:
        ticket.append(engine.submit(case.request, listen))
    except InputError as error:
        code = error.code if isinstance(error, Refused) else "invalid"
        ledger.withdraw(number, code, case.refusals)
        return
    if case.malformed:
        ledger.problems.append(f"accepted, though malformed: {case.request}")
    if case.behaviour == "vanish" and case.after == 0:
        ticket[0].cancel()


def _golden(engine, tenants, rng):
    """Some requests and what they are answered while nothing else happens."""
    found = []
    for name in tenants.steady:
        prompt = tuple(rng.randrange(engine.base.config.vocab_size) for _ in range(GOLDEN))
        for options in ({}, {"temperature": 1.0, "seed": rng.randrange(1 << 32)}):
            request = Request(name, prompt, TokenSampling(max_tokens=12, **options))
            answer = engine.complete(request)
            found.append((request, [info.token for info in answer.tokens], answer.text))
    return found


def _ask_again(engine, ledger, golden, rng):
    # Half of them are of the first tenant, so that its prompt is among those that are kept.
    request, tokens, text = rng.choice(rng.choice((golden, golden[:2])))
    number = ledger.open_entry(request, "read")

    def listen(event):
        entry = ledger.event(number, event)
        if entry is not None and (entry.tokens, entry.text) != (tokens, text):
            ledger.problems.append(f"{request.tenant!r} was answered otherwise than when alone")

    try:
        engine.submit(request, listen)
    except InputError as error:
        ledger.withdraw(number, getattr(error, "code", "invalid"), {"queue_full"})


def _sample(engine, ledger, elapsed):
    slabs = engine.summary()["bank"]["slabs"]
    return Sample(
        elapsed,
        resident_bytes(),
        ledger.open,
        ledger.accepted,
        sum(slab["resident"] for slab in slabs),
    )


def _wait(condition, seconds):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.002)
