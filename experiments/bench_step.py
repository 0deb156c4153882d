r"""What the fastest step's page says in numbers: temporaries, the price of chunks, cold starts.

python experiments/bench_step.py --out=results/fastest_step.json --report=results/fastest_step.md
python experiments/bench_step.py --out=runs/step.json --parts=remat --parts=logits
python experiments/bench_step.py --out=runs/step.json --quick

Parts. `remat`: temporaries of the training step by remat policy. `logits`: the same by limit of
logits, and those of the loss alone. Both run nothing and do not depend on the machine's load.
`chunks`: the loss in chunks of the vocabulary beside all logits at one time. `starts`: the training
program in a fresh process up to the end of its first step, with an empty folder of compiled
programs and with a full one. These two need a quiet machine; a run during which other programs took
more than 5% of the processors is made again, and the most that they took is in the tables. The file
is written after each number; what it holds of the same code, configuration, versions and processor
is not found again.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from mos_jax import app

# Python itself looks for modules beside this file only.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

CONFIG = app.define_config("configs/quickstart.py")
PARTS_OF = ["remat", "logits", "chunks", "starts"]
OUT: Any = flags.DEFINE_string("out", None, "JSON file of all numbers; goes on with what it holds.")
REPORT = flags.DEFINE_string("report", None, "Markdown file for the same as tables.")
PARTS = flags.DEFINE_multi_enum("parts", PARTS_OF, PARTS_OF, "What to find out.")
ROUNDS = flags.DEFINE_integer("rounds", 5, "Rounds that count; one more warms up.", lower_bound=1)
TRIES = flags.DEFINE_integer("tries", 3, "How often a disturbed run is made.", lower_bound=1)
QUICK = flags.DEFINE_bool("quick", False, "Tiny sizes and one round: shows only that it works.")
flags.mark_flag_as_required("out")


def main(_: Sequence[str]) -> None:
    # Imported here so that --help and mistyped flags answer at once.
    from rich.console import Console

    os.environ.setdefault("JAX_PLATFORMS", "cpu")

    from experiments.bench import fastest_step
    from experiments.bench.notes import Notes, maker
    from experiments.bench.rounds import Rounds
    from mos_jax.training.config import RunConfig

    console = Console()

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False, style="dim")

    chosen = CONFIG.value
    if QUICK.value:
        from configs import smoke

        chosen = smoke.get_config()
    config = RunConfig.from_mapping(chosen.to_dict())
    threads, parts = len(os.sched_getaffinity(0)), set(PARTS.value)
    sizes = fastest_step.QUICK if QUICK.value else fastest_step.Sizes()
    rounds = Rounds(1 if QUICK.value else ROUNDS.value, threads, TRIES.value)
    notes = Notes(Path(OUT.value), maker(config.to_dict(), threads))
    if "remat" in parts:
        fastest_step.count_remat(config, sizes, notes, say)
    if "logits" in parts:
        fastest_step.count_logits(config, sizes, notes, say)
    if "chunks" in parts:
        fastest_step.time_chunks(sizes, rounds, notes, say)
    if "starts" in parts:
        fastest_step.time_starts(sizes, rounds, notes, say)
    page = fastest_step.report(notes.found, "make step")
    print(page)
    if REPORT.value:
        Path(REPORT.value).parent.mkdir(parents=True, exist_ok=True)
        Path(REPORT.value).write_text(page, encoding="utf-8")


if __name__ == "__main__":
    app.run(main)
