"""Trains on meshes of eight devices and on one, and says how far apart they end.

Run as a program with JAX_NUM_CPU_DEVICES=8, the name of a method and the file of the result.
"""

import dataclasses
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mos_jax import LoRAConfig, MoSConfig, VeRAConfig, create_adapter
from mos_jax.data.batches import Batch
from mos_jax.distributed.mesh import make_mesh, resolve_sizes
from mos_jax.distributed.partition import Placement
from mos_jax.models.decoder import Decoder
from mos_jax.models.tiny import tiny_config, tiny_weights
from mos_jax.training.config import TrainingSection
from mos_jax.training.optimizer import make_optimizer
from mos_jax.training.step import AdapterParts, initial_state, make_train_step

MESHES = ((8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 4, 2), (2, 1, 4))
METHODS = {
    "mos": MoSConfig(equivalent_rank=2, rank=4, shards_per_vector=2, private_rank=1),
    "lora": LoRAConfig(rank=2),
    "vera": VeRAConfig(rank=8),
}
STEPS, ACCUMULATION, ROWS, WIDTH, TARGETS = 10, 2, 8, 16, 6
CONFIG = dataclasses.replace(tiny_config(), num_layers=3)
WEIGHTS = tiny_weights(CONFIG)
# Adam divides by the size of a gradient, so that one near zero turns rounding into a step: with
# eps = 1e-8 adapters end about 1e-4 apart, while losses and gradients stay as close.
SECTION = TrainingSection(
    steps=STEPS,
    learning_rate=1e-3,
    dropout=0.1,
    accumulation=ACCUMULATION,
    weight_decay=0.01,
    eps=1e-3,
)


def make_batch(step):
    rng = np.random.default_rng(step)
    rows, places = (ACCUMULATION, ROWS, WIDTH), (ACCUMULATION, ROWS, TARGETS)
    segments = np.ones(rows, np.int32)
    segments[..., WIDTH // 2 :] = 2
    positions = np.broadcast_to(np.arange(WIDTH, dtype=np.int32) % (WIDTH // 2), rows)
    return Batch(
        rng.integers(0, CONFIG.vocab_size, rows, np.int32),
        np.array(positions),
        segments,
        rng.integers(0, WIDTH, places, np.int32),
        rng.integers(0, CONFIG.vocab_size, places, np.int32),
        (rng.random(places) < 0.7).astype(np.float32),
        np.zeros(places, np.int32),
    )


def start(method, placement):
    """State, parts and model, on the mesh of `placement` or on the first device."""
    optimizer = make_optimizer(SECTION)
    sites = Decoder(CONFIG, WEIGHTS).sites
    parts, trained = AdapterParts.split(create_adapter(METHODS[method], sites, jax.random.key(0)))
    # No part may start at zero, or others would get no gradient at the first step.
    trained = jax.tree.map(
        lambda x: x + 0.02 * jnp.cos(jnp.arange(x.size)).reshape(x.shape), trained
    )
    state = initial_state(trained, optimizer, jax.random.key(1))
    weights = {name: jnp.asarray(array) for name, array in WEIGHTS.items()}
    if placement is None:
        return state, parts, Decoder(CONFIG, weights)
    shardings = placement.weights()
    placed = {n: jax.device_put(w, shardings(n, w.shape)) for n, w in weights.items()}
    model = Decoder(CONFIG, placed, mesh=placement.mesh)
    return placement.place(state), placement.place(parts), model


def train(method, mesh=None, shard_above=1 << 24):
    """Losses, the gradient at the first step and the adapter after the last, on the host."""
    placement = None
    if mesh is not None:
        placement = Placement(make_mesh(resolve_sizes(*mesh, len(jax.devices()))), shard_above)
    state, parts, model = start(method, placement)
    optimizer = make_optimizer(SECTION)
    step = make_train_step(optimizer, SECTION.dropout, ACCUMULATION, placement)
    losses, gradient, compiled = [], None, None
    for number in range(STEPS):
        batch = make_batch(number)
        if placement is not None:
            batch = placement.place_batch(batch)
        if compiled is None:
            compiled = step.lower(state, parts, model, batch).compile()
        state, metrics = compiled(state, parts, model, batch)
        losses.append(float(metrics["loss"]))
        if gradient is None:
            # Adam's first moment after one step: the (clipped) gradient, scaled.
            gradient = to_host(optax.tree.get(state.optimizer, "mu"))
    return {"loss": [np.array(losses)], "gradient": gradient, "adapter": to_host(state.trained)}


def to_host(tree):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def distance(ours, theirs):
    """Largest difference of any array, as a share of that array's largest entry."""
    return max(
        float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(ours, theirs, strict=True)
    )


def main():
    method, path = sys.argv[1:]
    alone = train(method)
    runs = {" ".join(map(str, mesh)): train(method, mesh) for mesh in MESHES}
    # Once with every array of the adapter and its optimiser divided, too.
    runs["1 4 2 divided"] = train(method, (1, 4, 2), 0)
    found = {name: {k: distance(run[k], alone[k]) for k in alone} for name, run in runs.items()}
    Path(path).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
