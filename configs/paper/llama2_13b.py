r"""LLaMA2-13B at the paper's settings, at the budget of LoRA of rank 2.

Command: python experiments/sweep.py --config=configs/paper/llama2_13b.py \
             --workdir=runs/llama2_13b --config.base.name=path/to/Llama-2-13b-hf \
             --config.data.train_path=train.jsonl
Hardware: not tried; the weights in bfloat16 take 26 GB. What is assumed is marked in settings.py.
Result: not run here. The paper: LoRA 43.92, PRoLoRA 45.04, MoS 45.98.
"""

from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from configs.paper import settings


def get_config() -> ConfigDict:
    return settings.paper_config("Llama-2-13b-hf")


def get_arms(config: ConfigDict) -> Iterator[dict[str, Any]]:
    del config  # the arms do not depend on what flags set
    yield from settings.smallest_budget()
