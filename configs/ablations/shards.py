"""How many shards a vector should be put together from: l at fixed e, r and p.

Command: python experiments/sweep.py --config=configs/ablations/shards.py --workdir=runs/shards
Hardware: 2 CPU cores. Time: --dry_run says. Result: not run.
l must divide every width of the base: 576, 1536 and 192 here, so powers of 2 up to 64, and 3.
"""

from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from configs import study
from mos_jax.sweeps.combinators import arm, grid, product


def get_config() -> ConfigDict:
    config = study.base_config()
    config.sweep.baseline = "l=1"
    return config


def get_arms(config: ConfigDict) -> Iterator[dict[str, Any]]:
    del config  # the arms do not depend on what flags set
    fixed = {k: v for k, v in study.MOS.items() if k != "shards_per_vector"}
    yield from product(
        [arm("", **fixed)],
        grid("adapter.shards_per_vector", [1, 2, 4, 8, 16, 32], label="l={}"),
    )
