r"""LLaMA2-7B at the paper's settings: its main table and its ablation at e = 8.

Command: python experiments/sweep.py --config=configs/paper/llama2_7b.py \
             --workdir=runs/llama2_7b --config.base.name=path/to/Llama-2-7b-hf \
             --config.data.train_path=train.jsonl
Hardware: not tried; the weights in bfloat16 take 13.5 GB. What is assumed is marked in settings.py.
Result: not run here. The paper: LoRA e=2 34.98, e=8 36.89, e=64 37.53; MoS
36.39 at e=2 and 37.63 at e=8; averages of six scores, two seeds, the better of two ranks a task.
"""

from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from configs.paper import settings


def get_config() -> ConfigDict:
    return settings.paper_config("Llama-2-7b-hf")


def get_arms(config: ConfigDict) -> Iterator[dict[str, Any]]:
    del config  # the arms do not depend on what flags set
    yield from settings.main_table()
