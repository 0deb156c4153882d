r"""Measures serving: tokens a second, time to the first token, bytes, swaps, beside LoRA and PEFT.

python experiments/bench_serving.py --workdir=runs/bench_serving --out=results
python experiments/bench_serving.py --workdir=runs/bench_serving --part=batch --rounds=11
python experiments/bench_serving.py --quick --workdir=runs/quick

Parts: `batch`, 8 rows of one tenant or of 8, MoS and LoRA; `rows`, 1 to 64 of them; `tenants`, 1 to
1,000 with traffic by Zipf's law; `swap`, what loading takes; `peft`, the mixed batch of PEFT
(needs the interop extra). Each round is kept in the work folder as soon as it is over, and a second
call goes on where the first one stopped; the folder also holds the tenants (about 3.5 GB). --out
writes serving.md, bench_serving.json and serving.png of all parts that were measured.
"""

import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from mos_jax import app

# Python itself looks for modules beside this file only; the processes it starts look here too.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

ALL = ["batch", "rows", "tenants", "swap", "peft"]
WORKDIR = flags.DEFINE_string("workdir", "runs/bench_serving", "Folder for rounds and tenants.")
PART = flags.DEFINE_multi_enum("part", ALL, ALL, "What to measure; again for more.")
ROUNDS = flags.DEFINE_integer("rounds", None, "Rounds that count, of each part.", lower_bound=1)
THREADS = flags.DEFINE_integer("threads", 2, "CPUs that each side may use.", lower_bound=1)
QUICK = flags.DEFINE_bool("quick", False, "A tiny base, one round: shows only that it works.")
OUT = flags.DEFINE_string("out", None, "Folder for the page, its data and the picture.")


def main(_: Sequence[str]) -> None:
    # Imported here so that --help and mistyped flags answer at once.
    import dataclasses
    import importlib.util

    from rich.console import Console

    os.environ.setdefault("JAX_PLATFORMS", "cpu")

    from experiments.bench.serving import Sizes, measure, quick_sizes
    from experiments.bench.serving_report import page
    from mos_jax.errors import InputError

    if "peft" in PART.value and not all(map(importlib.util.find_spec, ("torch", "peft"))):
        raise InputError("the part peft needs torch and peft: pip install 'mos_jax[interop]'")
    sizes = quick_sizes() if QUICK.value else Sizes()
    if ROUNDS.value:
        sizes = dataclasses.replace(sizes, rounds=ROUNDS.value)
    work, console = Path(WORKDIR.value), Console()
    work.mkdir(parents=True, exist_ok=True)

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False, style="dim")

    parts = {part: measure(part, work, sizes, THREADS.value, say) for part in PART.value}
    text = page(parts, shlex.join(["python", "experiments/bench_serving.py", *sys.argv[1:]]))
    print(text)
    if OUT.value:
        out = Path(OUT.value)
        out.mkdir(parents=True, exist_ok=True)
        (out / "serving.md").write_text(text, encoding="utf-8")
        data = json.dumps(parts, indent=1) + "\n"
        (out / "bench_serving.json").write_text(data, encoding="utf-8")
        if "tenants" in parts:
            from experiments.bench.serving_picture import serving_picture
            from mos_jax.reporting.style import png_bytes

            (out / "serving.png").write_bytes(png_bytes(serving_picture(parts["tenants"])))


if __name__ == "__main__":
    app.run(main)
