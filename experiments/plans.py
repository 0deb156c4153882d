r"""LLaMA2 at the paper's settings on TPU slices: MoS beside LoRA, as a table.

Every cell is one compile: minutes; on a busy machine over twenty. What was compiled before costs
nothing, so a call that was stopped goes on where it was. The files are written anew after every
cell; those that --out holds already stay until they are compiled anew, and every cell says what it
was made with.

python experiments/plans.py --out=results/plans.json --report=results/plans.md
python experiments/plans.py --out=results/plans.json --report=results/plans.md --missing_only
python experiments/plans.py --out=results/plans.json --report=results/plans.md --known_only
python experiments/plans.py --out=results/plans.json --report=results/plans.md --outdated_only \
  --only=MoS
python experiments/plans.py --out=runs/7b.json --report=runs/7b.md --only=llama2-7b --only=MoS
"""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from mos_jax import app

OUT = flags.DEFINE_string("out", None, "JSON file; what it holds already stays.")
REPORT = flags.DEFINE_string("report", None, "Markdown file.")
ONLY = flags.DEFINE_multi_string("only", [], "Only cells whose names hold this, or all of these.")
MISSING_ONLY = flags.DEFINE_bool("missing_only", False, "Leave out what --out holds.")
OUTDATED_ONLY = flags.DEFINE_bool(
    "outdated_only", False, "Only what --out holds, made by other code than this."
)
KNOWN_ONLY = flags.DEFINE_bool("known_only", False, "Leave out what would cost a compile.")
CACHE = flags.DEFINE_string("cache", None, "Folder of compiled steps. Default: the user's cache.")
PYTHON = flags.DEFINE_string("python", None, "Python with libtpu. Default: that of `make planner`.")

MODELS = ("Llama-2-7b-hf", "Llama-2-13b-hf", "Llama-2-70b-hf")
# What is cheap to compile and tells most comes first.
TOPOLOGIES = ("v5p:2x2x2", "v5e:16x16", "v5p:4x4x4", "v5e:2x4", "v5e:8x8", "v5e:1x1")
# Where adapters of more rank are planned as well.
LARGER = ("v5e:2x4", MODELS[0])
# By name, the method and its rank, and of MoS the equivalent rank.
ADAPTERS = {
    "MoS e=2 r=16": ("mos", 16, 2),
    "LoRA r=16": ("lora", 16, 0),
    "MoS e=8 r=32": ("mos", 32, 8),
    "LoRA r=32": ("lora", 32, 0),
    "LoRA r=64": ("lora", 64, 0),
}
REMARKS = (
    "At e = 2 and r = 16, LoRA of the same active rank and LoRA of 8 times the budget, which the "
    "paper says MoS matches, are one: rank 16. At e = 8 and r = 32 they are ranks 32 and 64.",
)


def cells() -> Iterator[Any]:
    from configs.paper import settings
    from mos_jax.planning.chips import find_slice
    from mos_jax.planning.resolving import make_request
    from mos_jax.planning.study import Cell
    from mos_jax.training.config import RunConfig, default_config

    first, second, *others = ADAPTERS
    # A pair after the other, so that each stands beside its rival as soon as it is there.
    places = itertools.product(TOPOLOGIES, MODELS)
    wanted = [(name, *place) for place in places for name in (first, second)]
    after = 2 * len(MODELS)
    wanted[after:after] = [(name, *LARGER) for name in others]
    for name, topology, model in wanted:
        config = settings.paper_config(model)
        method, rank, equivalent = ADAPTERS[name]
        if method == "lora":
            config.adapter = default_config("lora").adapter
        else:
            config.adapter.equivalent_rank = equivalent
        config.adapter.rank = rank
        run = RunConfig.from_mapping(config.to_dict())
        request, notes = make_request(run, find_slice(topology))
        yield Cell(name, request, tuple(notes))


def main(_: Sequence[str]) -> None:
    from rich.console import Console

    from mos_jax.errors import InputError
    from mos_jax.planning.compiling import Compiler
    from mos_jax.planning.study import run_study

    if not OUT.value or not REPORT.value:
        raise InputError("--out or --report is missing; see --help")
    if MISSING_ONLY.value and OUTDATED_ONLY.value:
        raise InputError("--missing_only and --outdated_only leave no cell; give one of them")
    chosen = [cell for cell in cells() if all(word in cell.name for word in ONLY.value)]
    if not chosen:
        raise InputError(f"no cell has {' and '.join(ONLY.value)} in its name; see --help")
    run_study(
        chosen,
        Compiler(Path(CACHE.value) if CACHE.value else None, PYTHON.value),
        Path(OUT.value),
        Path(REPORT.value),
        "make plans",
        REMARKS,
        KNOWN_ONLY.value,
        "missing" if MISSING_ONLY.value else "outdated" if OUTDATED_ONLY.value else "all",
        lambda words: Console().print(words, highlight=False),
    )


if __name__ == "__main__":
    app.run(main)
