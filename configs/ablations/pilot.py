"""The paper's pilot study: how sharing comes to work, one change at a time.

Command: python experiments/sweep.py --config=configs/ablations/pilot.py --workdir=runs/pilot
Hardware: 2 CPU cores. Time: --dry_run says. Result: not run as a whole; LoRA, pure sharing and MoS
are arms of results/core_study.
Subset selection alone has MoS's rank but neither shards, nor private vectors, nor dissociated
pairs; the paper does not say which ranks its pilot used beside e = 2, so these are assumed.
"""

from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from configs import study
from mos_jax.sweeps.combinators import arm, grid, product


def get_config() -> ConfigDict:
    config = study.base_config()
    config.sweep.baseline = "LoRA e=2"
    return config


def get_arms(config: ConfigDict) -> Iterator[dict[str, Any]]:
    del config  # the arms do not depend on what flags set
    yield study.lora(2)
    yield study.pure_sharing()
    yield from product(
        [study.pure_sharing()],
        grid("adapter.random_scaling", ["fixed"], label="+ random scaling"),
    )
    plain = {"shards_per_vector": 1, "private_rank": 0, "pair_dissociation": False}
    yield arm("pure sharing + subset selection", **{**study.MOS, **plain})
    yield arm("MoS", **study.MOS)
