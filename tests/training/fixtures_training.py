"""Runs on a tiny base and a small JSONL file: seconds, no generated task."""

import json

from mos_jax.training.config import RunConfig, default_config


def write_data(folder, count=24):
    path = folder / "train.jsonl"
    lines = [
        json.dumps({"prompt": f"what comes after {i}?", "completion": str(i + 1)})
        for i in range(count)
    ]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def tiny_mapping(train_path, **training):
    config = default_config("mos", equivalent_rank=2, rank=3, shards_per_vector=2, private_rank=1)
    config.base.name = "tiny-random"
    config.data.task = "jsonl"
    config.data.train_path = train_path
    config.data.validation_examples = 2
    config.data.test_examples = 2
    config.data.batch_size = 2
    config.evaluation.every = 0
    config.evaluation.samples = 0
    config.evaluation.test_at_end = False
    config.evaluation.max_new_tokens = 4
    config.logging.tensorboard = False
    config.checkpoint.every = 2
    for name, value in {"steps": 6, **training}.items():
        config.training[name] = value
    return config.to_dict()


def tiny_run(train_path, **training):
    return RunConfig.from_mapping(tiny_mapping(train_path, **training))
