"""No device holds the base whole: not when it is loaded, and not in a step."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mos_jax import MoSConfig, create_adapter, load_base
from mos_jax.data.batches import Batch
from mos_jax.distributed.mesh import make_mesh, resolve_sizes
from mos_jax.distributed.partition import Placement
from mos_jax.models.decoder import Decoder
from mos_jax.models.sharding import weight_spec
from mos_jax.models.tiny import tiny_config
from mos_jax.planning.hlo import read_program
from mos_jax.training.config import ASSEMBLIES, TrainingSection
from mos_jax.training.optimizer import make_optimizer
from mos_jax.training.step import AdapterParts, initial_state, make_train_step

# So many layers that those few at work at one time weigh little beside a share of all.
CONFIG = dataclasses.replace(tiny_config(), num_layers=61, d_model=256, d_ff=1024)
WEIGHTS = CONFIG.weight_shapes()
LARGEST_OF_A_LAYER = CONFIG.d_model * CONFIG.d_ff
BASE_BYTES = 4 * sum(map(math.prod, WEIGHTS.values()))
MESHES = [(1, 4, 1), (1, 2, 2)]


def placement(sizes):
    return Placement(make_mesh(resolve_sizes(*sizes, jax.device_count())), 1 << 24)


def compiled_step(placed, shardings, assembly, remat="products"):
    """The step of MoS on weights that are shapes, laid out as `shardings` says."""
    weights = {
        name: jax.ShapeDtypeStruct(shape, np.float32, sharding=shardings(name, shape))
        for name, shape in WEIGHTS.items()
    }
    model = Decoder(CONFIG, weights, remat, placed.mesh)
    optimizer = make_optimizer(TrainingSection())
    adapter = create_adapter(MoSConfig(2, 4, 2, 1), model.sites, jax.random.key(0))
    parts, trained = AdapterParts.split(adapter)
    state = initial_state(trained, optimizer, jax.random.key(0))
    whole, targets = np.zeros((4, 8), np.int32), np.zeros((4, 2), np.int32)
    batch = Batch(whole, whole, whole, targets, targets, np.ones((4, 2), np.float32), targets)
    step = make_train_step(optimizer, 0.1, 1, placed, assembly)
    return step.lower(
        placed.place(state), placed.place(parts), model, placed.place_batch(batch)
    ).compile()


def gathered_sizes(text):
    """Entries of the result of every all-gather, largest last; combined ones have several."""
    return sorted(
        array.size
        for computation in read_program(text).computations.values()
        for one in computation.instructions.values()
        if one.opcode in ("all-gather", "all-gather-start")
        for array in one.arrays
    )


def held_bytes(compiled):
    memory = compiled.memory_analysis()
    return memory.argument_size_in_bytes + memory.temp_size_in_bytes


@pytest.mark.parametrize("assembly", ASSEMBLIES)
@pytest.mark.parametrize("sizes", MESHES)
def test_a_step_holds_its_share_of_the_base_and_gathers_one_layer_at_a_time(sizes, assembly):
    placed = placement(sizes)
    compiled = compiled_step(placed, placed.weights(), assembly)
    gathered = gathered_sizes(compiled.as_text())
    assert gathered[-1] == LARGEST_OF_A_LAYER // sizes[2]
    assert held_bytes(compiled) < 0.45 * BASE_BYTES


# XLA on CPU copies a device's share into another layout for one of the two passes, or for both.
@pytest.mark.parametrize(("remat", "share"), [("full", 0.6), ("none", 0.8)])
def test_whatever_the_backward_pass_keeps_it_keeps_no_gathered_weights(remat, share):
    placed = placement((1, 4, 1))
    compiled = compiled_step(placed, placed.weights(), TrainingSection().assembly, remat)
    assert gathered_sizes(compiled.as_text())[-1] == LARGEST_OF_A_LAYER
    assert held_bytes(compiled) < share * BASE_BYTES


def test_all_arrays_of_a_combined_all_gather_are_seen():
    text = """ENTRY %main (p: f32[2], q: f32[8]) -> (f32[64], f32[8]) {
  %p = f32[2]{0} parameter(0)
  %q = f32[16]{0} parameter(1)
  ROOT %both = (f32[64]{0}, f32[8]{0}) all-gather(%q, %p), dimensions={0}
}"""
    assert gathered_sizes(text) == [8, 64]


def test_both_signs_show_when_a_base_is_on_every_device():
    placed = placement((1, 4, 1))
    compiled = compiled_step(placed, lambda name, shape: placed.everywhere, ASSEMBLIES[0])
    assert held_bytes(compiled) > BASE_BYTES

    def gather_first(weight):
        whole = jax.lax.with_sharding_constraint(weight, placed.everywhere)
        return jax.lax.scan(lambda x, w: (x @ w, None), jnp.ones((4, 256)), whole)[0]

    shape = (61, 256, 256)
    sharding = placed.weights()("blocks/q_proj", shape)
    struct = jax.ShapeDtypeStruct(shape, np.float32, sharding=sharding)
    text = jax.jit(gather_first).lower(struct).compile().as_text()
    assert gathered_sizes(text) == [math.prod(shape)]


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_loading_gives_every_device_its_slice_and_no_more(quantize):
    placed = placement((1, 1, 4) if quantize else (1, 2, 2))
    base = load_base(
        "tiny-random", "float32", "products", quantize, placed.weights(quantize), placed.mesh
    )
    alone = load_base("tiny-random", quantize=quantize)
    cut = 0
    for leaf, other in zip(jax.tree.leaves(base.model), jax.tree.leaves(alone.model), strict=True):
        np.testing.assert_array_equal(leaf, other)
        for shard in leaf.addressable_shards:
            assert shard.data.shape == leaf.sharding.shard_shape(leaf.shape)
        cut += leaf.sharding.shard_shape(leaf.shape) != leaf.shape
    # All sites and the embedding; of codes and scales each.
    assert cut == (8 if quantize is None else 11)
    assert base.fingerprint == alone.fingerprint


def test_quantised_weights_are_cut_between_blocks_only():
    sizes = {"data": 1, "fsdp": 2, "tensor": 2}
    # 128 inputs are two blocks of 64 that share a scale, 64 are one.
    assert weight_spec("blocks/up_proj", (2, 128, 64), sizes, True) == PartitionSpec(
        None, "fsdp", "tensor"
    )
    assert weight_spec("blocks/up_proj", (2, 64, 64), sizes, True) == PartitionSpec(
        None, None, "tensor"
    )
    assert weight_spec("blocks/up_proj", (2, 64, 64), sizes) == PartitionSpec(
        None, "fsdp", "tensor"
    )
    assert isinstance(placement((1, 4, 1)).weights("nf4")("embed", (8, 8)), NamedSharding)
