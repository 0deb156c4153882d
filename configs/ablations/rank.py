"""How many vectors a block should put together from one budget: r at fixed e.

Command: python experiments/sweep.py --config=configs/ablations/rank.py --workdir=runs/rank
Hardware: 2 CPU cores. Time: --dry_run says. Result: not run.
alpha stays 16, so the scale alpha / r falls as r rises and the best learning rate moves with it:
each arm has three rates to choose from.
"""

from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from configs import study
from mos_jax.sweeps.combinators import arm, grid, product


def get_config() -> ConfigDict:
    config = study.base_config()
    config.sweep.baseline = "r=8"
    config.sweep.learning_rates = "1e-3,3e-3,9e-3"
    return config


def get_arms(config: ConfigDict) -> Iterator[dict[str, Any]]:
    del config  # the arms do not depend on what flags set
    fixed = {k: v for k, v in study.MOS.items() if k != "rank"}
    yield from product([arm("", **fixed)], grid("adapter.rank", [2, 4, 8, 16, 31], label="r={}"))
