r"""Times training against the floor of the frozen base, against LoRA, and against PEFT.

python experiments/bench_training.py --out=runs/bench.json
python experiments/bench_training.py --parts=dense --rounds=3
python experiments/bench_training.py --quick

Two parts. `dense`: forward and backward of 8 x 128 tokens to the adapter's gradients, loss on every
position. `job`: the examples of the config from text to updated adapter, in examples per second,
against transformers' Trainer with PEFT on the same examples. All in fp32 on CPU, in interleaved
rounds; ratios are taken within a round. Run it on a quiet machine: torch's threads wait for each
other by spinning, and lose much more time to other programs than JAX's do. A run during which other
programs took more than 5% of the processors is repeated, twice at most; see the column "others".
"""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from mos_jax import app

# Python itself looks for modules beside this file only; the processes it starts look here too.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

CONFIG = app.define_config("configs/quickstart.py")
OUT = flags.DEFINE_string("out", None, "JSON file for all that was measured.")
PARTS = flags.DEFINE_multi_enum("parts", ["dense", "job"], ["dense", "job"], "What to measure.")
ROUNDS = flags.DEFINE_integer("rounds", 5, "Rounds that count; one more warms up.", lower_bound=1)
STEPS = flags.DEFINE_integer("steps", 8, "Training steps in a round of the job.", lower_bound=1)
THREADS = flags.DEFINE_integer("threads", 2, "CPUs that each side may use.", lower_bound=1)
TRIES = flags.DEFINE_integer(
    "tries",
    3,
    "How often a disturbed run is made at most; 1 where the machine stays busy.",
    lower_bound=1,
)
QUICK = flags.DEFINE_bool("quick", False, "Tiny sizes and one round: shows only that it works.")


def main(_: Sequence[str]) -> None:
    # Imported here so that --help and mistyped flags answer at once.
    import importlib.util

    from rich.console import Console

    from mos_jax.errors import InputError

    missing = [
        name
        for name in ("torch", "transformers", "peft", "accelerate")
        if importlib.util.find_spec(name) is None
    ]
    if missing:
        raise InputError(
            f"{', '.join(missing)} not installed; `make bench` installs what the comparison "
            "needs, as does pip install 'mos_jax[interop]'"
        )
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

    from experiments.bench.report import compare_dense, compare_job, print_comparison
    from experiments.bench.rounds import machine_facts
    from mos_jax.training.config import RunConfig

    chosen, rounds, steps, shape = CONFIG.value, ROUNDS.value, STEPS.value, (8, 128)
    if QUICK.value:
        from configs import smoke

        chosen, rounds, steps, shape = smoke.get_config(), 1, 2, (2, 32)
    config = RunConfig.from_mapping(chosen.to_dict())
    console = Console()

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False, style="dim")

    threads = THREADS.value
    found = {"machine": machine_facts(threads), "config": config.to_dict()}
    if "dense" in PARTS.value:
        found["dense"] = compare_dense(config, shape, rounds, threads, TRIES.value, say)
        print_comparison(f"dense step, {shape[0]} x {shape[1]}", found["dense"], console)
    if "job" in PARTS.value:
        found["job"] = compare_job(config, steps, rounds, threads, TRIES.value, say)
        print_comparison(f"job, {steps} steps", found["job"], console)
    if OUT.value:
        Path(OUT.value).parent.mkdir(parents=True, exist_ok=True)
        Path(OUT.value).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    app.run(main)
