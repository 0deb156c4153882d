"""The core study: does MoS beat LoRA at one budget, is it as good at a fourth, what matters in it?

Command: python experiments/sweep.py --config=configs/core_study.py --workdir=runs/core
Hardware: 2 CPU cores. Time: 1.4 hours. Result: results/studies.md; MoS 0.324 (95% 0.275 to 0.377),
LoRA 0.330 at the same budget, and without subset selection MoS is worse.
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
    return config


def get_arms(config: ConfigDict) -> Iterator[dict[str, Any]]:
    del config  # the arms do not depend on what flags set
    yield study.lora(2)
    yield study.lora(8)
    yield from study.strategies()
    yield study.pure_sharing()
    # Chunks that divide every width of SmolLM2: 1 + 8 / 8 vectors, the budget exactly.
    yield arm("PRoLoRA", method="prolora", rank=9, unshared_rank=1, chunks_a=8, chunks_b=8)
