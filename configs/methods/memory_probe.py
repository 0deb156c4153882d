r"""Memorises random pairs of token ids in the q and v projections alone (the memory probe)."""

from ml_collections import ConfigDict

from mos_jax.training.config import default_config

ADAPTERS = {
    "mos": {"equivalent_rank": 1, "rank": 4, "shards_per_vector": 2, "private_rank": 0},
    "lora": {"rank": 1},
}


def get_config(method: str = "mos") -> ConfigDict:
    config = default_config(method, **ADAPTERS.get(method, {}))
    config.base.name = "smollm2-135m-instruct"
    config.sites.include = "q_proj,v_proj"
    config.data.task = "memory"
    config.data.task_options = {"pairs": 512, "key_tokens": 3, "value_tokens": 2}
    # Rows of 16 pairs, so that a step sees 128 of them.
    config.data.batch_size = 8
    config.training.steps = 200
    config.training.learning_rate = 4e-3
    config.evaluation.every = 20
    config.evaluation.max_new_tokens = 2
    config.checkpoint.every = 100
    return config
