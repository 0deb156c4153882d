"""PEFT's mixed batch: a different adapter in each row of transformers' `generate`.

The other module that imports torch. Weights, prompts and adapters are those of the engine: each
tenant's factors are written as a LoRA folder and loaded under its name.
"""

from __future__ import annotations

import os
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import peft
import torch

from experiments.bench.peft_side import transformers_model
from experiments.bench.worker import Facts
from mos_jax.adapters.storage import load_adapter
from mos_jax.interop.peft import export_peft
from mos_jax.models.base import load_base

BASE = "__base__"


class PeftMixed:
    """The side of PEFT; see `worker.Side`.

    Its contestants: "peft, all different"; "peft, one adapter", active for all rows as PEFT does it
    without `adapter_names`; and "peft, base", the model with its adapters disabled.
    """

    def __init__(
        self,
        base: str,
        tenants: dict[str, str],
        prompts: list[list[int]],
        max_tokens: int,
        threads: int,
    ):
        """Loads the model and one adapter for each prompt.

        Args:
          base: name of the base.
          tenants: folder by name, one for each prompt, in its order.
          prompts: token ids, all of one length.
          max_tokens: tokens to generate for each, whatever they are.
          threads: of torch.
        """
        torch.set_num_threads(threads)
        warnings.filterwarnings("ignore")  # of transformers and PEFT about one another
        loaded = load_base(base, "float32")
        layers = loaded.config.num_layers
        self._names, model = list(tenants), transformers_model(loaded)
        with tempfile.TemporaryDirectory() as folder:
            for name, path in tenants.items():
                factors = load_adapter(path, sites=loaded.sites).factors()
                written = export_peft(
                    Path(folder, name), factors, base_name=loaded.name, num_layers=layers
                )
                if isinstance(model, peft.PeftModel):
                    model.load_adapter(str(written), adapter_name=name)
                else:
                    model = peft.PeftModel.from_pretrained(model, written, adapter_name=name)
        self._model: Any = model.eval()
        self._tokens = torch.from_numpy(np.asarray(prompts, np.int64))
        self._most = max_tokens
        self._answers: dict[str, list[list[int]]] = {}

    def prepare(self) -> dict[str, Facts]:
        """Nothing to compile."""
        return {f"peft, {way}": {"tokens": self._tokens.shape[0] * self._most} for way in WAYS}

    def run(self, contestant: str) -> float:
        """Generates for all prompts at once, with a key-value cache, greedily."""
        start = time.perf_counter()
        self._answers[contestant] = self._generate(contestant.removeprefix("peft, "))
        return time.perf_counter() - start

    def told(self, contestant: str) -> Facts:
        """What the last run of a contestant gave."""
        answers = self._answers[contestant]
        return {"tokens": sum(map(len, answers)), "answers": answers}

    def _generate(self, way: str) -> list[list[int]]:
        options: dict[str, Any] = {
            "input_ids": self._tokens,
            "attention_mask": torch.ones_like(self._tokens),
            "max_new_tokens": self._most,
            "min_new_tokens": self._most,
            "do_sample": False,
            "use_cache": True,
            "pad_token_id": 0,
        }
        with torch.inference_mode():
            if way == "all different":
                made = self._model.generate(**options, adapter_names=self._names)
            elif way == "one adapter":
                self._model.set_adapter(self._names[0])
                made = self._model.generate(**options)
            else:
                with self._model.disable_adapter():
                    made = self._model.generate(**options)
        found: list[list[int]] = made[:, self._tokens.shape[1] :].tolist()
        return found


WAYS = ("all different", "one adapter", "base")
