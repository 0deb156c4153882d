r"""Compares K runs trained in one compiled step with the same K runs one after the other.

python experiments/bench_stacked.py --parts=programs --out=results/bench_stacked_programs.json
python experiments/bench_stacked.py --parts=clock --out=results/bench_stacked_clock.json
python experiments/bench_stacked.py --parts=programs --runs=8
python experiments/bench_stacked.py --quick

Two parts. `programs`: what the compiled steps compute, read and keep, which does not depend on the
machine's load: operations, bytes, how much of the base's weights the products read. `clock`: steps
on real batches in interleaved rounds, in examples per second, at several sizes of a batch; ratios
are taken within a round.
"""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from mos_jax import app

# Python itself looks for modules beside this file only; the processes it starts look here too.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

CONFIG = app.define_config("configs/quickstart.py")
OUT = flags.DEFINE_string("out", None, "JSON file for all that was found.")
PARTS = flags.DEFINE_multi_enum(
    "parts", ["programs", "clock"], ["programs", "clock"], "What to compare."
)
RUNS = flags.DEFINE_integer("runs", 4, "Runs in one step.", lower_bound=2)
ROUNDS = flags.DEFINE_integer("rounds", 3, "Rounds; both sides ran once before.", lower_bound=1)
STEPS = flags.DEFINE_integer("steps", 2, "Steps of each run in a round.", lower_bound=1)
SIZES = flags.DEFINE_list("sizes", ["1x112", "4x208"], "Rows x tokens of a run's batch.")
THREADS = flags.DEFINE_integer("threads", 2, "CPUs to use.", lower_bound=1)
QUICK = flags.DEFINE_bool("quick", False, "A tiny base and one round: shows only that it works.")


def main(_: Sequence[str]) -> None:
    # Imported here so that --help and mistyped flags answer at once.
    from rich.console import Console

    os.environ.setdefault("JAX_PLATFORMS", "cpu")

    from experiments.bench.rounds import machine_facts
    from experiments.bench.stacked import compare_clock, compare_programs, parse_size, print_stacked
    from mos_jax.training.config import RunConfig

    chosen, sizes = CONFIG.value, [parse_size(size) for size in SIZES.value]
    rounds, steps = ROUNDS.value, STEPS.value
    if QUICK.value:
        from configs import smoke

        chosen, sizes, rounds, steps = smoke.get_config(), [(1, 512)], 1, 1
    config = RunConfig.from_mapping(chosen.to_dict())
    console = Console()

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False, style="dim")

    found = {
        "machine": machine_facts(THREADS.value),
        "config": config.to_dict(),
        "runs": RUNS.value,
    }
    entries: list[dict[str, Any]] = []
    for size in sizes:
        entry: dict[str, Any] = {"rows": size[0], "width": size[1]}
        if "programs" in PARTS.value:
            entry["programs"] = compare_programs(config, size, RUNS.value, say)
        if "clock" in PARTS.value:
            entry["clock"] = compare_clock(
                config, size, RUNS.value, steps, rounds, THREADS.value, say
            )
        entries.append(entry)
        print_stacked(entry, RUNS.value, console)
    found["sizes"] = entries
    if OUT.value:
        Path(OUT.value).parent.mkdir(parents=True, exist_ok=True)
        Path(OUT.value).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    app.run(main)
