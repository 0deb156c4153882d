r"""One decode step with a different tenant in each row: where to assemble MoS, beside LoRA.

python experiments/bench_tenants.py --base=smollm2-135m --layers=6 --rows=8

Weights and tenants are random; only their sizes matter. FLOPs and bytes are what XLA counts in the
compiled step, in which the layers are a loop whose body counts once.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from mos_jax import app

# Python itself looks for modules beside this file only.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

BASE = flags.DEFINE_string("base", "smollm2-135m", "Name of a known model, for its sizes.")
LAYERS = flags.DEFINE_integer("layers", None, "Of its layers only so many.", lower_bound=1)
ROWS = flags.DEFINE_integer("rows", 8, "Rows of the batch.", lower_bound=1)
DTYPE = flags.DEFINE_string("dtype", "float32", "float32 or bfloat16, of base, cache and bank.")
EQUIVALENT_RANK = flags.DEFINE_integer("equivalent_rank", 2, "e of MoS.", lower_bound=1)
RANK = flags.DEFINE_integer("rank", 8, "r of MoS and of LoRA.", lower_bound=1)
ROUNDS = flags.DEFINE_integer("rounds", 15, "Timings of each form.", lower_bound=1)


def main(_: Sequence[str]) -> None:
    # Imported here so that --help and mistyped flags answer at once.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

    import dataclasses

    from experiments.bench.tenants import measure, table
    from mos_jax.adapters.factor_slots import check_dtype
    from mos_jax.adapters.mos import MoSConfig
    from mos_jax.models.known import known_config

    check_dtype(DTYPE.value)
    config = known_config(BASE.value)
    if LAYERS.value:
        config = dataclasses.replace(config, num_layers=LAYERS.value)
    mos = MoSConfig(EQUIVALENT_RANK.value, RANK.value, shards_per_vector=2)
    measured = measure(
        config, mos, ROWS.value, DTYPE.value, ROUNDS.value, lambda text: print(text, flush=True)
    )
    print(table(measured))


if __name__ == "__main__":
    app.run(main)
