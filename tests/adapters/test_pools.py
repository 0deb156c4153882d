import jax.numpy as jnp
import numpy as np
import pytest

from mos_jax.adapters.pools import Pool, PoolLayout, assemble, plan_pools
from mos_jax.adapters.sites import SiteShape
from mos_jax.errors import InputError
from tests.adapters.fixtures_adapters import model_sites

SITES = {
    "q_proj": SiteShape(3, 8, 8),
    "o_proj": SiteShape(2, 8, 8),
    "up_proj": SiteShape(4, 8, 12),
    "down_proj": SiteShape(1, 12, 8),
}


def plan(side, scope="width", sites=SITES, rank=3, e=2, p=1, shards=2):
    ranks = {name: (rank,) * site.num_layers for name, site in sites.items()}
    return plan_pools(
        sites, side, scope, equivalent_rank=e, ranks=ranks, private_rank=p, shards_per_vector=shards
    )


def test_every_type_has_a_pool_of_its_own_in_the_scope_of_the_paper():
    for side, widths in (("a", [8, 8, 8, 12]), ("b", [8, 8, 12, 8])):
        sites = {**SITES, "o_proj": SiteShape(3, 8, 8), "down_proj": SiteShape(2, 12, 8)}
        pools = plan(side, "site_type", sites, rank=3)
        assert [pool.name for pool in pools] == list(sites)
        assert [pool.width for pool in pools] == widths
        for pool in pools:
            num_layers = sites[pool.name].num_layers
            assert pool.layout == PoolLayout(num_layers, 2, 3, 1, 2)
            assert pool.blocks == {pool.name: range(num_layers)}


def test_types_of_one_width_share_a_pool_as_large_as_theirs_together():
    shared_a = {"o_proj": range(2), "q_proj": range(2, 5), "up_proj": range(5, 9)}
    shared_b = {"down_proj": range(1), "o_proj": range(1, 3), "q_proj": range(3, 6)}
    assert sorted(plan("a", rank=2), key=lambda pool: pool.width) == [
        Pool("width_8", 8, PoolLayout(9, 2, 2, 1, 2), shared_a),
        Pool("down_proj", 12, PoolLayout(1, 2, 2, 1, 2), {"down_proj": range(1)}),
    ]
    assert sorted(plan("b", rank=2), key=lambda pool: pool.width) == [
        Pool("width_8", 8, PoolLayout(6, 2, 2, 1, 2), shared_b),
        Pool("up_proj", 12, PoolLayout(4, 2, 2, 1, 2), {"up_proj": range(4)}),
    ]
    assert [pool.shape for pool in plan("a", rank=2)] == [(2 * 2, 6), (9 * 2 * 2, 4)]


def test_the_order_of_the_sites_does_not_matter_to_shared_pools():
    backwards = dict(reversed(SITES.items()))
    for side in ("a", "b"):
        by_name = [
            {pool.name: pool for pool in plan(side, sites=s, rank=2)} for s in (SITES, backwards)
        ]
        assert by_name[0] == by_name[1]
        assert list(by_name[0]["width_8"].blocks) == sorted(by_name[0]["width_8"].blocks)


@pytest.mark.parametrize("scope", ["site_type", "width"])
@pytest.mark.parametrize("name", ["llama2-7b", "smollm2-135m"])
def test_pools_hold_the_parameters_of_lora_whoever_shares_them(scope, name):
    sites = model_sites(name)
    pools = [pool for side in ("a", "b") for pool in plan(side, scope, sites, rank=8, e=3)]
    per_rank = sum(site.num_layers * (site.d_in + site.d_out) for site in sites.values())
    assert sum(np.prod(pool.shape) for pool in pools) == 3 * per_rank
    assert (len(pools) < 2 * len(sites)) is (scope == "width")


def test_the_smallest_pool_bounds_the_rank_and_is_named_with_its_owners():
    sites = {
        "q_proj": SiteShape(3, 8, 8),
        "k_proj": SiteShape(3, 8, 8),
        "v_proj": SiteShape(3, 8, 4),
    }
    assert plan("a", sites=sites, rank=10)  # 9 public vectors
    with pytest.raises(
        InputError,
        match=r"rank=8 .*7 public .*'width_8', shared by k_proj, q_proj, .* 1 \* 6 = 6 of them",
    ):
        plan("b", sites=sites, rank=8)
    with pytest.raises(InputError, match=r"rank=5 .*4 public .*'v_proj' has .* 1 \* 3 = 3 of"):
        plan("b", sites=sites, rank=5)


def test_a_type_with_the_name_of_a_shared_pool_is_refused():
    sites = {"q_proj": SiteShape(3, 8, 8), "width_8": SiteShape(3, 8, 4)}
    with pytest.raises(
        InputError, match="site type 'width_8' has the name of the pool that q_proj"
    ):
        plan("a", sites=sites)
    assert {pool.name for pool in plan("a", "site_type", sites)} == {"q_proj", "width_8"}


@pytest.mark.parametrize("scope", ["site_type", "width"])
def test_shards_that_do_not_divide_a_width_are_refused_with_a_type(scope):
    with pytest.raises(InputError, match="shards_per_vector=3 does not divide d_in=8 of 'o_proj'"):
        plan("a", scope, {"o_proj": SiteShape(3, 8, 12)}, shards=3)
    with pytest.raises(InputError, match="shards_per_vector=3 does not divide d_out=8 of 'o_proj'"):
        plan("b", scope, {"o_proj": SiteShape(3, 12, 8)}, shards=3)


def test_assembly_puts_shards_side_by_side_in_the_order_of_the_table():
    pool = jnp.arange(8.0, dtype=jnp.float32).reshape(4, 2)
    table = jnp.array([[[3, 0], [1, 1]]], jnp.int32)
    assert assemble(pool, table).tolist() == [[[6, 7, 0, 1], [2, 3, 2, 3]]]
    assert assemble(pool, table[0, 0]).tolist() == [6, 7, 0, 1]
