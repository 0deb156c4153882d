"""One base held in several forms: bytes, loss untouched, a short training, time of a step.

All forms train the same adapter from the same start on the same batches. Their steps are
interleaved, and times are compared within a round: a step of each.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from experiments.bench.report import Say
from experiments.bench.rounds import ratio, spread, spread_words
from experiments.bench.worker import Facts
from mos_jax.evaluation.answers import teacher_forced
from mos_jax.models.base import load_base
from mos_jax.models.config import SITES
from mos_jax.training.config import RunConfig
from mos_jax.training.session import Session

# By name: dtype of the computation and of what is not quantised, and the scheme.
FORMS: dict[str, tuple[str, str | None]] = {
    "float32": ("float32", None),
    "bfloat16": ("bfloat16", None),
    "int8": ("bfloat16", "int8"),
    "nf4": ("bfloat16", "nf4"),
}
# What the others are compared with.
REFERENCE = "bfloat16"


class Contestant:
    """A run of the config on the base in one form.

    Attributes:
      session: of the run.
      losses: of its steps so far, nats per target token.
      seconds: of its steps; `processor_seconds` those of all threads of the process.
    """

    def __init__(self, session: Session):
        self.session = session
        state, self._parts = session.initial()
        # A step gives its state away, and all contestants start from one adapter.
        self._state = jax.tree.map(jnp.copy, state)
        self._source = session.data.source(session.config.training.seed)
        lowered = session.train_step().lower(
            self._state, self._parts, session.base.model, self._source[0]
        )
        self._step = lowered.compile()
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.processor_seconds: list[float] = []

    def step(self) -> None:
        """Takes the next step and times it."""
        batch = self._source[len(self.losses)]
        clock, processor = time.perf_counter(), time.process_time()
        self._state, metrics = self._step(self._state, self._parts, self.session.base.model, batch)
        self.losses.append(float(metrics["loss"]))
        self.seconds.append(time.perf_counter() - clock)
        self.processor_seconds.append(time.process_time() - processor)

    def bytes(self) -> Facts:
        """Bytes of the whole base, of its sites and bits a weight of a site; of a step."""
        model = self.session.base.model
        weights = [model.blocks[site][...] for site in SITES]
        sites = sum(leaf.nbytes for leaf in jax.tree.leaves(weights))
        count = sum(d_in * d_out * n for n, d_in, d_out in model.config.site_shapes().values())
        memory = self._step.memory_analysis()
        return {
            "base": sum(leaf.nbytes for leaf in jax.tree.leaves(model)),
            "sites": sites,
            "bits_per_site_weight": 8 * sites / count,
            "temporaries": memory.temp_size_in_bytes,
        }

    def validation_loss(self, trained: bool) -> float:
        """Loss on the validation set, nats per target token: of the adapter, or of the base."""
        adapter = self._parts.merge(self._state.trained)
        factors = jax.jit(lambda adapter: adapter.factors())(adapter) if trained else None
        data = self.session.data
        batches = data.batches("validation")
        return teacher_forced(self.session.base.model, factors, batches, len(data.validation)).loss


def compare_forms(config: RunConfig, steps: int, say: Say) -> dict[str, Facts]:
    """Holds the base of `config` in every form and trains `steps` steps on each.

    Returns:
      By form: `bytes`; `base_loss` and `trained_loss` on the validation set; `losses`, `seconds`
      and `processor_seconds` by step; and for each of the latter two `..._ratio`, the spread over
      the rounds of the time against that of `REFERENCE`. The first round warms up and does not
      count for them.
    """
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, steps=steps))
    first: Session | None = None
    contestants: dict[str, Contestant] = {}
    found: dict[str, Facts] = {}
    for name, (dtype, scheme) in FORMS.items():
        section = dataclasses.replace(config.base, dtype=dtype, quantize=scheme)
        own = dataclasses.replace(config, base=section)
        if first is None:
            first = session = Session.create(own)
        else:
            # Data and adapter do not depend on the form.
            base = load_base(section.name, dtype, section.remat, scheme)
            session = dataclasses.replace(first, config=own, base=base)
        contestants[name] = Contestant(session)
        found[name] = {
            "bytes": contestants[name].bytes(),
            "base_loss": contestants[name].validation_loss(trained=False),
        }
        say(f"{name}: loss of the base {found[name]['base_loss']:.4f}")
    names = list(FORMS)
    for number in range(steps):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            contestants[name].step()
        shown = ", ".join(f"{name} {c.seconds[-1]:.2f} s" for name, c in contestants.items())
        say(f"step {number + 1}/{steps}: {shown}")
    reference = contestants[REFERENCE]
    for name, contestant in contestants.items():
        found[name] |= {
            "trained_loss": contestant.validation_loss(trained=True),
            "losses": contestant.losses,
        }
        for key in ("seconds", "processor_seconds"):
            times = getattr(contestant, key)
            found[name][key] = times
            found[name][f"{key}_ratio"] = ratio(times[1:], getattr(reference, key)[1:])
        say(f"{name}: loss after {steps} steps {found[name]['trained_loss']:.4f}")
    return found


def report(found: dict[str, Any], command: str) -> str:
    """All that was found, as a page in Markdown."""
    forms, machine, config = found["forms"], found["machine"], found["config"]
    reference = forms[REFERENCE]
    data, training = config["data"], config["training"]
    lines = [
        "# Quantised bases",
        "",
        f"{config['base']['name']} in fp32, in bf16, and in bf16 with the weights of its sites in "
        f"int8 and NF4 (blocks of 64 along d_in, scales in bf16); {config['adapter']['method']} "
        f"trained {training['steps']} steps of {data['batch_size']} x {data['sequence_length']} "
        f"tokens on `{data['task']}`, the same start and the same batches for all.",
        "",
        f"{machine['date'][:10]}. {machine['threads']} threads of {machine['cores']} cores of "
        f"{machine['processor']}, load {machine['load_before'][0]:.1f} when it began; "
        f"jax {machine['versions']['jax']}.",
        "",
        f"    {command}",
        "",
        "## Bytes",
        "",
        *_table(
            ["", "base, MiB", "against bf16", "sites, MiB", "bits a site weight",
             "temporaries of a step, MiB"],
            [
                [
                    name,
                    f"{facts['bytes']['base'] / 2**20:.1f}",
                    f"{facts['bytes']['base'] / reference['bytes']['base']:.3f}",
                    f"{facts['bytes']['sites'] / 2**20:.1f}",
                    f"{facts['bytes']['bits_per_site_weight']:.2f}",
                    f"{facts['bytes']['temporaries'] / 2**20:.1f}",
                ]
                for name, facts in forms.items()
            ],
        ),
        "",
        "## Loss",
        "",
        f"Nats per target token on the {data['validation_examples']} validation examples.",
        "",
        *_table(
            ["", "untouched base", "less bf16", f"after {training['steps']} steps", "less bf16",
             "last training step"],
            [
                [
                    name,
                    f"{facts['base_loss']:.4f}",
                    f"{facts['base_loss'] - reference['base_loss']:+.4f}",
                    f"{facts['trained_loss']:.4f}",
                    f"{facts['trained_loss'] - reference['trained_loss']:+.4f}",
                    f"{facts['losses'][-1]:.4f}",
                ]
                for name, facts in forms.items()
            ],
        ),
        "",
        "## Time of a step",
        "",
        f"Steps interleaved, ratios to bf16 within a round, {training['steps'] - 1} rounds after "
        "one to warm up: median (smallest to largest). Processor seconds count all threads of the "
        "process and say more than the clock where other programs run.",
        "",
        *_table(
            ["", "processor seconds, median", "ratio to bf16", "clock, ratio to bf16"],
            [
                [
                    name,
                    f"{spread(facts['processor_seconds'][1:])['median']:.2f}",
                    spread_words(facts["processor_seconds_ratio"]),
                    spread_words(facts["seconds_ratio"]),
                ]
                for name, facts in forms.items()
            ],
        ),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    ruler = ["---"] + ["---:"] * (len(head) - 1)
    return ["| " + " | ".join(cells) + " |" for cells in (head, ruler, *rows)]
