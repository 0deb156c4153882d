r"""LLaMA3.2-3B at the paper's settings, one epoch.

Command: python experiments/sweep.py --config=configs/paper/llama32_3b.py \
             --workdir=runs/llama32_3b --config.base.name=path/to/Llama-3.2-3B \
             --config.data.train_path=train.jsonl
Hardware: not tried; the weights in bfloat16 take 6.4 GB. What is assumed is marked in settings.py.
Result: not run here. Set training.steps to your number of examples over 16, which is one epoch.
"""

from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from configs.paper import settings


def get_config() -> ConfigDict:
    return settings.paper_config("Llama-3.2-3B")


def get_arms(config: ConfigDict) -> Iterator[dict[str, Any]]:
    del config  # the arms do not depend on what flags set
    yield from settings.smallest_budget()
