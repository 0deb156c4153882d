import math

import jax
import numpy as np
import pytest

from mos_jax.adapters.lora import LoRAConfig
from mos_jax.adapters.methods import count_parameters, create_adapter, make_config
from mos_jax.adapters.prolora import PRoLoRAConfig
from mos_jax.adapters.sites import SiteShape
from mos_jax.errors import InputError
from tests.adapters.fixtures_adapters import SITES, model_sites, randomised, trained_arrays


def build(config, sites=SITES, seed=0):
    return create_adapter(config, sites, jax.random.key(seed))


def rotated_by_hand(chunk, chunks, width):
    """One block's vectors [R, width], entry by entry."""
    rank, own = chunk.shape
    stride = max(rank // chunks, 1)
    vectors = np.zeros((rank, width), np.float32)
    for j in range(rank):
        for column in range(width):
            repetition, inside = divmod(column, own)
            # Rolling forward: what stood in row q stands in row q + shift.
            vectors[j, column] = chunk[(j - repetition * stride) % rank, inside]
    return vectors


@pytest.mark.parametrize(
    ("rank", "unshared", "chunks_a", "chunks_b"),
    [
        (4, 0, 2, 2),  # strides of 2
        (5, 1, 4, 2),  # strides of 1 and 2, everything divides
        (3, 1, 4, 4),  # more chunks than shared vectors: the stride is at least 1
        (6, 2, 3, 3),  # 3 does not divide 8 and 4
        (7, 1, 5, 3),  # 8 = 4 chunks of 2 and a fifth that is cut off whole
        (2, 1, 8, 1),  # one shared vector: nothing to roll
        (3, 3, 2, 2),  # nothing shared
    ],
)
def test_the_factors_are_those_of_a_plain_loop(rank, unshared, chunks_a, chunks_b):
    config = PRoLoRAConfig(rank, unshared, chunks_a, chunks_b)
    adapter = randomised(build(config))
    arrays = trained_arrays(adapter)
    for name, site in SITES.items():
        factors = adapter.site_factors(name)
        for part, chunks, width in (("a", chunks_a, site.d_in), ("b", chunks_b, site.d_out)):
            for k in range(site.num_layers):
                want = []
                if unshared:
                    want.append(arrays[f"unshared_{part}/{name}"][k])
                if unshared < rank:
                    chunk = arrays[f"shared_{part}/{name}"][k]
                    assert chunk.shape == (rank - unshared, math.ceil(width / chunks))
                    want.append(rotated_by_hand(chunk, chunks, width))
                np.testing.assert_array_equal(getattr(factors, part)[k], np.concatenate(want))


def test_the_chunks_are_rolls_of_the_first_one():
    """In the paper's own words: chunk i is the first one rolled i strides along the rank."""
    config = PRoLoRAConfig(rank=5, unshared_rank=1, chunks_a=2, chunks_b=4)
    factors = randomised(build(config)).site_factors("q_proj")
    a, b = np.asarray(factors.a)[:, 1:], np.asarray(factors.b)[:, 1:]
    np.testing.assert_array_equal(a[..., 4:8], np.roll(a[..., :4], 2, axis=1))
    for i in range(4):
        np.testing.assert_array_equal(b[..., 3 * i : 3 * i + 3], np.roll(b[..., :3], i, axis=1))


def test_the_count_on_llama2_7b_is_that_of_the_paper():
    """r=8, u=1, m=n=7, "about 5.00M": 4096 and 11008 are cut to 586 and 1573."""
    counts = count_parameters(PRoLoRAConfig(8, 1, 7, 7), model_sites("llama2-7b"))
    square, wide = 8192 + 7 * 2 * 586, 15104 + 7 * (586 + 1573)
    per_block = {"q_proj": square, "gate_proj": wide, "down_proj": wide}
    assert {name: counts[name] for name in per_block} == {
        name: 32 * count for name, count in per_block.items()
    }
    assert sum(counts.values()) == 32 * (4 * square + 3 * wide) == 4_999_520


@pytest.mark.parametrize("chunks", [1, 2, 4])
def test_the_count_is_u_of_lora_and_a_part_of_the_rest(chunks):
    counts = count_parameters(PRoLoRAConfig(6, 2, chunks, chunks), SITES)
    assert counts == {
        name: site.num_layers * (2 + 4 // chunks) * (site.d_in + site.d_out)
        for name, site in SITES.items()
    }
    if chunks == 1:
        assert counts == count_parameters(LoRAConfig(6), SITES)


def test_a_is_uniform_within_the_bound_of_the_full_width_and_b_is_zero():
    adapter = build(PRoLoRAConfig(32, 16, 4, 2), {"q_proj": SiteShape(4, 256, 4)})
    bound = 256**-0.5
    for part in ("unshared", "shared"):
        a = trained_arrays(adapter)[f"{part}_a/q_proj"]
        deciles = np.quantile(a, np.linspace(0, 1, 11))
        np.testing.assert_allclose(deciles, np.linspace(-bound, bound, 11), atol=0.05 * bound)
        assert np.abs(a).max() <= bound
        assert not np.any(trained_arrays(adapter)[f"{part}_b/q_proj"])


def test_parts_blocks_and_types_start_apart():
    sites = {"q_proj": SITES["q_proj"], "k_proj": SITES["q_proj"]}
    arrays = trained_arrays(build(PRoLoRAConfig(2, 1, 2, 2), sites))
    values = np.concatenate([arrays[name].ravel() for name in arrays if "_a/" in name])
    assert np.unique(values).size == values.size == 2 * 3 * (8 + 4)


def test_the_scale_is_alpha_over_the_whole_rank():
    adapter = build(PRoLoRAConfig(5, 2, 2, 2, alpha=20))
    np.testing.assert_array_equal(adapter.site_factors("q_proj").scale, [4.0] * 3)
    assert adapter.site_factors("q_proj", 1).scale == 4
    assert PRoLoRAConfig().alpha == 16


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 0}, "rank must be an integer >= 1, got 0"),
        ({"unshared_rank": -1}, "unshared_rank must be an integer >= 0, got -1"),
        ({"rank": 2, "unshared_rank": 3}, "unshared_rank=3 must be at most rank=2"),
        ({"chunks_a": 0}, "chunks_a must be an integer >= 1, got 0"),
        ({"chunks_b": 2.0}, "chunks_b must be an integer >= 1, got 2.0"),
        ({"alpha": 0}, "alpha must be a finite number above 0, got 0"),
        ({"unshared": 1}, "unknown field 'unshared'; did you mean 'unshared_rank'"),
    ],
)
def test_a_configuration_that_cannot_be_used_says_why(fields, message):
    with pytest.raises(InputError, match=f"prolora: .*{message}"):
        make_config("prolora", fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"chunks_a": 9}, "chunks_a=9 must be at most d_in=8 of 'q_proj'"),
        ({"chunks_b": 5}, "chunks_b=5 must be at most d_out=4 of 'down_proj'"),
    ],
)
def test_more_chunks_than_entries_are_refused(fields, message):
    with pytest.raises(InputError, match=f"prolora: {message}"):
        build(PRoLoRAConfig(**{"chunks_a": 2, "chunks_b": 2, **fields}))
