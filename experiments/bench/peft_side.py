"""The other side of both comparisons: PEFT's LoRA on transformers, fp32 on CPU.

The one module that imports torch. Weights and token ids are those of this library's base; the
tokenizer is this library's too, so that both sides learn the same ids.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

# Nothing is downloaded, and nothing is looked for.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import peft
import torch
import transformers

from experiments.bench.dense import dense_tokens
from experiments.bench.job import planned_steps
from experiments.bench.worker import Facts
from mos_jax.adapters.sites import SITE_MODULES
from mos_jax.data.load import load_data
from mos_jax.data.tokens import TokenExample, tokenize_example
from mos_jax.models.base import Base, load_base
from mos_jax.models.config import DecoderConfig
from mos_jax.training.config import RunConfig

IGNORED = -100
# Of transformers and PEFT about one another.
warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def transformers_model(base: Base) -> Any:
    """The base as a LlamaForCausalLM."""
    config, model = base.config, base.model
    # transformers holds [d_out, d_in]; its RoPE rotates halves, as here.
    weights: dict[str, Any] = {
        "model.embed_tokens.weight": model.embed,
        "model.norm.weight": model.final_norm,
    }
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}"
        norms = {"input_layernorm": "attn_norm", "post_attention_layernorm": "mlp_norm"}
        for module, norm in norms.items():
            weights[f"{prefix}.{module}.weight"] = model.weight(f"blocks/{norm}")[layer]
        for site, module in SITE_MODULES.items():
            weights[f"{prefix}.{module}.weight"] = model.weight(f"blocks/{site}")[layer].T
    weights["lm_head.weight"] = model.embed if model.head is None else model.head[...].T
    state = {name: torch.from_numpy(np.array(w[...])) for name, w in weights.items()}
    transformers.utils.logging.set_verbosity_error()
    made = transformers.LlamaForCausalLM(_llama_config(config))
    made.load_state_dict(state)
    return made


def _llama_config(config: DecoderConfig) -> Any:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_base}
    if config.rope_scaling is not None:
        scaling = dataclasses.asdict(config.rope_scaling)
        scaling["original_max_position_embeddings"] = scaling.pop("original_max_positions")
        rope |= {**scaling, "rope_type": "llama3"}
    return transformers.LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.d_model,
        intermediate_size=config.d_ff,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        rms_norm_eps=config.rms_eps,
        tie_word_embeddings=config.tied_embeddings,
        max_position_embeddings=config.max_positions,
        rope_parameters=rope,
        use_cache=False,
    )


def _lora(rank: int) -> Any:
    return peft.LoraConfig(
        r=rank, lora_alpha=16.0, target_modules=list(SITE_MODULES), task_type="CAUSAL_LM"
    )


class _OneDnnProduct(torch.autograd.Function):
    """x W^T through oneDNN, forward and backward to x; W [d_out, d_in] is frozen.

    PyTorch takes MKL for fp32, which leaves AVX-512 unused on processors that are not Intel's.
    """

    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any) -> Any:
        ctx.save_for_backward(weight)
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")

    @staticmethod
    def backward(ctx: Any, *slopes: Any) -> Any:
        (weight,) = ctx.saved_tensors
        slope = torch.ops.mkldnn._linear_pointwise(
            slopes[0].contiguous(), weight.t(), None, "none", [], ""
        )
        return slope, None


@contextlib.contextmanager
def _products_by(onednn: bool) -> Iterator[None]:
    """While it lasts, products with frozen weights go through oneDNN."""
    plain = torch.nn.Linear.forward

    def forward(module: Any, x: Any) -> Any:
        if module.bias is not None or module.weight.requires_grad:
            return plain(module, x)
        return _OneDnnProduct.apply(x, module.weight)

    if onednn:
        torch.nn.Linear.forward = forward
    try:
        yield
    finally:
        torch.nn.Linear.forward = plain


def _attend_with(model: Any, attention: str) -> None:
    model.base_model.model.set_attn_implementation(attention)


class PeftDense:
    """The dense step, by implementation of attention; see `worker.Side`."""

    def __init__(self, base: str, rank: int, shape: list[int], threads: int):
        torch.set_num_threads(threads)
        loaded = load_base(base)
        self._model = peft.get_peft_model(transformers_model(loaded), _lora(rank)).train()
        tokens = dense_tokens(loaded.config.vocab_size, *shape)
        self._tokens = torch.from_numpy(tokens.astype(np.int64))

    def prepare(self) -> dict[str, Facts]:
        """Computes the loss."""
        return {f"peft {way}": self._facts(way) for way in ("sdpa", "eager", "sdpa onednn")}

    def _facts(self, way: str) -> Facts:
        attention, *onednn = way.split()
        _attend_with(self._model, attention)
        trained = self._model.get_nb_trainable_parameters()[0]
        with _products_by(bool(onednn)):
            return {"loss": self._loss().item(), "trained_parameters": trained}

    def _loss(self) -> Any:
        return self._model(input_ids=self._tokens, labels=self._tokens).loss

    def run(self, contestant: str) -> float:
        """One step."""
        _, attention, *onednn = contestant.split()
        _attend_with(self._model, attention)
        self._model.zero_grad(set_to_none=True)
        with _products_by(bool(onednn)):
            start = time.perf_counter()
            self._loss().backward()
            return time.perf_counter() - start


@dataclasses.dataclass(frozen=True)
class Setting:
    """One way to run the Trainer: the batches, the LoRA, the attention, the products."""

    batches: str
    rank: int
    attention: str
    onednn: bool = False


class PeftJob:
    """The Trainer on the job, by setting; see `worker.Side`."""

    def __init__(self, config: Mapping[str, Any], steps: int, ranks: list[int], threads: int):
        torch.set_num_threads(threads)
        self._config = RunConfig.from_mapping(config)
        base = load_base(self._config.base.name)
        self._tokenizer = base.tokenizer
        data = load_data(self._config.data, base.tokenizer)
        self._train = data.train
        plan = planned_steps(data, self._config.training.seed, steps)
        same = [[index for row in rows for index in row] for rows in plan]
        lengths = [example.length for example in data.tokens["train"].examples]
        # What group-by-length comes to when it has just these examples to choose from.
        ordered = sorted((i for batch in same for i in batch), key=lambda i: -lengths[i])
        size = -(-len(ordered) // steps)
        grouped = [ordered[start : start + size] for start in range(0, len(ordered), size)]
        self._batches = {"same": same, "grouped": grouped}
        self._lengths = lengths
        first, *others = dict.fromkeys(ranks)
        self._model = peft.get_peft_model(transformers_model(base), _lora(first), f"r{first}")
        for rank in others:
            self._model.add_adapter(f"r{rank}", _lora(rank))
        self._settings = {
            f"peft r={first} {batches} {attention}": Setting(batches, first, attention)
            for batches in self._batches
            for attention in ("sdpa", "eager")
        }
        self._settings |= {
            f"peft r={first} grouped sdpa onednn": Setting("grouped", first, "sdpa", True),
            **{f"peft r={rank} grouped sdpa": Setting("grouped", rank, "sdpa") for rank in others},
        }

    def prepare(self) -> dict[str, Facts]:
        """Computes the loss of the first batch of the plan."""
        return {name: self._facts(setting) for name, setting in self._settings.items()}

    def _facts(self, setting: Setting) -> Facts:
        self._select(setting)
        batches = self._batches[setting.batches]
        longest = [max(self._lengths[i] for i in batch) for batch in batches]
        room = sum(width * len(batch) for width, batch in zip(longest, batches, strict=True))
        tokens = sum(self._lengths[i] for batch in batches for i in batch)
        # In the order of the plan, whatever the setting: the same loss for all.
        first = collate([self._row(i) for i in self._batches["same"][0]])
        with torch.no_grad(), _products_by(setting.onednn):
            loss = self._model(**first).loss.item()
        return {
            "loss": loss,
            "examples": sum(map(len, batches)),
            "steps": len(batches),
            "padding_share": 1 - tokens / room,
            "batch": f"{max(map(len, batches))} or fewer padded rows",
            "trained_parameters": self._model.get_nb_trainable_parameters()[0],
        }

    def _select(self, setting: Setting) -> None:
        self._model.set_adapter(f"r{setting.rank}")
        _attend_with(self._model, setting.attention)

    def _row(self, index: int) -> TokenExample:
        return tokenize_example(self._train[index], self._tokenizer)

    def run(self, contestant: str) -> float:
        """All batches once, by a Trainer that has taken one step before."""
        setting = self._settings[contestant]
        self._select(setting)
        batches = self._batches[setting.batches]
        clock = _Clock()
        with tempfile.TemporaryDirectory() as folder:
            trainer = _Trainer(
                model=self._model,
                args=_arguments(self._config, folder, len(batches) + 1),
                train_dataset=_Rows(self),
                callbacks=[clock],
            )
            # One to warm up, all, and one more, since the next batch is always made ahead.
            trainer.batches = [batches[-1], *batches, batches[0]]
            trainer.remove_callback(transformers.PrinterCallback)
            with _products_by(setting.onednn):
                trainer.train()
        return clock.ends[-1] - clock.ends[0]


def _arguments(config: RunConfig, folder: str, steps: int) -> Any:
    section = config.training
    return transformers.TrainingArguments(
        output_dir=str(Path(folder, "trainer")),
        max_steps=steps,
        optim="adamw_torch_fused",
        learning_rate=section.learning_rate,
        adam_beta1=section.b1,
        adam_beta2=section.b2,
        adam_epsilon=section.eps,
        weight_decay=section.weight_decay,
        max_grad_norm=section.clip_norm,
        use_cpu=True,
        dataloader_num_workers=0,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        logging_strategy="no",
        logging_nan_inf_filter=False,
        save_strategy="no",
        eval_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )


class _Rows(torch.utils.data.Dataset):
    """The training set as text; an example is tokenised when it is asked for."""

    def __init__(self, job: PeftJob):
        self._job = job

    def __len__(self) -> int:
        return len(self._job._train)

    def __getitem__(self, index: int) -> TokenExample:
        return self._job._row(index)


def collate(examples: Sequence[TokenExample]) -> dict[str, Any]:
    """Pads to the longest of the batch; only answers are labels."""
    width = max(example.length for example in examples)
    tokens = np.zeros((len(examples), width), np.int64)
    mask = np.zeros_like(tokens)
    labels = np.full_like(tokens, IGNORED)
    for row, example in enumerate(examples):
        tokens[row, : example.length] = example.tokens
        mask[row, : example.length] = 1
        labels[row, : example.length][example.is_target] = example.tokens[example.is_target]
    made = {"input_ids": tokens, "attention_mask": mask, "labels": labels}
    return {name: torch.from_numpy(array) for name, array in made.items()}


class _Trainer(transformers.Trainer):
    """The stock Trainer, told which examples make a batch."""

    batches: list[list[int]]

    def get_train_dataloader(self) -> Any:
        loader = torch.utils.data.DataLoader(
            self.train_dataset, batch_sampler=self.batches, collate_fn=collate
        )
        return self.accelerator.prepare(loader)


class _Clock(transformers.TrainerCallback):
    """Notes when each step ends."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.perf_counter())
