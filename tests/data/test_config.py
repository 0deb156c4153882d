from typing import Any

import pytest

from mos_jax.data import DataConfig
from mos_jax.errors import InputError


def test_defaults_and_given_values() -> None:
    config = DataConfig.create(task="ab", batch_size=3, test_examples=7)
    assert (config.task, config.batch_size, config.packing) == ("ab", 3, True)
    assert config.sizes == {"train": None, "validation": None, "test": 7}
    assert DataConfig.create() == DataConfig()


def test_unknown_field_names_the_nearest() -> None:
    with pytest.raises(InputError, match=r"data\.sequence_lenght .*mean 'sequence_length'"):
        DataConfig.create(sequence_lenght=3)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"task": ""}, "data.task is ''"),
        ({"task": 3}, "data.task is 3"),
        ({"train_examples": 0}, "data.train_examples is 0; .* at least 1"),
        ({"validation_examples": True}, "data.validation_examples is True"),
        ({"test_examples": 1.5}, "data.test_examples is 1.5"),
        ({"seed": -1}, "data.seed is -1"),
        ({"sequence_length": 1}, "data.sequence_length is 1; .* at least 2"),
        ({"batch_size": "8"}, "data.batch_size is '8'"),
        ({"packing": "yes"}, "data.packing is 'yes'"),
        ({"too_long": "trunc"}, "did you mean 'truncate'"),
        ({"too_long": 3}, "data.too_long is 3"),
        ({"task_options": [1]}, "data.task_options is"),
        ({"task_options": {1: 2}}, "data.task_options is"),
        ({"train_path": "a.jsonl"}, "data.train_path .*reads no file"),
        ({"task": "jsonl"}, "data.train_path is not set"),
        ({"task": "jsonl", "train_path": ""}, "data.train_path is ''"),
        (
            {"task": "jsonl", "train_path": "a", "task_options": {"b": 1}},
            "has no options",
        ),
    ],
)
def test_bad_values(section: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        DataConfig.create(**section)
