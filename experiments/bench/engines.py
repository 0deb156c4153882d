"""Engines under load, one for each bank that is compared, all on one base in one process."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from experiments.bench.traffic import Served, make_requests, prompts_of, serve, zipf_counts
from experiments.bench.worker import Facts
from mos_jax.adapters.bank import BASE_NAME
from mos_jax.models.base import load_base
from mos_jax.serving.engine import Engine
from mos_jax.serving.engine_options import EngineOptions
from mos_jax.serving.options import BankOptions
from mos_jax.serving.requests import Request
from mos_jax.serving.tenants import TenantBank

PATTERNS = ("base", "one", "different", "zipf")
# Of tenants that a request is of, as S-LoRA's traces have it.
EXPONENT = 1.0


@dataclasses.dataclass(frozen=True)
class Contestant:
    """A bank and whom its requests are of.

    Attributes:
      name: of it.
      folder: of the tenants; "" for a bank without any, whose program has no adapters at all.
      known: tenants that are registered.
      slots: on the device.
      rows: of the engine, and clients that send requests.
      requests: in a round.
      pattern: "base", "one" tenant for all requests, all "different", or "zipf".
      max_tokens: of an answer.
    """

    name: str
    folder: str = ""
    known: int = 0
    slots: int = 1
    rows: int = 8
    requests: int = 8
    pattern: str = "base"
    max_tokens: int = 64

    @property
    def engine(self) -> tuple[str, int, int, int]:
        """Contestants that agree in this share an engine."""
        return self.folder, self.known, self.slots, self.rows


class Engines:
    """The side of this library; see `worker.Side`."""

    def __init__(
        self,
        base: str,
        contestants: list[Contestant],
        prompt_length: int = 16,
        length: int = 128,
        dtype: str = "bfloat16",
    ):
        """Loads the base.

        Args:
          base: its name; it is held in fp32.
          contestants: what is compared.
          prompt_length: tokens of every prompt.
          length: positions of a row.
          dtype: of the banks.
        """
        self._base = load_base(base, "float32")
        self._ids = self._base.tokenizer.ordinary_ids()
        self._contestants = {contestant.name: contestant for contestant in contestants}
        self._prompt, self._length, self._dtype = prompt_length, length, dtype
        self._engines: dict[tuple[str, int, int, int], Engine] = {}
        self._served: dict[str, Served] = {}
        self._before: dict[str, dict[str, int]] = {}
        self._round = dict.fromkeys(self._contestants, 0)

    def prepare(self) -> dict[str, Facts]:
        """Compiles all engines, and answers one round of each, with which tenants are loaded."""
        return {name: self._facts(contestant) for name, contestant in self._contestants.items()}

    def _facts(self, contestant: Contestant) -> Facts:
        engine = self._engine(contestant)
        self.run(contestant.name)
        bank = engine.summary()["bank"]
        return {
            **dataclasses.asdict(contestant),
            "folder": Path(contestant.folder).name,
            "bank_bytes": bank["bytes"],
            "slot_bytes": bank["slabs"][0]["slot_bytes"] if bank["slabs"] else 0,
            "cache_bytes": bank["cache_bytes"],
            "engine_bytes": engine.nbytes,
            "compilations": engine.summary()["runner"]["compilations"],
        }

    def _engine(self, contestant: Contestant) -> Engine:
        key = contestant.engine
        if key not in self._engines:
            sizes = BankOptions(
                slots=contestant.slots,
                dtype=self._dtype,
                cached=contestant.rows,
                # What has no slot is in host memory, but for the first time.
                host_bytes=(1 << 31) if contestant.slots < contestant.known else 0,
            )
            bank = TenantBank(self._base, sizes)
            for name in self._names(contestant):
                bank.register(name, Path(contestant.folder, name))
            if 0 < contestant.known <= contestant.slots:
                # All that fit are there before anything is measured.
                with bank.using(*self._names(contestant)):
                    pass
            options = EngineOptions(
                rows=contestant.rows, length=self._length, pieces=(self._prompt,)
            )
            engine = Engine(self._base, bank, options)
            engine.start()
            self._engines[key] = engine
        return self._engines[key]

    def _names(self, contestant: Contestant) -> list[str]:
        return [f"t{number:04d}" for number in range(contestant.known)]

    def requests(self, name: str) -> list[Request]:
        """The next round's; the same for contestants that differ in their bank alone."""
        contestant = self._contestants[name]
        names, count = self._names(contestant), contestant.requests
        seed = self._round[name]
        if contestant.pattern == "base":
            tenants = [BASE_NAME] * count
        elif contestant.pattern == "one":
            tenants = [names[0]] * count
        elif contestant.pattern == "different":
            tenants = [names[number % len(names)] for number in range(count)]
        else:
            tenants = zipf_counts(names, count, EXPONENT, seed)
        prompts = prompts_of(self._ids, count, self._prompt, seed)
        return make_requests(tenants, prompts, contestant.max_tokens)

    def run(self, contestant: str) -> float:
        """One round of requests."""
        chosen = self._contestants[contestant]
        engine, requests = self._engine(chosen), self.requests(contestant)
        self._before[contestant] = self._counts(engine)
        self._served[contestant] = serve(engine, requests, chosen.rows)
        self._round[contestant] += 1
        return self._served[contestant].seconds

    def told(self, contestant: str) -> Facts:
        """What the last round of a contestant came to."""
        engine = self._engine(self._contestants[contestant])
        after, before = self._counts(engine), self._before[contestant]
        return {
            **self._served[contestant].facts(),
            **{name: after[name] - before[name] for name in after},
            "bank_bytes": engine.bank.nbytes,
        }

    def answers(self, contestant: str) -> list[list[int]]:
        """Token ids of the last round's answers."""
        return [list(answer.tokens) for answer in self._served[contestant].answers]

    def _counts(self, engine: Engine) -> dict[str, int]:
        summary = engine.summary()
        bank: dict[str, Any] = summary["bank"]
        return {
            "placed": bank["placed"],
            "assembled": bank["assembled"],
            "read": bank["read"],
            "compiled": summary["runner"]["compilations"],
        }

    def close(self) -> None:
        """Ends all engines."""
        for engine in self._engines.values():
            engine.close()
            engine.bank.close()
