"""What the compiled step costs as its sizes grow: counts, which no load of the machine changes."""

import dataclasses
import functools
import itertools

import pytest

from mos_jax.adapters.mos import MoSConfig
from mos_jax.errors import InputError
from mos_jax.models.tiny import tiny_config
from mos_jax.planning.costs import assembled, make_request, scaling_axes, step_costs, straight, vary
from mos_jax.training.config import RunConfig

ROWS, WIDTH, BLOCKS = 2, 16, 8
WIDTHS = sum(sum(shape[1:]) for shape in tiny_config().site_shapes().values())


def request(adapter=None):
    adapter = adapter or {"method": "mos", "equivalent_rank": 4, "rank": 2, "private_rank": 1}
    config = RunConfig.from_mapping({"base": {"name": "tiny-random"}, "adapter": adapter})
    model = dataclasses.replace(tiny_config(), num_layers=BLOCKS)
    return make_request(config, model, ROWS, WIDTH)


@functools.cache
def costs(name, value, where):
    return step_costs(assembled(vary(request(), name, value), where))


@pytest.mark.parametrize("where", ["before", "inside"])
def test_operations_grow_linearly_in_rank(where):
    ranks = (2, 4, 8)
    flops = [costs("rank", rank, where).flops for rank in ranks]
    # Forward, the gradient of the input, and that of the factors.
    slope = 3 * 2 * ROWS * WIDTH * BLOCKS * WIDTHS
    assert [b - a for a, b in itertools.pairwise(flops)] == [2 * slope, 4 * slope]
    # Inside the scan little grows with the rank, so that what the compiler pads shows.
    tolerance = {"before": 1e-3, "inside": 0.02}[where]
    temporaries = [costs("rank", rank, where).temporaries for rank in ranks]
    assert straight(ranks, temporaries, tolerance)


@pytest.mark.parametrize("where", ["before", "inside"])
def test_the_budget_costs_nothing_but_its_own_gradient_and_optimiser(where):
    few, many = costs("rank", 2, where), costs("equivalent_rank", 16, where)
    assert many.flops == few.flops
    trained = 4 * (16 - 4) * BLOCKS * WIDTHS
    assert many.arguments - few.arguments == 3 * trained  # AdamW's two moments
    # Were the pools read or written once a block, forward and backward, it would be 16 times more.
    assert 0 < many.bytes - few.bytes < 24 * trained
    assert 0 < many.temporaries - few.temporaries < 4 * trained


def test_assembled_inside_the_scan_memory_hardly_grows_with_rank():
    before, inside = (
        costs("rank", 8, where).temporaries - costs("rank", 2, where).temporaries
        for where in ("before", "inside")
    )
    # All factors and their gradients, against one block's and the middles that are kept.
    assert before - inside > 0.9 * 4 * (8 - 2) * BLOCKS * WIDTHS


def test_each_size_is_varied_alone():
    asked = request()
    for axis in scaling_axes(asked):
        assert list(axis.values) == sorted(set(axis.values))
        # The base has the most blocks that it can have.
        changed = vary(asked, axis.name, axis.values[0 if axis.name == "num_layers" else -1])
        assert changed.to_dict() != asked.to_dict()
        sizes = (changed.model.num_layers, changed.rows, changed.width)
        assert (sizes == (BLOCKS, ROWS, WIDTH)) == hasattr(MoSConfig, axis.name)
    assert vary(vary(asked, "data", 2), "fsdp", 4).config.mesh.data == 1


def test_what_cannot_be_counted_is_refused():
    with pytest.raises(InputError, match=r"method is 'lora'; sizes are varied of 'mos'"):
        scaling_axes(request({"method": "lora", "rank": 2}))
    with pytest.raises(InputError, match=r"the mesh has 512 devices, there are \d"):
        step_costs(vary(request(), "data", 512))


def test_straight_lines_have_equal_slopes():
    assert straight([1, 2, 4], [5.0, 7.0, 11.0])
    assert not straight([1, 2, 4], [1.0, 2.0, 8.0])
    assert straight([1, 2], [3.0, 3.0])
