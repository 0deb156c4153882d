"""What the sweeps in configs/ablations and configs/methods have in common.

The base, the task and the training of every arm, and the arms that several of them share. The task
is sums of two or three numbers of one or two digits: short questions, the commonest answer is
right for one in twenty-five, and LoRA's learning curve still rises when the runs end.
"""

from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from mos_jax.sweeps.combinators import arm
from mos_jax.sweeps.definition import SweepSection
from mos_jax.training.config import default_config

# MoS at the budget of LoRA of rank 2, all strategies on: the paper's first budget.
MOS: dict[str, Any] = {
    "method": "mos",
    "equivalent_rank": 2,
    "rank": 8,
    "shards_per_vector": 2,
    "private_rank": 1,
}

# A range test put the rate at which the loss turns up near 1e-2 for most arms, and near 3e-2 for
# the two whose many vectors are scaled down most; LoRA learned nothing at 6e-3 in 40 steps.
RATES = "1e-3,2.5e-3,4e-3"
HIGH = {"sweep.learning_rates": "2e-3,5e-3,8e-3"}


def base_config() -> ConfigDict:
    config = default_config("mos", **{k: v for k, v in MOS.items() if k != "method"})
    config.base.name = "smollm2-135m-instruct"
    config.data.task = "chain_sum"
    config.data.task_options = {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2}
    config.data.train_examples = 2000
    config.data.validation_examples = 128
    config.data.test_examples = 256
    config.data.sequence_length = 208
    config.data.batch_size = 3
    config.training.steps = 40
    config.training.learning_rate = 2e-3
    config.training.warmup_share = 0.1
    config.evaluation.every = 0
    config.evaluation.samples = 0
    config.checkpoint.every = 20
    config.checkpoint.keep = 1
    config.logging.tensorboard = False
    config.sweep = vars(SweepSection(learning_rates=RATES, seeds=4, budget_rank=2))
    return config


def strategies() -> Iterator[dict[str, Any]]:
    """MoS, and MoS without each of its four strategies."""
    yield arm("MoS", **MOS)
    # Every block uses all shards, so the rank follows from the pool: p + (e - p) L.
    yield arm("-ss", HIGH, **{**MOS, "subset_selection": False, "rank": None})
    yield arm("-pd", **{**MOS, "pair_dissociation": False})
    yield arm("-vs", **{**MOS, "shards_per_vector": 1})
    yield arm("-sp", **{**MOS, "private_rank": 0})


def lora(rank: int) -> dict[str, Any]:
    """LoRA of this rank."""
    return arm(f"LoRA e={rank}", method="lora", rank=rank)


def pure_sharing() -> dict[str, Any]:
    """The pilot study's arm: every block uses all vectors of one pair of pools."""
    return arm(
        "pure sharing",
        HIGH,
        method="mos",
        equivalent_rank=2,
        rank=None,
        subset_selection=False,
        pair_dissociation=False,
    )
