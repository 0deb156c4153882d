"""The memory probe as a sweep: how fast, and how much, do LoRA and MoS learn by heart?

Command: python experiments/sweep.py --config=configs/memory_study.py --workdir=runs/memory
Hardware: 2 CPU cores. Time: 13 minutes. Result: results/studies.md; MoS learns later than LoRA.
All seven site types at the budgets of LoRA of rank 1 and 2. Training, validation and test ask the
same pairs, since recall is measured: the rate is chosen on the pairs that are reported, with
other seeds.
"""

from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from mos_jax.sweeps.combinators import arm
from mos_jax.sweeps.definition import SweepSection
from mos_jax.training.config import default_config


def get_config() -> ConfigDict:
    config = default_config("lora", rank=1)
    config.base.name = "smollm2-135m-instruct"
    config.data.task = "memory"
    config.data.task_options = {"pairs": 128, "key_tokens": 3, "value_tokens": 2}
    # Rows of 16 pairs, so that a step sees 64 of them.
    config.data.batch_size = 4
    config.training.steps = 48
    config.training.warmup_share = 0.1
    config.evaluation.every = 8
    config.evaluation.max_new_tokens = 2
    config.checkpoint.every = 24
    config.checkpoint.keep = 1
    config.logging.tensorboard = False
    config.sweep = vars(
        SweepSection(learning_rates="2e-3,4e-3", seeds=3, baseline="LoRA e=1", budget_rank=1)
    )
    return config


def get_arms(config: ConfigDict) -> Iterator[dict[str, Any]]:
    del config  # the arms do not depend on what flags set
    for rank in (1, 2):
        yield arm(f"LoRA e={rank}", method="lora", rank=rank)
        yield arm(
            f"MoS e={rank}",
            method="mos",
            equivalent_rank=rank,
            rank=4 * rank,
            shards_per_vector=2,
            private_rank=rank - 1,
        )
