r"""Fine-tunes on your own JSONL file: lines of {"prompt", "completion"} or {"messages"}.

Command: python experiments/train.py --config=configs/own_data.py --workdir=runs/mine \
             --config.data.train_path=mine.jsonl
Hardware: any. Time: on 2 CPU cores a step of the default base on 4 rows of 208 tokens takes 2.5 s.
Result: depends on the data.
Validation and test questions are split off the file unless they have files of their own
(data.validation_path, data.test_path); rows are as wide as four examples of mean length.
"""

from ml_collections import ConfigDict

from mos_jax.training.config import default_config


def get_config(method: str = "mos") -> ConfigDict:
    fields = {
        "mos": {"equivalent_rank": 2, "rank": 8, "shards_per_vector": 2, "private_rank": 1},
        "lora": {"rank": 2},
    }
    config = default_config(method, **fields.get(method, {}))
    config.data.task = "jsonl"
    config.data.train_path = "train.jsonl"
    config.data.batch_size = 4
    config.training.steps = 100
    config.training.learning_rate = 2e-3
    return config
