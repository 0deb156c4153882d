"""How much of the budget should be private: p at fixed e and r, from none to plain LoRA.

Command: python experiments/sweep.py --config=configs/ablations/private_rank.py \
             --workdir=runs/private_rank
Hardware: 2 CPU cores. Time: --dry_run says. Result: not run.
At e = 4, so that there is something between the ends. At p = e nothing is public, so r = e: that
arm is LoRA of rank 4.
"""

from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from configs import study
from mos_jax.sweeps.combinators import arm, chain, grid, product


def get_config() -> ConfigDict:
    config = study.base_config()
    config.sweep.baseline = "p=0"
    config.sweep.budget_rank = 4
    return config


def get_arms(config: ConfigDict) -> Iterator[dict[str, Any]]:
    del config  # the arms do not depend on what flags set
    fixed = {**study.MOS, "equivalent_rank": 4, "rank": 16}
    del fixed["private_rank"]
    yield from chain(
        product([arm("", **fixed)], grid("adapter.private_rank", [0, 1, 2, 3], label="p={}")),
        [arm("p=4 (LoRA)", **{**fixed, "private_rank": 4, "rank": 4})],
    )
