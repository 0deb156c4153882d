"""Fine-tunes SmolLM2-135M-Instruct with MoS on who is related to whom.

Command: python experiments/train.py --config=configs/quickstart.py --workdir=runs/q
         python experiments/train.py --config=configs/quickstart.py:lora --workdir=runs/lora
Hardware: 2 CPU cores. Time: 4 minutes (70 steps of about 12 questions, evaluation on 256).
Result: exact match 0.516 (95% 0.455 to 0.576), the base 0.000, the commonest answer 0.141.
"""

from ml_collections import ConfigDict

from mos_jax.training.config import default_config

ADAPTERS = {
    "mos": {"equivalent_rank": 2, "rank": 8, "shards_per_vector": 2, "private_rank": 1},
    "lora": {"rank": 2},
}


def get_config(method: str = "mos") -> ConfigDict:
    config = default_config(method, **ADAPTERS.get(method, {}))
    config.base.name = "smollm2-135m-instruct"
    config.data.task = "family_relationships"
    config.data.train_examples = 2000
    config.data.validation_examples = 64
    config.data.test_examples = 256
    # The 24 tokens that all prompts begin with and three questions fill such a row to 95%.
    config.data.sequence_length = 208
    config.data.batch_size = 4
    config.training.steps = 70
    config.training.learning_rate = 4e-3
    config.evaluation.every = 35
    config.checkpoint.every = 25
    return config
