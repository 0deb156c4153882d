"""What docs/fastest_step.md says in numbers: temporaries, the price of chunks, cold starts.

Temporaries are those of the compiled step, from shapes; nothing is run for them, and they do not
depend on what else the machine does. Axis legend: N tokens, d model width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench.notes import MAKERS, Notes, Say
from experiments.bench.rounds import (
    DISTURBED,
    Rounds,
    check_losses,
    play_facts,
    spread,
    spread_words,
)
from experiments.bench.starts import FIRST, SECOND, Starts
from experiments.bench.worker import Facts, Worker
from mos_jax.models.config import DecoderConfig
from mos_jax.models.head import LOGITS_MIB
from mos_jax.models.known import known_config
from mos_jax.models.remat import REMAT_POLICIES
from mos_jax.models.tiny import tiny_config
from mos_jax.planning.costs import compile_loss, make_request, step_costs, vary
from mos_jax.training.config import RunConfig

PARTS = ("remat", "logits", "chunks", "starts")
MIB = 2**20
# MiB of logits at one time; 0: all of them.
LIMITS = (0.0, LOGITS_MIB, 32.0)
# What is asked of a second start, by the clock on 2 cores.
START_SECONDS_AT_MOST = 15.0


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is counted and measured.

    Attributes:
      remat_base: known base of the table of remat policies.
      remat_shapes: its batches, rows and tokens.
      remat_targets: of a row.
      policies: of remat.
      logits: base, rows, tokens, active rank and remat policies of each line of the table of
        limits; every token is a target.
      chunk_base: base whose head is timed.
      chunk_targets: N.
      chunks: entries of a chunk, besides all of them.
      start: config of the training that is started.
    """

    remat_base: str = "smollm2-135m"
    remat_shapes: tuple[tuple[int, int], ...] = ((8, 128), (4, 512))
    remat_targets: int = 32
    policies: tuple[str, ...] = REMAT_POLICIES
    logits: tuple[tuple[str, int, int, int, tuple[str, ...]], ...] = (
        ("smollm2-135m", 8, 512, 8, ("products", "full")),
        ("llama2-7b", 16, 512, 16, ("full",)),
        ("llama3-8b", 16, 512, 16, ("full",)),
    )
    chunk_base: str = "smollm2-135m"
    chunk_targets: tuple[int, ...] = (128, 512, 2048)
    chunks: tuple[int, ...] = (1024, 4096, 24576)
    start: str = "configs/quickstart.py"


TINY = "tiny-random"
QUICK = Sizes(
    remat_base=TINY,
    remat_shapes=((2, 64),),
    remat_targets=8,
    policies=("products", "full"),
    logits=((TINY, 2, 64, 2, ("products",)),),
    chunk_base=TINY,
    chunk_targets=(16,),
    chunks=(128,),
    start="configs/smoke.py",
)


def _model(name: str) -> DecoderConfig:
    return tiny_config() if name == TINY else known_config(name)


def count_remat(config: RunConfig, sizes: Sizes, notes: Notes, say: Say) -> None:
    """Costs of the step by remat policy."""
    for rows, width in sizes.remat_shapes:
        asked = make_request(config, _model(sizes.remat_base), rows, width)
        asked = dataclasses.replace(asked, targets=sizes.remat_targets)
        for policy in sizes.policies:
            base = dataclasses.replace(config.base, remat=policy)
            own = dataclasses.replace(asked.config, base=base)
            find = functools.partial(_costs, dataclasses.replace(asked, config=own))
            notes.get(f"remat/{rows} x {width}/{policy}", find, say)


def count_logits(config: RunConfig, sizes: Sizes, notes: Notes, say: Say) -> None:
    """Costs of the step, and temporaries of the loss alone, by limit of logits."""
    for name, rows, width, rank, policies in sizes.logits:
        model, shape = _model(name), f"{rows} x {width}"
        for limit in LIMITS:
            for policy in policies:
                own = dataclasses.replace(
                    config,
                    base=dataclasses.replace(config.base, remat=policy, logits_mib=limit),
                )
                asked = vary(make_request(own, model, rows, width), "rank", rank)
                find = functools.partial(_costs, asked)
                notes.get(f"logits/{name}/{shape}/{policy}/{limit:g}", find, say)
            find = functools.partial(_loss_costs, model, rows * width, limit)
            notes.get(f"loss/{name}/{shape}/{limit:g}", find, say)


def _costs(asked: Any) -> Facts:
    return step_costs(asked).to_dict()


def _loss_costs(model: DecoderConfig, tokens: int, limit: float) -> Facts:
    memory: Any = compile_loss(model, tokens, limit * MIB).memory_analysis()
    return {"temporaries": memory.temp_size_in_bytes}


def time_chunks(sizes: Sizes, how: Rounds, notes: Notes, say: Say) -> None:
    """Seconds of the loss and its gradient in chunks, to those with all logits."""
    for tokens in sizes.chunk_targets:
        notes.get(f"chunks/{tokens}", functools.partial(_chunks, sizes, tokens, how, say), say)


def _chunks(sizes: Sizes, tokens: int, how: Rounds, say: Say) -> Facts:
    chunks = (0, *sizes.chunks)
    with Worker(
        "experiments.bench.fastest_step:Losses",
        how.threads,
        base=sizes.chunk_base,
        tokens=tokens,
        chunks=chunks,
    ) as worker:
        losses = worker.prepare()
        check_losses(losses)
        return play_facts([(name, worker) for name in losses], how, say)


class Losses:
    """The loss of random hidden states, by entries of a chunk ("0": all); see `worker.Side`."""

    def __init__(self, base: str, tokens: int, chunks: Sequence[int]):
        model, rng = _model(base), np.random.default_rng(0)
        shape = (model.vocab_size, model.d_model)
        weight = jnp.asarray(rng.standard_normal(shape, np.float32) / np.sqrt(model.d_model))
        self._arguments = (
            jnp.asarray(rng.standard_normal((tokens, model.d_model), np.float32)),
            jnp.asarray(rng.integers(0, model.vocab_size, tokens, np.int32)),
            weight if model.tied_embeddings else weight.T,
        )
        # Runs of about equal length, long beside a tick of the clock of processors.
        self._times = max(1, 2048 // tokens)
        self._calls = {
            str(chunk): compile_loss(model, tokens, 4.0 * tokens * chunk) for chunk in chunks
        }

    def prepare(self) -> dict[str, Facts]:
        """The loss of each, which must be alike."""
        return {
            name: {"loss": float(call(*self._arguments)[0]) / len(self._arguments[1])}
            for name, call in self._calls.items()
        }

    def run(self, contestant: str) -> float:
        """The loss and its gradient, so often that all numbers of targets take about as long."""
        call = self._calls[contestant]
        start = time.perf_counter()
        for _ in range(self._times):
            jax.block_until_ready(call(*self._arguments))
        return time.perf_counter() - start


def time_starts(sizes: Sizes, how: Rounds, notes: Notes, say: Say) -> None:
    """Seconds of first and second starts, in turn."""
    notes.get("starts", functools.partial(_starts, sizes, how, say), say)


def _starts(sizes: Sizes, how: Rounds, say: Say) -> Facts:
    program = ("experiments/train.py", f"--config={sizes.start}")
    with tempfile.TemporaryDirectory() as folder:
        starts = Starts(program, Path(folder))
        return play_facts([(FIRST, starts), (SECOND, starts)], how, say)


# Tables in Markdown: the page of docs/ holds the same lines.


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], words: int) -> str:
    ruler = ["---"] * words + ["---:"] * (len(head) - words)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (head, ruler, *rows))


def _entries(found: Mapping[str, Any], part: str) -> dict[tuple[str, ...], Facts]:
    split = {tuple(key.split("/")): facts for key, facts in found.items() if key != MAKERS}
    return {names[1:]: facts for names, facts in split.items() if names[0] == part}


def _mib(facts: Facts | None) -> str:
    return "" if facts is None else f"{facts['temporaries'] / MIB:,.0f}"


def remat_table(found: Mapping[str, Any]) -> str:
    """Temporaries of the step by remat policy, MiB."""
    entries = _entries(found, "remat")
    shapes = sorted({shape for shape, _ in entries})
    rows = [[s, *(_mib(entries.get((s, policy))) for policy in REMAT_POLICIES)] for s in shapes]
    return _table(["rows x tokens", *REMAT_POLICIES], rows, 1)


def _by_limit(found: Mapping[str, Any], part: str, names: Sequence[str]) -> str:
    entries = _entries(found, part)
    lines = sorted({names[:-1] for names in entries})
    limits = ["all logits at one time", *(f"limit {limit:g}" for limit in LIMITS[1:])]
    rows = [
        [*line, *(_mib(entries.get((*line, f"{limit:g}"))) for limit in LIMITS)] for line in lines
    ]
    return _table([*names, *limits], rows, len(names))


def logits_table(found: Mapping[str, Any]) -> str:
    """Temporaries of the whole step by limit of logits, MiB."""
    return _by_limit(found, "logits", ("base", "rows x tokens", "remat"))


def loss_table(found: Mapping[str, Any]) -> str:
    """Temporaries of the loss and its gradient alone, MiB."""
    return _by_limit(found, "loss", ("base", "rows x tokens"))


def chunks_table(found: Mapping[str, Any]) -> str:
    """Processor seconds and seconds of the loss in chunks, to those with all logits."""
    runs = {
        (int(tokens), int(chunk)): run
        for (tokens,), facts in _entries(found, "chunks").items()
        for chunk, run in facts.items()
        if chunk.isdigit() and int(chunk)
    }
    rows = [[f"{n:,}", f"{c:,}", *_times(run)] for (n, c), run in sorted(runs.items())]
    head = ("targets", "entries of a chunk", "processor seconds, ratio", "seconds, ratio")
    return _table([*head, "others, most"], rows, 0)


def _times(run: Facts) -> list[str]:
    ratios = (spread_words(run["ratio"]), spread_words(run["clock_ratio"]))
    return [*ratios, f"{max(run['others']):.0%}"]


def starts_table(found: Mapping[str, Any]) -> str:
    """Seconds of starts: median, smallest and largest."""
    facts = found.get("starts", {})
    rows = [
        [
            name,
            spread_words(spread(facts[name]["seconds"])),
            spread_words(spread(facts[name]["processor_seconds"])),
            f"{max(facts[name]['others']):.0%}",
        ]
        for name in (FIRST, SECOND)
        if name in facts
    ]
    return _table(["start", "seconds", "processor seconds", "others, most"], rows, 1)


def report(found: Mapping[str, Any], command: str) -> str:
    """All that was found, as a page in Markdown; what was not is left out."""
    ranks = ", ".join(f"{name} {rank}" for name, _, _, rank, _ in Sizes().logits)
    sections: list[tuple[str, str, Callable[[Mapping[str, Any]], str]]] = [
        (
            "remat",
            "Temporaries of the training step by remat policy, MiB, as XLA plans them for a CPU.",
            remat_table,
        ),
        (
            "logits",
            "Temporaries of the training step by `base.logits_mib`, MiB; every token of every row "
            f"is a target. Active ranks: {ranks}.",
            logits_table,
        ),
        (
            "loss",
            "Temporaries of the loss and its gradient by the hidden states alone, MiB.",
            loss_table,
        ),
        (
            "chunks",
            "The same in chunks of the vocabulary: times to those with all logits, within a round: "
            "median (smallest to largest); and the most that other programs took of the "
            "processors.",
            chunks_table,
        ),
        (
            "starts",
            "A fresh process of the training program, up to the end of its first step: median "
            "(smallest to largest).",
            starts_table,
        ),
    ]
    lines = ["# The fastest step, measured", "", f"    {command}", ""]
    for part, words, table in sections:
        entries = [facts for key, facts in found.items() if key.split("/")[0] == part]
        if entries:
            title = {"logits": "Limits of logits", "loss": "The loss alone"}.get(part, part)
            lines += [f"## {title.capitalize()}", "", words, "", table(found)]
            lines += [*_made(found, entries), ""]
    if second := found.get("starts", {}).get(SECOND):
        median, aim = spread(second["seconds"])["median"], START_SECONDS_AT_MOST
        verdict = "met" if median < aim else "missed"
        if (others := max(second["others"])) > DISTURBED:
            verdict += f", while other programs took up to {others:.0%} of the processors"
        lines.append(f"Less than {aim:g} s by the clock were asked of a second start: {verdict}.")
    return "\n".join(lines).rstrip() + "\n"


def _made(found: Mapping[str, Any], entries: Sequence[Facts]) -> list[str]:
    """When and with what: one line for each maker of the entries."""
    lines = []
    for name in dict.fromkeys(facts["maker"] for facts in entries):
        dates = sorted({f["date"][:10] for f in entries if f["maker"] == name})
        made, versions = found[MAKERS][name], found[MAKERS][name]["versions"]
        adapter, training = made["config"]["adapter"], made["config"]["training"]
        lines.append(
            f"{' to '.join(dict.fromkeys((dates[0], dates[-1])))}: {made['threads']} of "
            f"{made['cores']} cores of {made['processor']}, jax {versions['jax']}, MoS e = "
            f"{adapter['equivalent_rank']}, r = {adapter['rank']} where nothing else is said, "
            f"assembled {training['assembly']} the scan; code {made['code'][:12]}."
        )
    return lines
