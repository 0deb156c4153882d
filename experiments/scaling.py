r"""How the cost of a training step grows with each of its sizes, as numbers and as pictures.

python experiments/scaling.py --out=results/scaling.json --pictures=results
python experiments/scaling.py --out=runs/scaling.json --parts=counts --parts=devices
python experiments/scaling.py --out=runs/scaling.json --quick

Parts. `counts`: operations, bytes and temporaries of the compiled step along rank, equivalent rank,
shards, blocks, tokens and rows. `devices`: the same and collectives on 1 to 8 devices that the CPU
pretends to be. `places`: assembly before the scan, inside it and not at all, for bases up to 7B.
These three run nothing and do not depend on the machine's load. `seconds`: real steps, in
interleaved rounds; only ratios count, and those of processor time most. The file is written after
each number; what it holds already is not measured again.
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
PARTS_OF = ["counts", "devices", "places", "seconds"]
OUT: Any = flags.DEFINE_string("out", None, "JSON file of all numbers; goes on with what it holds.")
PICTURES = flags.DEFINE_string("pictures", None, "Folder for the pictures.")
PARTS = flags.DEFINE_multi_enum("parts", PARTS_OF, PARTS_OF, "What to find out.")
BASE = flags.DEFINE_string("base", "smollm2-135m", "Known base whose sizes are counted.")
ROWS = flags.DEFINE_integer("rows", 2, "Rows of a batch where they are not varied.", lower_bound=1)
WIDTH = flags.DEFINE_integer("width", 128, "Tokens of a row, likewise.", lower_bound=1)
ROUNDS = flags.DEFINE_integer(
    "rounds", 3, "Rounds of real steps; one more warms up.", lower_bound=1
)
QUICK = flags.DEFINE_bool("quick", False, "A tiny base and one round: shows only that it works.")
flags.mark_flag_as_required("out")


def main(_: Sequence[str]) -> None:
    # Before JAX looks for devices.
    more = "--xla_force_host_platform_device_count=8"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {more}".strip()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

    from rich.console import Console

    from experiments.bench import scaling
    from experiments.bench.rounds import machine_facts
    from mos_jax.models.base import load_base
    from mos_jax.models.known import known_config
    from mos_jax.models.tiny import tiny_config
    from mos_jax.planning.costs import make_request
    from mos_jax.training.config import RunConfig

    console = Console()

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False, style="dim")

    chosen = CONFIG.value
    # Room for ranks of up to 64 in pools of all depths.
    chosen.adapter.equivalent_rank = 4
    if QUICK.value:
        chosen.base.name, chosen.adapter.rank = "tiny-random", 2
    config = RunConfig.from_mapping(chosen.to_dict())
    model = tiny_config() if QUICK.value else known_config(BASE.value)
    request = make_request(config, model, ROWS.value, WIDTH.value)
    notes = scaling.Notes(Path(OUT.value))
    notes.put("machine", machine_facts(len(os.sched_getaffinity(0))))
    notes.put("config", {**request.to_dict(), "parts": PARTS.value, "rounds": ROUNDS.value})
    parts = set(PARTS.value)
    if "places" in parts and not QUICK.value:
        scaling.compare_places(request, notes, say)
        print(scaling.places_table(notes.found))
    if "counts" in parts:
        scaling.count_scaling(request, notes, say)
    if "devices" in parts:
        # Enough rows for every device.
        scaling.count_devices(make_request(config, model, 8, WIDTH.value), notes, say)
    if "seconds" in parts:
        base = load_base(config.base.name)
        rounds = 1 if QUICK.value else ROUNDS.value
        scaling.time_places(request, base, rounds, notes, say)
        scaling.time_scaling(request, base, rounds, notes, say)
    if PICTURES.value:
        from mos_jax.reporting.scaling_pictures import write_pictures

        for path in write_pictures(notes.found, Path(PICTURES.value)):
            say(f"{path} written")


if __name__ == "__main__":
    app.run(main)
