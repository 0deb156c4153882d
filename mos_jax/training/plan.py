"""The dry run: what a configuration trains and what it needs, from the compiled step."""

from __future__ import annotations

import math
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from mos_jax.data.batches import Batch
from mos_jax.distributed.table import array_lines, base_lines, batch_lines, print_lines
from mos_jax.models.base import outline_base
from mos_jax.models.sharding import whole_attention
from mos_jax.training.config import RunConfig
from mos_jax.training.session import Loads, Session
from mos_jax.training.step import AdapterParts, TrainState


def plan(config: RunConfig) -> dict[str, Any]:
    """Builds everything but the base's weights, compiles the step, and runs nothing.

    Returns:
      `base`: its name, dtype and quantisation; `sites`: by site type its L, d_in, d_out, `ranks`
      by block, largest rank and trained parameters; `shared`, the trained parameters that belong
      to no single site type; `budget`, see `Session.budget`; `bytes` of base, adapter (with its
      frozen part), optimizer, batch and activations (the compiled step's temporaries), on each
      device; `mesh`, on a mesh the sizes of its axes, a `Line` for each array, and what
      `whole_attention` says, else None;
      `data`, see `Data.report`.

    Raises:
      InputError: as for training.
    """
    session = Session.create(config, Loads(outline_base))
    state, parts = session.initial()
    adapter, model = session.adapter, session.base.model
    batch = session.source()[0]
    placed = session.place_batch(batch)
    compiled = session.train_step().lower(state, parts, model, placed).compile()
    memory = compiled.memory_analysis()
    counts = adapter.count_trained_by_site()
    factors = jax.eval_shape(lambda adapter: adapter.factors(), adapter)
    return {
        "base": {
            "name": session.base.name,
            "dtype": session.base.dtype,
            "quantization": config.base.quantize,
        },
        "sites": {
            name: {
                "layers": site.num_layers,
                "d_in": site.d_in,
                "d_out": site.d_out,
                "rank": factors[name].rank,
                "ranks": list(factors[name].ranks or [factors[name].rank] * site.num_layers),
                "trained": counts[name],
            }
            for name, site in adapter.sites.items()
        },
        "shared": counts.get("shared", 0),
        "budget": session.budget(),
        "bytes": {
            "base": _bytes(model),
            "adapter": _bytes(state.trained) + _bytes(parts),
            "optimizer": _bytes(state.optimizer),
            "batch": _bytes(placed),
            "activations": memory.temp_size_in_bytes,
        },
        "mesh": _mesh(session, state, parts, placed),
        "adapter": adapter.summary(),
        "data": session.data.report(),
    }


def print_plan(config: RunConfig, console: Console) -> None:
    """Prints `plan(config)` as tables."""
    found = plan(config)
    table = Table("site type", "layers", "d_in", "d_out", "rank", "trained parameters")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, site in found["sites"].items():
        low, high = min(site["ranks"]), max(site["ranks"])
        rank = f"{low}" if low == high else f"{low} to {high}"
        numbers = (str(site[key]) for key in ("layers", "d_in", "d_out"))
        table.add_row(name, *numbers, rank, f"{site['trained']:,}")
    if found["shared"]:
        table.add_row("shared by several", "", "", "", "", f"{found['shared']:,}")
    budget = found["budget"]
    table.add_section()
    table.add_row("all", "", "", "", "", f"{budget['trained']:,}")
    console.print(table)
    same = budget["lora_same_budget_rank"]
    console.print(
        f"LoRA at the same rank ({budget['rank']}) would train {budget['lora_same_rank']:,}; "
        + (f"at the same budget it has rank {same}." if same else "at rank 1 it is larger."),
        highlight=False,
    )
    if "idle_parameters" in found["adapter"]:
        console.print(
            f"{found['adapter']['idle_parameters']:,} trained parameters are in shards that no "
            "layer draws.",
            highlight=False,
        )
    if found["mesh"] is not None:
        print_lines(found["mesh"]["lines"], found["mesh"]["sizes"], console)
        if found["mesh"]["whole"] is not None:
            console.print(f"{found['mesh']['whole']}.", highlight=False)
    memory = Table("memory" if found["mesh"] is None else "memory of each device", "MiB")
    memory.columns[1].justify = "right"
    base = found["base"]
    for name, size in found["bytes"].items():
        form = f" ({base['quantization'] or base['dtype']})" if name == "base" else ""
        memory.add_row(name + form, f"{size / 2**20:,.1f}")
    memory.add_section()
    memory.add_row("all", f"{sum(found['bytes'].values()) / 2**20:,.1f}")
    console.print(memory)
    data = found["data"]
    console.print(
        f"{data['task']}: {data['train_examples']} training examples of {data['mean_tokens']:.0f} "
        f"tokens on average, rows of {data['width']} tokens, {data['rows']} rows and "
        f"{data['examples_per_batch']:.1f} examples a batch, {data['padding_share']:.1%} padding.",
        highlight=False,
    )


def _mesh(
    session: Session, state: TrainState, parts: AdapterParts, batch: Batch
) -> dict[str, Any] | None:
    if session.placement is None:
        return None
    sizes = dict(session.placement.mesh.shape)
    above, base = session.placement.shard_above, session.config.base
    groups = {"trained": state.trained, "frozen": parts.frozen, "optimizer": state.optimizer}
    lines = base_lines(session.base.config, base.dtype, base.quantize, sizes)
    for group, tree in groups.items():
        lines += array_lines(group, tree, sizes, above)
    whole = whole_attention(session.base.config, sizes)
    return {"sizes": sizes, "lines": lines + batch_lines(batch, sizes), "whole": whole}


def _bytes(tree: Any) -> int:
    """Bytes on each device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape) if _divided(leaf) else leaf.shape)
        * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _divided(leaf: Any) -> bool:
    return getattr(leaf, "sharding", None) is not None
