"""The core study: does MoS beat LoRA at one budget, is it as good at a fourth, what matters in it?

Command: python experiments/sweep.py --config=configs/core_study.py --workdir=runs/core
Hardware: 2 CPU cores. Time, result: see results/core_study.
Nine arms; three learning rates each, judged on validation data, then four seeds at the best one.
"""

from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from configs import study
from mos_jax.sweeps.combinators import arm


def get_config() -> ConfigDict:
    config = study.base_config()
    config.sweep.baseline = "LoRA e=2, LoRA e=8, MoS"
    config.sweep.learning_rates = "1e-3,2.5e-3,4e-3"
    return config


# A range test put the rate at which the loss turns up near 1e-2 for most arms, and near 3e-2 for
# the two whose many vectors are scaled down most; LoRA learned nothing at 6e-3 in 40 steps.
HIGH = {"sweep.learning_rates": "2e-3,5e-3,8e-3"}


def get_arms(config: ConfigDict) -> Iterator[dict[str, Any]]:
    del config  # the arms do not depend on what flags set
    yield study.lora(2)
    yield study.lora(8)
    for item in study.strategies():
        yield {**item, **(HIGH if item["arm"] == "-ss" else {})}
    yield {**study.pure_sharing(), **HIGH}
    # Chunks that divide every width of SmolLM2: 1 + 8 / 8 vectors, the budget exactly.
    yield arm("PRoLoRA", method="prolora", rank=9, unshared_rank=1, chunks_a=8, chunks_b=8)
