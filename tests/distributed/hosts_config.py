"""The run of test_hosts.py, as the file of a config: `hosts_config.py:DATA`."""

from ml_collections import ConfigDict

from tests.training.fixtures_training import tiny_mapping

STEPS = 8


def get_config(train_path):
    mapping = tiny_mapping(
        train_path,
        steps=STEPS,
        schedule="constant",
        warmup_share=0.0,
        dropout=0.1,
        eps=1e-3,  # see on_eight.py
        accumulation=2,
    )
    mapping["data"]["batch_size"] = 4
    return ConfigDict(mapping)
