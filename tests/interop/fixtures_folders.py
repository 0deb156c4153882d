"""PEFT folders of every type that is read, written by hand: no PEFT and no adapter of ours."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from mos_jax.adapters.sites import SITE_MODULES, SiteShape

# Widths that differ everywhere, so that no two axes are mistaken for each other.
SITES = {
    "q_proj": SiteShape(3, 8, 12),
    "up_proj": SiteShape(3, 8, 16),
    "down_proj": SiteShape(3, 16, 4),
}
TARGETS = ("q_proj", "down_proj")
COMMON = {
    "base_model_name_or_path": "org/base",
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "layers_pattern": None,
    "layers_to_transform": None,
    "modules_to_save": None,
    "peft_version": "0.21.2",
    "target_modules": list(TARGETS),
    "task_type": "CAUSAL_LM",
}
FIELDS: dict[str, dict[str, Any]] = {
    "LORA": {
        "r": 3,
        "lora_alpha": 6,
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_dora": False,
        "init_lora_weights": True,
        "lora_dropout": 0.1,
    },
    "VERA": {
        "r": 5,
        "projection_prng_key": 3,
        "save_projection": True,
        "d_initial": 0.1,
        "vera_dropout": 0.1,
        "init_weights": True,
    },
    "VBLORA": {
        "r": 2,
        "num_vectors": 6,
        "vector_length": 4,
        "topk": 2,
        "save_only_topk_weights": False,
        "vblora_dropout": 0.0,
        "init_vector_bank_bound": 0.02,
        "init_logits_std": 0.1,
    },
    "UNILORA": {
        "r": 2,
        "theta_d_length": 50,
        "proj_seed": 42,
        "save_indices": True,
        "unilora_dropout": 0.0,
        "init_weights": True,
        "init_theta_d_bound": 0.02,
    },
}


def module(name: str, layer: int) -> str:
    return f"base_model.model.model.layers.{layer}.{SITE_MODULES[name]}"


def every(targets=TARGETS, layers=(0, 1, 2)):
    return [(name, layer) for layer in layers for name in targets]


def random_tensors(kind: str, fields: dict[str, Any], chosen) -> dict[str, np.ndarray]:
    """Tensors as PEFT names, shapes and stores them."""
    random = np.random.default_rng(0)
    r = fields["r"]

    def normal(*shape):
        return random.normal(size=shape).astype(np.float32)

    tensors, shapes = {}, {site: SITES[site[0]] for site in chosen}
    if kind == "LORA":
        for (name, layer), shape in shapes.items():
            rank = fields["rank_pattern"].get(name, r)
            tensors[f"{module(name, layer)}.lora_A.weight"] = normal(rank, shape.d_in)
            tensors[f"{module(name, layer)}.lora_B.weight"] = normal(shape.d_out, rank)
    elif kind == "VERA":
        tensors["base_model.vera_A"] = normal(r, max(s.d_in for s in shapes.values()))
        tensors["base_model.vera_B"] = normal(max(s.d_out for s in shapes.values()), r)
        for (name, layer), shape in shapes.items():
            tensors[f"{module(name, layer)}.vera_lambda_d"] = normal(r)
            tensors[f"{module(name, layer)}.vera_lambda_b"] = normal(shape.d_out)
    elif kind == "VBLORA":
        count, b = fields["num_vectors"], fields["vector_length"]
        tensors["base_model.vblora_vector_bank"] = normal(count, b)
        for (name, layer), shape in shapes.items():
            stem = module(name, layer)
            tensors[f"{stem}.vblora_logits_A"] = normal(r, shape.d_in // b, count)
            tensors[f"{stem}.vblora_logits_B"] = normal(shape.d_out // b, r, count)
    elif kind == "UNILORA":
        tensors["base_model.unilora_theta_d"] = normal(fields["theta_d_length"])
        if fields["save_indices"]:
            tensors |= index_tensors(random, fields, shapes)
    return tensors


def index_tensors(random, fields, shapes):
    r, length = fields["r"], fields["theta_d_length"]
    pairs = {site: ((r, s.d_in), (s.d_out, r)) for site, s in shapes.items()}
    total = sum(math.prod(shape) for pair in pairs.values() for shape in pair)
    index = np.arange(total) % length
    index = random.permutation(length)[index]  # so that not the first ones are used once more
    random.shuffle(index)
    scales = 1 / np.sqrt(np.bincount(index, minlength=length))
    tensors, start = {}, 0
    for (name, layer), pair in pairs.items():
        for side, shape in zip("AB", pair, strict=True):
            places = index[start : start + math.prod(shape)].reshape(shape)
            start += places.size
            tensors[f"{module(name, layer)}.unilora_indices_{side}"] = places.astype(np.int64)
            tensors[f"{module(name, layer)}.unilora_scales_{side}"] = scales[places].astype(
                np.float32
            )
    return tensors


def write_peft(path: Path, kind: str, *, chosen=None, **changes: Any) -> Path:
    """A folder of this type; `changes` are fields of its configuration."""
    fields = {**COMMON, **FIELDS[kind], "peft_type": kind, **changes}
    path.mkdir(parents=True)
    save_file(random_tensors(kind, fields, chosen or every()), path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text(json.dumps(fields))
    return path


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "adapter_model.safetensors")


def edit_config(folder: Path, **changes: Any) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({**config_of(folder), **changes}))


def edit_tensors(folder: Path, change) -> None:
    tensors = tensors_of(folder)
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")
