r"""What a training step needs on TPUs, from the real TPU compiler, without a TPU and weights.

`make planner` builds the environment that the compiler lives in, once. A compile takes
minutes; on a busy machine over twenty. What was compiled before is kept in the user's cache and
costs nothing.

python experiments/plan.py --config=configs/paper/llama2_7b.py --topology=v5e:4x4
python experiments/plan.py --config=configs/paper/llama2_7b.py --topology=v5e:4x4 \
  --mesh=1,4,4 --config.base.remat=products
python experiments/plan.py --config=configs/paper/llama2_7b.py --topology=v5e:4x4 \
  --search --tries=6 --rows=16,32
python experiments/plan.py --config=configs/quickstart.py --topology=v5e:1x1 --json
"""

import json
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from mos_jax import app

CONFIG = app.define_config("configs/paper/llama2_7b.py")
TOPOLOGY = flags.DEFINE_string("topology", None, "Chips: v5e:4x4, v5p:2x2x2, v6e:2x4, ...")
MESH = flags.DEFINE_list(
    "mesh", None, "Sizes of data, fsdp and tensor, -1 for what is left. Default: the config's, or "
    "fsdp as far as the rows go and tensor for the rest.",
)  # fmt: skip
TARGETS = flags.DEFINE_integer("targets", None, "Room for targets in a row. Default: the data's.")
SEARCH = flags.DEFINE_bool("search", False, "Try meshes, batches and remat policies; rank them.")
ROWS = flags.DEFINE_list(
    "rows", None, "Batches of a search. Default: 1, 2 and 4 times the config's."
)
REMAT = flags.DEFINE_list("remat", None, "Policies of a search. Default: products,attention,full.")
TRIES = flags.DEFINE_integer(
    "tries", 6, "Compiles of a search at most, and of knobs where a step does not fit.",
    lower_bound=0,
)  # fmt: skip
JSON = flags.DEFINE_bool("json", False, "Print JSON instead.")
CACHE = flags.DEFINE_string("cache", None, "Folder of compiled steps. Default: the user's cache.")
PYTHON = flags.DEFINE_string("python", None, "Python with libtpu. Default: that of `make planner`.")


def main(_: Sequence[str]) -> None:
    # Imported here so that --help and mistyped flags answer at once.
    from rich.console import Console

    from mos_jax.errors import InputError
    from mos_jax.planning.chips import find_slice
    from mos_jax.planning.compiling import Compiler
    from mos_jax.planning.plan import advise, make_plan
    from mos_jax.planning.report import print_plan, print_ranking
    from mos_jax.planning.resolving import make_request, whole_numbers
    from mos_jax.planning.search import check_search, search
    from mos_jax.training.config import RunConfig

    if not TOPOLOGY.value:
        raise InputError("--topology is missing; for example --topology=v5e:4x4")
    chips = find_slice(TOPOLOGY.value)
    config = RunConfig.from_mapping(CONFIG.value.lock().to_dict())
    mesh = None if MESH.value is None else whole_numbers("--mesh", MESH.value, 3)
    rows = whole_numbers("--rows", ROWS.value or [])
    request, notes = make_request(config, chips, mesh, TARGETS.value)
    compiler = Compiler(Path(CACHE.value) if CACHE.value else None, PYTHON.value)
    console = Console(stderr=JSON.value, soft_wrap=False)
    if SEARCH.value:
        check_search(request, rows, REMAT.value or ())
        ranking = search(
            request, compiler, TRIES.value, rows, REMAT.value or (),
            lambda plan: console.print(plan.in_words(), highlight=False),
        )  # fmt: skip
        if JSON.value:
            print(json.dumps({"assumed": notes, **ranking.to_dict()}, indent=1))
        else:
            print_ranking(ranking, console)
        return
    plan = make_plan(request, compiler)
    if not JSON.value:
        print_plan(plan, notes, console)
    tried = []
    # Knobs make a step smaller, which helps against nothing else.
    if plan.excess is not None and plan.excess > 0:
        tried = advise(
            request, compiler, TRIES.value,
            lambda knob, words: console.print(f"  with {knob}: {words}", highlight=False),
        )  # fmt: skip
    if JSON.value:
        knobs = [{"flags": knob, **other.to_dict()} for knob, other in tried]
        print(json.dumps({"assumed": notes, **plan.to_dict(), "knobs": knobs}, indent=1))


if __name__ == "__main__":
    app.run(main)
