r"""Checks the accelerator that JAX finds: same results as the CPU, time of a step, memory, costs.

python experiments/check_accelerator.py
python experiments/check_accelerator.py --out=runs/accelerator.json --config.base.dtype=bfloat16
python experiments/check_accelerator.py --config=configs/smoke.py --rows=2 --width=32 --rounds=2

Four parts, on JAX's first device. Parity: logits, loss, gradients, a few training steps and greedy
decoding beside the same on the CPU of this process, with a base in fp32 and in bf16 and with the
attention that the device would use. Time: real training steps in the dtype of the config. Memory:
what the compiled step needs and what the device says it used. Costs: operations, bytes and
temporaries of the step compiled for this device, for both places of assembly. Without an
accelerator the CPU is compared with itself, which is said: then only the script is shown to work.
Ends with status 1 if a result is beyond its tolerance.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from mos_jax import app

# Python itself looks for modules beside this file only.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

CONFIG = app.define_config("configs/quickstart.py")
OUT = flags.DEFINE_string("out", None, "JSON file for all that was found.")
ROWS = flags.DEFINE_integer("rows", 8, "Rows of a timed batch.", lower_bound=1)
WIDTH = flags.DEFINE_integer("width", 512, "Tokens of a row.", lower_bound=1)
ROUNDS = flags.DEFINE_integer("rounds", 10, "Timed steps; two more warm up.", lower_bound=1)


def main(_: Sequence[str]) -> None:
    # Imported here so that --help and mistyped flags answer at once.
    import jax
    from rich.console import Console

    from experiments.bench.accelerator import print_found
    from mos_jax.errors import RunEnded
    from mos_jax.models.base import outline_base
    from mos_jax.planning.costs import assembled, make_request, step_costs, vary
    from mos_jax.training.accelerator import compare, find_devices, time_step
    from mos_jax.training.config import ASSEMBLIES, RunConfig

    config = RunConfig.from_mapping(CONFIG.value.to_dict())
    console = Console()
    device, cpu = find_devices()
    alone = device == cpu
    console.print(f"device: {device.device_kind} ({device.platform}), jax {jax.__version__}")
    if alone:
        console.print(
            "no accelerator here: the CPU is compared with itself, which shows that this script "
            "works and nothing of an accelerator",
            style="bold",
        )
    rows, width = ROWS.value, WIDTH.value
    compared = compare(config, device, cpu)
    timed = time_step(config, device, rows, width, ROUNDS.value)
    request = make_request(config, outline_base(config.base.name).config, rows, width)
    rank = getattr(config.adapter, "rank", None)
    costs = {
        f"r={value}, {where}": step_costs(assembled(vary(request, "rank", value), where)).to_dict()
        for value in ([rank] if config.adapter.method == "mos" and rank else [])
        for where in ASSEMBLIES
    }
    found = {
        "device": {"kind": device.device_kind, "platform": device.platform, "is_cpu": alone},
        "config": config.to_dict(),
        "batch": [rows, width],
        "compared": [{**vars(one), "within": one.within} for one in compared],
        "step": timed,
        "costs": costs,
    }
    print_found(found, console)
    if OUT.value:
        Path(OUT.value).parent.mkdir(parents=True, exist_ok=True)
        Path(OUT.value).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    beyond = [one for one in compared if not one.within]
    if beyond:
        words = ", ".join(f"{one.name} ({one.dtype}, {one.attention})" for one in beyond)
        raise RunEnded(f"{len(beyond)} of {len(compared)} results are beyond tolerance: {words}")


if __name__ == "__main__":
    app.run(main)
