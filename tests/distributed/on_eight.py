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
from mos_jax.training.config import ASSEMBLIES, TrainingSection
from mos_jax.training.optimizer import make_optimizer
from mos_jax.training.step import AdapterParts, initial_state, make_train_step

# By what is told of them: the mesh, from how many bytes on arrays of the adapter are divided, the
# place of assembly, and how many key heads the base has.
MESHES = ((8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 4, 2), (2, 1, 4))
PLACE = TrainingSection().assembly
(OTHER,) = set(ASSEMBLIES) - {PLACE}
CASES = {" ".join(map(str, mesh)): (mesh, 1 << 24, PLACE, 2) for mesh in MESHES} | {
    # Every array of the adapter and its optimiser is divided, too.
    "1 4 2 divided": ((1, 4, 2), 0, PLACE, 2),
    f"1 4 2 {OTHER}": ((1, 4, 2), 1 << 24, OTHER, 2),
    f"1 4 2 divided {OTHER}": ((1, 4, 2), 0, OTHER, 2),
    # Four devices share the query heads, but not the key heads.
    "1 2 4 one key head": ((1, 2, 4), 1 << 24, PLACE, 1),
}
METHODS = {
    "mos": MoSConfig(equivalent_rank=2, rank=4, shards_per_vector=2, private_rank=1),
    "lora": LoRAConfig(rank=2),
    "vera": VeRAConfig(rank=8),
}
STEPS, ACCUMULATION, ROWS, WIDTH, TARGETS = 10, 2, 8, 16, 6
# With (2, 1, 4) the four query heads are divided and the two key heads are not.
CONFIG = dataclasses.replace(tiny_config(), num_layers=3)
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


def start(method, placement, key_heads):
    """State, parts and model, on the mesh of `placement` or on the first device."""
    optimizer = make_optimizer(SECTION)
    config = dataclasses.replace(CONFIG, num_kv_heads=key_heads)
    weights = {name: jnp.asarray(array) for name, array in tiny_weights(config).items()}
    sites = Decoder(config, weights).sites
    parts, trained = AdapterParts.split(create_adapter(METHODS[method], sites, jax.random.key(0)))
    # No part may start at zero, or others would get no gradient at the first step.
    trained = jax.tree.map(
        lambda x: x + 0.02 * jnp.cos(jnp.arange(x.size)).reshape(x.shape), trained
    )
    state = initial_state(trained, optimizer, jax.random.key(1))
    if placement is None:
        return state, parts, Decoder(config, weights)
    shardings = placement.weights()
    placed = {n: jax.device_put(w, shardings(n, w.shape)) for n, w in weights.items()}
    model = Decoder(config, placed, mesh=placement.mesh)
    return placement.place(state), placement.place(parts), model


def train(method, mesh, shard_above, assembly, key_heads):
    """Losses, the gradient at the first step and the adapter after the last, on the host."""
    placement = None
    if mesh is not None:
        placement = Placement(make_mesh(resolve_sizes(*mesh, len(jax.devices()))), shard_above)
    state, parts, model = start(method, placement, key_heads)
    optimizer = make_optimizer(SECTION)
    step = make_train_step(optimizer, SECTION.dropout, ACCUMULATION, placement, assembly)
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
    """Largest difference of any array, as a share of that array's largest entry; NaN stays NaN."""
    sizes = np.array([np.abs(b).max() for b in theirs])
    assert np.all(np.isfinite(sizes) & (sizes > 0)), sizes
    largest = [np.abs(a - b).max() for a, b in zip(ours, theirs, strict=True)]
    return float(np.max(largest / sizes))


def main():
    method, path = sys.argv[1:]
    alone = {heads: train(method, None, 0, PLACE, heads) for heads in (1, 2)}
    found = {}
    for name, case in CASES.items():
        run, expected = train(method, *case), alone[case[-1]]
        found[name] = {k: distance(run[k], expected[k]) for k in expected}
    Path(path).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
