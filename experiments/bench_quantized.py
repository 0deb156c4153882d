r"""Compares a base in fp32, bf16, int8 and NF4: bytes, loss, a short training, time of a step.

python experiments/bench_quantized.py --out=results/bench_quantized.json \
  --report=results/quantized.md
python experiments/bench_quantized.py --quick

All forms of the base are in one process and train the same adapter on the same batches, a step of
each in turn. Ratios of times are taken within such a round.
"""

import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from mos_jax import app

# Python itself looks for modules beside this file only.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

CONFIG = app.define_config("configs/quickstart.py")
OUT = flags.DEFINE_string("out", None, "JSON file for all that was found.")
REPORT = flags.DEFINE_string("report", None, "Markdown file for the same as tables.")
STEPS = flags.DEFINE_integer("steps", 8, "Steps of training on each form.", lower_bound=2)
QUICK = flags.DEFINE_bool("quick", False, "A tiny base, three steps: shows only that it works.")


def main(_: Sequence[str]) -> None:
    # Imported here so that --help and mistyped flags answer at once.
    from rich.console import Console

    os.environ.setdefault("JAX_PLATFORMS", "cpu")

    from experiments.bench.quantized import compare_forms, report
    from experiments.bench.rounds import machine_facts
    from mos_jax.training.config import RunConfig

    chosen, steps = CONFIG.value, STEPS.value
    if QUICK.value:
        from configs import smoke

        chosen, steps = smoke.get_config(), 3
    config = RunConfig.from_mapping(chosen.to_dict())
    console = Console()
    machine = machine_facts(len(os.sched_getaffinity(0)))
    found = {
        "machine": machine,
        "config": {**config.to_dict(), "training": {**vars(config.training), "steps": steps}},
        "forms": compare_forms(
            config,
            steps,
            lambda text: console.print(text, highlight=False, markup=False, style="dim"),
        ),
    }
    command = shlex.join(["python", "experiments/bench_quantized.py", *sys.argv[1:]])
    page = report(found, command)
    print(page)
    for path, text in ((OUT.value, json.dumps(found, indent=2) + "\n"), (REPORT.value, page)):
        if path:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    app.run(main)
