r"""How the cost of a training step grows with each of its sizes, as numbers and as pictures.

python experiments/scaling.py --out=results/scaling.json --pictures=results
python experiments/scaling.py --out=runs/scaling.json --parts=counts --parts=devices
python experiments/scaling.py --out=runs/scaling.json --quick

Parts. `counts`: operations, bytes and temporaries of the compiled step along rank, equivalent rank,
shards, blocks, tokens and rows. `devices`: the same and collectives on 1 to 8 devices that the CPU
pretends to be. `places`: assembly before the scan, inside it and not at all, by rank and shards for
bases up to 7B. These three run nothing and do not depend on the machine's load. `seconds`: real
steps, for the places and along the sizes, in interleaved rounds; only ratios count, and those of
processor time most. The file is written after each number; what it holds of the same code,
configuration, versions and processor is not found again.
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
ROUNDS = flags.DEFINE_integer("rounds", 6, "Rounds of steps; one more warms up.", lower_bound=1)
TRIES = flags.DEFINE_integer("tries", 3, "How often a disturbed step is taken.", lower_bound=1)
QUICK = flags.DEFINE_bool("quick", False, "A tiny base and one round: shows only that it works.")
flags.mark_flag_as_required("out")


def main(_: Sequence[str]) -> None:
    # Before JAX looks for devices.
    own_flags, more = os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8"
    os.environ["XLA_FLAGS"] = f"{own_flags} {more}".strip()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

    from rich.console import Console

    from experiments.bench import scaling
    from experiments.bench.notes import Notes, maker
    from experiments.bench.rounds import Rounds
    from mos_jax.models.known import known_config
    from mos_jax.models.tiny import tiny_config
    from mos_jax.planning.costs import make_request
    from mos_jax.training.config import RunConfig

    console = Console()

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False, style="dim")

    chosen, quick, threads = CONFIG.value, QUICK.value, len(os.sched_getaffinity(0))
    # Room for ranks of up to 64 in pools of all depths.
    chosen.adapter.equivalent_rank = 4
    if quick:
        chosen.base.name, chosen.adapter.rank = "tiny-random", 2
        chosen.adapter.equivalent_rank = 16  # of two blocks
    config = RunConfig.from_mapping(chosen.to_dict())
    model = tiny_config() if quick else known_config(BASE.value)
    request = make_request(config, model, ROWS.value, WIDTH.value)
    # Enough rows for every device.
    more_rows = make_request(config, model, 8, WIDTH.value)
    notes = Notes(Path(OUT.value), maker(request.to_dict(), threads))
    parts = set(PARTS.value)
    if "places" in parts and not quick:
        scaling.compare_places(request, notes, say)
        print(scaling.places_table(notes.found))
    if "counts" in parts:
        scaling.count_scaling(request, notes, say)
    if "devices" in parts:
        scaling.count_devices(more_rows, notes, say)
    if "seconds" in parts:
        # The processes that are timed have one device.
        os.environ["XLA_FLAGS"] = own_flags
        rounds = Rounds(1 if quick else ROUNDS.value, threads, TRIES.value)
        timed = scaling.TIMED_QUICKLY if quick else scaling.TIMED
        scaling.time_places(more_rows, timed, rounds, notes, say)
        print(scaling.seconds_table(notes.found))
        scaling.time_scaling(request, rounds, notes, say)
    if PICTURES.value:
        from mos_jax.reporting.scaling_pictures import write_pictures

        for path in write_pictures(notes.found, Path(PICTURES.value)):
            say(f"{path} written")


if __name__ == "__main__":
    app.run(main)
