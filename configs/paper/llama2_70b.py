r"""LLaMA2-70B at the ranks and settings of the paper's smaller models, which it does not go beyond.

Command: python experiments/sweep.py --config=configs/paper/llama2_70b.py \
             --workdir=runs/llama2_70b --config.base.name=path/to/Llama-2-70b-hf \
             --config.data.train_path=train.jsonl
         python experiments/plan.py --config=configs/paper/llama2_70b.py --topology=v5p:2x2x2
Hardware: not tried; the weights in bfloat16 take 138 GB. What is assumed is marked in settings.py.
Result: not run here, nor in the paper; results/plans.md says what a step needs.
"""

from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from configs.paper import settings


def get_config() -> ConfigDict:
    return settings.paper_config("Llama-2-70b-hf")


def get_arms(config: ConfigDict) -> Iterator[dict[str, Any]]:
    del config  # the arms do not depend on what flags set
    yield from settings.smallest_budget()
