"""Sizes of meshes, specs of arrays, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from mos_jax import InputError
from mos_jax.distributed.mesh import make_mesh, resolve_sizes
from mos_jax.distributed.partition import array_spec, check_rows
from mos_jax.distributed.table import array_lines, base_lines
from mos_jax.models.known import KNOWN_CONFIGS
from mos_jax.models.sharding import FSDP, ROWS, TENSOR, fit_spec, weight_axes

SIZES = {"data": 2, "fsdp": 4, "tensor": 2}


@pytest.mark.parametrize(
    ("asked", "devices", "found"),
    [
        ((1, 1, 1), 8, (1, 1, 1)),
        ((-1, 1, 1), 8, (8, 1, 1)),
        ((2, -1, 2), 8, (2, 2, 2)),
        ((2, 2, 2), 8, (2, 2, 2)),
        ((1, 1, -1), 1, (1, 1, 1)),
        ((4, -1, 1), 4, (4, 1, 1)),
    ],
)
def test_sizes_take_all_devices_or_one(asked, devices, found):
    assert tuple(resolve_sizes(*asked, devices).values()) == found


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ((2, 1, 1), r"mesh\.data=2, mesh\.fsdp=1, mesh\.tensor=1 need 2 devices, there are 8"),
        ((3, -1, 1), "need a multiple of 3 devices, there are 8"),
        ((-1, -1, 1), "only one axis of the mesh may be -1"),
        ((0, 1, 1), r"mesh\.data must be 1 or more, or -1 for what is left, got 0"),
        ((1, 1, -2), r"mesh\.tensor must be 1 or more.*got -2"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(asked, words):
    with pytest.raises(InputError, match=words):
        resolve_sizes(*asked, 8)


def test_rows_that_the_devices_cannot_share_are_refused():
    check_rows(16, SIZES)
    with pytest.raises(InputError, match=r"batch_size=12 rows .* 2 \* 4 = 8; make it a multiple"):
        check_rows(12, SIZES)


def test_one_device_needs_no_mesh_and_many_get_one_with_axes_for_the_compiler():
    assert make_mesh(resolve_sizes(1, 1, 1, jax.device_count())) is None
    mesh = make_mesh(resolve_sizes(1, -1, 1, jax.device_count()))
    assert dict(mesh.shape) == {"data": 1, "fsdp": jax.device_count(), "tensor": 1}
    assert set(mesh.axis_types) == {AxisType.Auto}


@pytest.mark.parametrize(
    ("shape", "wanted", "spec"),
    [
        ((8, 6), (FSDP, TENSOR), ("fsdp", "tensor")),
        ((6, 6), (FSDP, TENSOR), (None, "tensor")),
        ((16, 3), (ROWS, None), (("data", "fsdp"), None)),
        ((4, 3), (ROWS, None), ("data", None)),
        ((3, 3), (ROWS, None), (None, None)),
    ],
)
def test_a_dimension_that_an_axis_does_not_divide_is_whole(shape, wanted, spec):
    assert fit_spec(shape, wanted, SIZES) == PartitionSpec(*spec)


def test_a_spec_of_another_length_than_the_shape_cannot_be_made():
    with pytest.raises(ValueError, match="zip"):
        fit_spec((8, 6), (FSDP,), SIZES)


@pytest.mark.parametrize("name", sorted(KNOWN_CONFIGS))
def test_every_weight_of_every_known_model_has_a_rule_of_its_length(name):
    config = KNOWN_CONFIGS[name]
    for weight, shape in config.weight_shapes().items():
        axes = weight_axes(weight, len(shape))
        assert len(axes) == len(shape)
        # Only vectors, of norms and biases, may be whole.
        assert any(axes) or weight.endswith("norm")
    lines = base_lines(config, "bfloat16", None, {"data": 1, "fsdp": 4, "tensor": 2})
    total, held = sum(line.total for line in lines), sum(line.held for line in lines)
    whole = sum(line.held for line in lines if not any(line.spec))
    assert held - whole == pytest.approx((total - whole) / 8, rel=0.02)


def test_the_table_says_which_axis_does_not_divide():
    config = KNOWN_CONFIGS["llama2-7b"]
    fits = {line.name: line for line in base_lines(config, "float32", None, SIZES)}
    assert fits["blocks/k_proj"].spec_in_words() == "-, fsdp, tensor"
    assert fits["blocks/down_proj"].spec_in_words() == "-, tensor, fsdp"
    assert fits["final_norm"].spec_in_words() == "whole"
    odd = base_lines(config, "float32", None, {"data": 1, "fsdp": 5, "tensor": 1})[0]
    assert odd.spec_in_words() == "whole; fsdp does not divide it"
    assert odd.held == odd.total


def test_an_array_of_an_adapter_is_whole_until_it_is_large():
    assert array_spec((8, 64), 4, SIZES, 8 * 64 * 4) == PartitionSpec(None, None)
    assert array_spec((8, 64), 4, SIZES, 8 * 64 * 4 - 1) == PartitionSpec(None, "fsdp")
    assert array_spec((8, 63), 4, SIZES, 0) == PartitionSpec("fsdp", None)
    assert array_spec((7, 63), 4, SIZES, 0) == PartitionSpec(None, None)
    (line,) = array_lines("trained", {"pool": {"q": np.zeros((8, 64), np.float32)}}, SIZES, 0)
    assert (line.name, line.total, line.held) == ("pool/q", 2048, 512)


def test_dropout_masks_do_not_depend_on_the_mesh():
    mesh = make_mesh(resolve_sizes(2, 1, -1, jax.device_count()))

    def mask(key):
        kept = jax.random.bernoulli(key, 0.5, (8, 64))
        return jax.lax.with_sharding_constraint(
            kept, jax.NamedSharding(mesh, PartitionSpec("data", "tensor"))
        )

    key = jax.random.key(3)
    divided = jax.jit(mask)(key)
    assert divided.sharding.shard_shape(divided.shape) == (4, 32)
    np.testing.assert_array_equal(divided, jax.random.bernoulli(key, 0.5, (8, 64)))
    assert jnp.sum(divided) > 0
