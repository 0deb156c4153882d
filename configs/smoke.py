"""The quickstart on a tiny random base: every part of a run in seconds, learning little.

Command: python experiments/train.py --config=configs/smoke.py --workdir=runs/smoke
Hardware: 2 CPU cores. Time: about 15 s. Result: accuracy near 0, as a random base must.
"""

from ml_collections import ConfigDict

from mos_jax.training.config import default_config


def get_config(method: str = "mos") -> ConfigDict:
    fields = {"mos": {"equivalent_rank": 2, "rank": 3, "shards_per_vector": 2, "private_rank": 1}}
    config = default_config(method, **fields.get(method, {}))
    config.base.name = "tiny-random"
    config.data.task = "family_relationships"
    config.data.train_examples = 64
    config.data.validation_examples = 8
    config.data.test_examples = 8
    config.data.sequence_length = 512
    config.data.batch_size = 2
    config.training.steps = 8
    config.evaluation.every = 4
    config.evaluation.samples = 1
    config.evaluation.max_new_tokens = 4
    config.checkpoint.every = 2
    return config
