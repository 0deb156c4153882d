"""MoS without each of its four strategies, at one budget.

Command: python experiments/sweep.py --config=configs/ablations/strategies.py \
             --workdir=runs/strategies
Hardware: 2 CPU cores. Time: --dry_run says. Result: these are five of the nine arms of
results/core_study.
"""

from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from configs import study


def get_config() -> ConfigDict:
    config = study.base_config()
    config.sweep.baseline = "MoS"
    return config


def get_arms(config: ConfigDict) -> Iterator[dict[str, Any]]:
    del config  # the arms do not depend on what flags set
    yield from study.strategies()
