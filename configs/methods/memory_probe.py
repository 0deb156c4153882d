r"""Memorises random pairs of token ids in the q and v projections alone (the memory probe).

Command: python experiments/train.py --config=configs/methods/memory_probe.py --workdir=runs/m
         python experiments/train.py --config=configs/methods/memory_probe.py:lora --workdir=runs/l
Hardware: 2 CPU cores. Time: a step of 64 pairs takes 1.0 seconds of CPU time, one of 128 takes 1.8.
Result: recall over steps. In these two projections alone LoRA and MoS recalled none of 512 pairs in
60 steps of 64 at 4e-3, nor of 256 in 40 at 2e-3; with --config.sites.include=all-linear they learn
128 pairs in 40 to 60, see results/studies.md. Training and evaluation ask the same pairs.
"""

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
    config.data.task_options = {"pairs": 256, "key_tokens": 3, "value_tokens": 2}
    # Rows of 16 pairs, so that a step sees 64 of them.
    config.data.batch_size = 4
    config.training.steps = 160
    config.training.learning_rate = 2e-3
    config.evaluation.every = 20
    config.evaluation.max_new_tokens = 2
    config.checkpoint.every = 100
    return config
