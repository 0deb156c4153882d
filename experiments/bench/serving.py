"""The parts of the benchmark of serving: who is compared with whom, in interleaved rounds."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from experiments.bench.engines import Contestant
from experiments.bench.rounds import machine_facts
from experiments.bench.tenant_folders import write_tenants
from experiments.bench.traffic import prompts_of
from experiments.bench.worker import Worker
from mos_jax.adapters.adapter import AdapterConfig
from mos_jax.adapters.lora import LoRAConfig
from mos_jax.adapters.mos import MoSConfig
from mos_jax.errors import InputError
from mos_jax.models.base import load_base

Say = Callable[[str], None]
PARTS = ("batch", "rows", "tenants", "swap", "peft")
PROMPT = 16
PEFT_ROWS = 8


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
      base: name of the base.
      mos: of the tenants.
      rows: of the part "rows"; "batch", "tenants" and "peft" have 8.
      tenants: numbers of tenants.
      lora_folders: how many tenants of LoRA have arrays of their own, to spare the disk.
      answer: tokens of an answer in the part "batch".
      short_answer: in the parts "rows" and "tenants".
      peft_answer: in the part "peft".
      requests: of a round of the part "tenants".
      rounds: that count, of each part.
      swaps: tenants of the part "swap".
      dtype: of the banks.
    """

    base: str = "smollm2-135m-instruct"
    mos: MoSConfig = dataclasses.field(default_factory=lambda: MoSConfig(2, 8, 2))
    rows: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    tenants: tuple[int, ...] = (1, 8, 100, 1000)
    lora_folders: int = 64
    answer: int = 48
    short_answer: int = 16
    peft_answer: int = 48
    requests: int = 48
    rounds: int = 7
    swaps: int = 40
    dtype: str = "bfloat16"


def quick_sizes() -> Sizes:
    """Of the short form: a tiny base, and only as many rounds as show that it works."""
    return Sizes(
        base="tiny-random", mos=MoSConfig(2, 4, 2), rows=(1, 2), tenants=(1, 8, 20),
        lora_folders=8, answer=4, short_answer=4, peft_answer=3, requests=24, rounds=1, swaps=6,
    )  # fmt: skip


def folders_of(work: Path, sizes: Sizes, say: Say) -> dict[str, str]:
    """Makes the tenants, unless they are there. By kind, the folder that holds them."""
    base, rank = load_base(sizes.base, "float32"), sizes.mos.rank
    assert rank is not None
    most = max(*sizes.tenants, *sizes.rows, PEFT_ROWS, sizes.swaps)
    kinds: dict[str, tuple[AdapterConfig, int, int]] = {
        "mos": (sizes.mos, most, most),
        "lora": (LoRAConfig(rank), most, sizes.lora_folders),
        "lora-budget": (LoRAConfig(sizes.mos.equivalent_rank), PEFT_ROWS, PEFT_ROWS),
    }
    found = {}
    for kind, (config, count, distinct) in kinds.items():
        folder = work / "tenants" / sizes.base / kind
        say(f"{count} tenants in {folder}")
        write_tenants(folder, base, config, count, distinct=distinct)
        found[kind] = str(folder)
    return found


def contestants_of(part: str, folders: dict[str, str], sizes: Sizes) -> list[Contestant]:
    """Who is compared in a part."""
    mos, lora, answer, short = folders["mos"], folders["lora"], sizes.answer, sizes.short_answer
    e, r = sizes.mos.equivalent_rank, sizes.mos.rank

    def eight(name: str, folder: str, pattern: str, tokens: int = answer) -> Contestant:
        return Contestant(name, folder, 8, 8, 8, 8, pattern, tokens)

    if part == "batch":
        return [
            Contestant("bare base", max_tokens=answer),
            eight("MoS, one tenant", mos, "one"),
            eight("MoS, all different", mos, "different"),
            eight(f"LoRA r={r}, all different", lora, "different"),
            eight(f"LoRA r={e}, all different", folders["lora-budget"], "different"),
        ]
    if part == "rows":
        return [
            contestant
            for rows in sizes.rows
            for contestant in (
                Contestant(f"bare base, {rows}", rows=rows, requests=rows, max_tokens=short),
                *(
                    Contestant(f"MoS, {words}, {rows}", mos, rows, rows, rows, rows, pattern, short)
                    for words, pattern in (("one tenant", "one"), ("all different", "different"))
                ),
            )
        ]
    if part == "tenants":
        every = [
            Contestant(f"MoS, {n}", mos, n, n, 8, sizes.requests, "zipf", short)
            for n in sizes.tenants
        ]
        most = max(sizes.tenants)
        # As many LoRA as lie in the bytes that all MoS take; the rest come when they are asked for.
        assert r is not None
        fit = max(8, most * e // r)
        every.append(
            Contestant(f"LoRA r={r}, {most}", lora, most, fit, 8, sizes.requests, "zipf", short)
        )
        return every
    if part == "peft":
        return [
            Contestant("bare base", max_tokens=sizes.peft_answer),
            eight("MoS, all different", mos, "different", sizes.peft_answer),
        ]
    raise InputError(f"no part {part!r}; there are {', '.join(PARTS)}")


def measure(part: str, work: Path, sizes: Sizes, threads: int, say: Say) -> dict[str, Any]:
    """One part: as many rounds as are missing, each kept in a file as soon as it is over.

    Args:
      part: one of `PARTS`.
      work: holds the file `<part>.json` and the tenants.
      sizes: how much is measured.
      threads: processors that each side may use.
      say: told of the progress.

    Raises:
      InputError: if what is there was measured with other sizes.
    """
    file, folders = work / f"{part}.json", folders_of(work, sizes, say)
    asked = {key: value for key, value in dataclasses.asdict(sizes).items() if key != "rounds"}
    found: dict[str, Any] = {
        "part": part, "sizes": json.loads(json.dumps(asked, default=str)),
        "machine": machine_facts(threads), "facts": {}, "rounds": [],
    }  # fmt: skip
    if file.exists():
        kept = json.loads(file.read_text(encoding="utf-8"))
        if kept["sizes"] != found["sizes"]:
            raise InputError(f"{file} was measured with other sizes; choose another --workdir")
        found = kept
    if len(found["rounds"]) >= sizes.rounds:
        return found
    with ExitStack() as stack:
        if part == "swap":
            sides = [stack.enter_context(_swap_side(folders, sizes, threads))]
        else:
            sides = [stack.enter_context(_engine_side(part, folders, sizes, threads))]
        if part == "peft":
            sides.append(stack.enter_context(_peft_side(folders, sizes, threads)))
        who: list[tuple[str, Worker]] = []
        for side in sides:
            facts = side.prepare()
            found["facts"] |= facts
            who += [(name, side) for name in facts]
        while len(found["rounds"]) < sizes.rounds:
            number = len(found["rounds"])
            turn = number % len(who)
            found["rounds"].append(_round([*who[turn:], *who[:turn]]))
            file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            shown = ", ".join(
                f"{name} {one['tokens'] / one['seconds']:.1f}" if "tokens" in one else name
                for name, one in found["rounds"][-1].items()
            )
            say(f"{part}, round {number + 1}/{sizes.rounds}, tokens/s: {shown}")
    return found


def _round(who: Sequence[tuple[str, Worker]]) -> dict[str, Any]:
    made = {}
    for name, side in who:
        run = side.run(name)
        made[name] = {
            **side.ask("told", name),
            "seconds": run.seconds,
            "processor": run.processor,
            "others": run.others,
            "at": time.time(),
        }
    return made


def _engine_side(part: str, folders: dict[str, str], sizes: Sizes, threads: int) -> Worker:
    return Worker(
        "experiments.bench.engines:Engines",
        threads,
        base=sizes.base,
        contestants=contestants_of(part, folders, sizes),
        prompt_length=PROMPT,
        length=PROMPT + max(sizes.answer, sizes.short_answer, sizes.peft_answer) + 16,
        dtype=sizes.dtype,
    )


def _swap_side(folders: dict[str, str], sizes: Sizes, threads: int) -> Worker:
    return Worker(
        "experiments.bench.swaps:Swaps",
        threads,
        base=sizes.base,
        folders=folders,
        count=sizes.swaps,
        dtype=sizes.dtype,
    )


def _peft_side(folders: dict[str, str], sizes: Sizes, threads: int) -> Worker:
    ids = load_base(sizes.base, "float32").tokenizer.ordinary_ids()
    names = [f"t{number:04d}" for number in range(PEFT_ROWS)]
    return Worker(
        "experiments.bench.peft_mixed:PeftMixed",
        threads,
        base=sizes.base,
        tenants={name: str(Path(folders["mos"], name)) for name in names},
        prompts=[list(prompt) for prompt in prompts_of(ids, PEFT_ROWS, PROMPT, 0)],
        max_tokens=sizes.peft_answer,
        threads=threads,
    )
