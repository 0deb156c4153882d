"""The MoS paper's training settings, as far as they are known, shared by configs/paper.

Known from the authors' scripts: all seven site types, dropout 0.1, batches of 16 examples of at
most 512 tokens, AdamW with linear decay after 3% warm-up, gradients clipped at 0.3, loss on the
answers alone, 10,000 steps. Everything marked "assumed" is not published. The base was NF4 with
double quantisation there and is bfloat16 here.
"""

from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from mos_jax.sweeps.combinators import arm
from mos_jax.sweeps.definition import SweepSection
from mos_jax.training.config import default_config

# What the best of the tried shards and private ranks was is not published.
SHARDS = 8  # assumed; tried there: 1, 2, 8 at e = 2 and 1 to 32 at e = 8
PRIVATE_RANK = 1  # assumed


def paper_config(base: str, steps: int = 10_000) -> ConfigDict:
    """A config for a base that lies in the folder `base`, on data in train.jsonl beside it."""
    config = default_config(
        "mos", equivalent_rank=2, rank=16, shards_per_vector=SHARDS, private_rank=PRIVATE_RANK
    )
    config.base.name = base
    config.base.dtype = "bfloat16"
    config.base.remat = "full"
    config.data.task = "jsonl"
    config.data.train_path = "train.jsonl"
    config.data.sequence_length = 512
    config.data.batch_size = 16
    config.data.packing = False  # assumed: a batch is 16 examples
    config.data.too_long = "truncate"  # assumed
    config.training.steps = steps
    config.training.learning_rate = 2e-4  # assumed: that of the authors' work before, PRoLoRA
    config.training.schedule = "linear"
    config.training.warmup_share = 0.03
    config.training.clip_norm = 0.3
    config.training.dropout = 0.1
    config.training.weight_decay = 0.0  # assumed
    config.training.b2 = 0.999  # assumed
    config.evaluation.every = 1000  # assumed
    config.checkpoint.every = 500
    config.sweep = vars(
        SweepSection(
            # assumed: PRoLoRA's two rates and one between
            learning_rates="5e-5,1e-4,2e-4",
            seeds=2,  # the paper's number; more is better
            baseline="LoRA e=2",
            budget_rank=2,
        )
    )
    return config


def main_table() -> Iterator[dict[str, Any]]:
    """LoRA and MoS at the paper's budgets; the active ranks are two of those tried there."""
    for rank in (2, 8, 16, 64):
        yield arm(f"LoRA e={rank}", method="lora", rank=rank)
    yield arm("MoS e=2", **mos(2, 16))
    yield arm("MoS e=8", **mos(8, 32))
    yield arm("PRoLoRA e=2", method="prolora", rank=8, unshared_rank=1, chunks_a=7, chunks_b=7)
    # At e = 8, where the paper takes MoS apart.
    yield arm("MoS e=8 -sp", **{**mos(8, 32), "private_rank": 0})
    yield arm("MoS e=8 -pd", **{**mos(8, 32), "pair_dissociation": False})
    yield arm("MoS e=8 -vs", **{**mos(8, 32), "shards_per_vector": 1})


def mos(equivalent_rank: int, rank: int) -> dict[str, Any]:
    """Fields of MoS with all strategies."""
    return {
        "method": "mos",
        "equivalent_rank": equivalent_rank,
        "rank": rank,
        "shards_per_vector": SHARDS,
        "private_rank": PRIVATE_RANK,
    }


def smallest_budget() -> Iterator[dict[str, Any]]:
    """The rows at the budget of LoRA of rank 2, where the paper shows its other models."""
    names = ("LoRA e=2", "MoS e=2", "PRoLoRA e=2")
    yield from (item for item in main_table() if item["arm"] in names)
