"""What MoS can do beyond the paper: each option is one field, off by default."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mos_jax.adapters import routing
from mos_jax.adapters.lora import LoRAConfig
from mos_jax.adapters.methods import count_parameters, create_adapter, make_config
from mos_jax.adapters.mos import MoSConfig
from mos_jax.adapters.sites import SiteShape
from mos_jax.errors import InputError
from mos_jax.training.config import TrainingSection
from mos_jax.training.optimizer import make_optimizer
from tests.adapters.fixtures_adapters import (
    SITES,
    assembled_by_hand,
    model_sites,
    quick_jit,
    randomised,
    split_trained,
    trained_arrays,
)

CONFIG = MoSConfig(equivalent_rank=3, rank=5, shards_per_vector=2, private_rank=1)
# A: o, q and up share width 8, down is alone; B: down, o and q share it, up is alone.
SHARING = {
    "q_proj": SiteShape(3, 8, 8),
    "o_proj": SiteShape(3, 8, 8),
    "up_proj": SiteShape(3, 8, 12),
    "down_proj": SiteShape(3, 12, 8),
}
OWNERS = {
    "a": {"width_8": ["o_proj", "q_proj", "up_proj"], "down_proj": ["down_proj"]},
    "b": {"width_8": ["down_proj", "o_proj", "q_proj"], "up_proj": ["up_proj"]},
}


def build(config=CONFIG, sites=SITES, seed=0, **fields) -> Any:
    return create_adapter(dataclasses.replace(config, **fields), sites, jax.random.key(seed))


def gradients_of(adapter, weight):
    """Of a loss in which every entry of every factor has a part."""
    graphdef, trained, frozen = split_trained(adapter)

    @quick_jit
    @jax.grad
    def gradients(trained):
        factors = nnx.merge(graphdef, trained, frozen).factors().values()
        return sum(jnp.sum(jnp.sin(weight * f.a)) + jnp.sum(jnp.sin(weight * f.b)) for f in factors)

    return {
        "/".join(map(str, path)): np.asarray(variable[...])
        for path, variable in nnx.to_flat_state(gradients(trained))
    }


def test_all_options_are_off_by_default_and_given_by_name():
    options = {
        "balanced_routing": True,
        "rank_scaling": True,
        "pool_scope": "width",
        "b_rate_ratio": 4.0,
    }
    defaults = MoSConfig(2, 4).to_dict()
    assert [defaults[name] for name in options] == [False, False, "site_type", 1.0]
    assert make_config("mos", {"rank": 4, **options}) == MoSConfig(2, 4, **options)
    # The configuration of an adapter that was stored before there were options.
    stored = {name: value for name, value in defaults.items() if name not in options}
    assert make_config("mos", stored) == MoSConfig(2, 4)


class TestBalancedRouting:
    @pytest.mark.parametrize("dissociated", [True, False])
    def test_every_public_shard_is_used_equally_often_up_to_one(self, dissociated):
        adapter = build(balanced_routing=True, pair_dissociation=dissociated)
        for name, table in adapter.tables().items():
            assert table.shape == (3, 5, 2), name
            # 12 public shards, 3 x 8 draws.
            assert np.bincount(table[:, :4].ravel()).tolist() == [2] * 12
            for block in table[:, :4].reshape(3, -1):
                assert np.unique(block).size == 8
        for name in SITES:
            tables = [adapter.tables()[f"table_{side}/{name}"] for side in "ab"]
            assert np.array_equal(*tables) is not dissociated
        adapter.check()

    def test_nothing_is_idle_once_blocks_draw_as_many_shards_as_there_are(self):
        free, balanced = (
            build(MoSConfig(2, 2, 2), balanced_routing=on).summary() for on in (False, True)
        )
        assert balanced["idle_parameters"] == 0 < free["idle_parameters"]
        assert balanced["expected_idle_share_of_public_pool"] == 0
        assert free["expected_idle_share_of_public_pool"] == pytest.approx((2 / 3) ** 3)
        assert balanced["routing_checksum"] != free["routing_checksum"]

    def test_what_few_draws_must_leave_idle_is_what_the_summary_expects(self):
        adapter = build(MoSConfig(4, 3, 2, 1), balanced_routing=True)  # 18 public, 12 drawn
        summary = adapter.summary()
        assert summary["expected_idle_share_of_public_pool"] == pytest.approx(1 / 3)
        public = sum(3 * 3 * (site.d_in + site.d_out) for site in SITES.values())
        assert summary["idle_parameters"] == public / 3

    def test_where_every_block_uses_all_shards_it_changes_nothing(self):
        whole = MoSConfig(2, None, 2, 1, subset_selection=False)
        free, balanced = build(whole), build(whole, balanced_routing=True)
        assert free.summary()["routing_checksum"] == balanced.summary()["routing_checksum"]
        balanced.check()

    def test_a_stored_table_that_is_not_balanced_is_refused_by_name(self):
        adapter, free = build(balanced_routing=True), build()
        free.check()
        adapter.table_b["down_proj"][...] = free.table_b["down_proj"][...]
        with pytest.raises(InputError, match=r"table_b/down_proj: shard \d+ is used .*balanced"):
            adapter.check()


class TestRankScaling:
    def test_it_starts_as_the_adapter_without_it_bitwise(self):
        plain, scaled = randomised(build()), build(rank_scaling=True)
        for name in SITES:
            scaled.pool_a[name][...] = plain.pool_a[name][...]
            scaled.pool_b[name][...] = plain.pool_b[name][...]
            one, other = plain.site_factors(name), scaled.site_factors(name)
            for part in ("a", "b", "scale"):
                np.testing.assert_array_equal(getattr(one, part), getattr(other, part))

    def test_the_diagonal_of_a_site_scales_its_rank_vectors(self):
        plain, scaled = build(), build(rank_scaling=True)
        diagonal = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
        scaled.scaling["q_proj"][...] = jnp.asarray(diagonal)
        a = np.asarray(plain.site_factors("q_proj").a)
        have = scaled.site_factors("q_proj")
        np.testing.assert_array_equal(have.a, diagonal[:, :, None] * a)
        for k in range(3):
            np.testing.assert_array_equal(scaled.site_factors("q_proj", k).a, have.a[k])
        np.testing.assert_array_equal(
            scaled.site_factors("down_proj").a, plain.site_factors("down_proj").a
        )

    def test_it_is_trained_counted_and_named_as_beyond_the_budget(self):
        plain, scaled = build(), build(rank_scaling=True)
        extra = 3 * 5  # of each type
        for name in SITES:
            assert type(scaled.scaling[name]) is nnx.Param
            counts = [adapter.count_trained_by_site()[name] for adapter in (plain, scaled)]
            assert counts[1] - counts[0] == extra
        assert scaled.summary()["parameters_beyond_budget"] == 2 * extra
        assert scaled.count_trained() == plain.count_trained() + 2 * extra
        gradients = gradients_of(randomised(scaled), 1.0)
        assert all(np.all(gradients[f"scaling/{name}"] != 0) for name in SITES)

    def test_on_llama2_7b_it_costs_what_the_pilot_study_paid(self):
        sites = model_sites("llama2-7b")
        count = sum(count_parameters(MoSConfig(2, 8, rank_scaling=True), sites).values())
        assert count == 4_997_120 + 8 * 224

    @pytest.mark.parametrize("kind", ["fixed", "trained"])
    def test_a_second_diagonal_is_refused(self, kind):
        with pytest.raises(
            InputError, match=f"rank_scaling=True contradicts random_scaling='{kind}'"
        ):
            MoSConfig(2, 4, rank_scaling=True, random_scaling=kind)


WIDE = dataclasses.replace(CONFIG, pool_scope="width")


class TestPoolScope:
    def test_types_of_one_width_draw_from_one_pool(self):
        adapter = build(WIDE, SHARING)
        shapes = {name: array.shape for name, array in trained_arrays(adapter).items()}
        # e L l shards of each type: 18.
        assert shapes == {
            "pool_a/width_8": (54, 4),
            "pool_a/down_proj": (18, 6),
            "pool_b/width_8": (54, 4),
            "pool_b/up_proj": (18, 6),
        }
        adapter.check()
        for side, pools in OWNERS.items():
            tables = [adapter.tables()[f"table_{side}/{n}"][:, :4] for n in pools["width_8"]]
            for table in tables:
                assert table.max() >= 12  # beyond what a pool of the type's own would hold
            assert set(np.concatenate(tables).ravel().tolist()) <= set(range(36))

    @pytest.mark.parametrize("p", [0, 1, 2])
    def test_factors_equal_the_loop_for_all_blocks_and_for_one(self, p):
        adapter = randomised(build(WIDE, SHARING, equivalent_rank=2, rank=2, private_rank=p))
        factors = quick_jit(lambda adapter: adapter.factors())(adapter)
        one = quick_jit(adapter.factors)(1)
        for side, pools in OWNERS.items():
            for pool, names in pools.items():
                array = np.asarray(getattr(adapter, f"pool_{side}")[pool][...])
                table = np.concatenate([adapter.tables()[f"table_{side}/{n}"] for n in names])
                num_public = (2 - p) * 3 * len(names) * 2
                want = assembled_by_hand(array, table, num_public, p)
                for i, name in enumerate(names):
                    own = want[3 * i : 3 * i + 3]
                    np.testing.assert_array_equal(getattr(factors[name], side), own)
                    np.testing.assert_array_equal(getattr(one[name], side), own[1])

    def test_private_shards_are_each_used_by_one_site(self):
        adapter = build(WIDE, SHARING)
        for side, pools in OWNERS.items():
            tables = [adapter.tables()[f"table_{side}/{n}"] for n in pools["width_8"]]
            private = np.concatenate([table[:, 4:].ravel() for table in tables])
            np.testing.assert_array_equal(np.sort(private), np.arange(36, 54))

    def test_the_budget_is_exact_and_shared_pools_are_counted_as_shared(self):
        for e in (1, 2, 8):
            config = MoSConfig(e, e + 1, 2, pool_scope="width")
            for sites in (SHARING, model_sites("llama2-7b"), model_sites("smollm2-135m")):
                counts = count_parameters(config, sites)
                assert sum(counts.values()) == sum(count_parameters(LoRAConfig(e), sites).values())
        counts = build(WIDE, SHARING, rank_scaling=True).count_trained_by_site()
        assert counts == {
            "q_proj": 15,
            "o_proj": 15,
            "up_proj": 15 + 18 * 6,
            "down_proj": 15 + 18 * 6,
            "shared": 2 * 54 * 4,
        }

    def test_rank_may_exceed_what_one_types_pool_would_hold(self):
        sites = {name: SHARING[name] for name in ("q_proj", "o_proj")}
        with pytest.raises(InputError, match="rank=12"):
            build(MoSConfig(2, 12), sites)
        adapter = build(MoSConfig(2, 12, pool_scope="width"), sites)
        assert adapter.site_factors("q_proj").rank == 12
        assert adapter.count_idle_parameters() == 0
        with pytest.raises(
            InputError, match=r"'width_8', shared by o_proj, q_proj, .* = 12 of them"
        ):
            build(MoSConfig(2, 13, pool_scope="width"), sites)

    def test_a_shard_is_idle_only_when_no_type_uses_it(self):
        adapter = randomised(build(MoSConfig(3, 2, 2, 1, pool_scope="width"), SHARING))
        gradients = gradients_of(adapter, 0.1)
        unused = {
            name: int(np.sum(~np.any(gradient, axis=1))) for name, gradient in gradients.items()
        }
        assert min(unused.values()) > 0
        idle = sum(count * gradients[name].shape[1] for name, count in unused.items())
        summary = adapter.summary()
        assert summary["idle_parameters"] == idle
        # Each of three types' three blocks draws 2 of 36, or of 12 where a type is alone.
        expected = max((1 - 2 / 36) ** 9, (1 - 2 / 12) ** 3)
        assert summary["expected_idle_share_of_public_pool"] == pytest.approx(expected)

    def test_balance_is_over_all_types_of_a_pool(self):
        adapter = build(WIDE, SHARING, balanced_routing=True, rank=6)
        adapter.check()
        for side, pools in OWNERS.items():
            tables = [adapter.tables()[f"table_{side}/{n}"][:, :5] for n in pools["width_8"]]
            uses = np.bincount(np.concatenate(tables).ravel(), minlength=36)
            assert uses.sum() == 9 * 10
            assert sorted(set(uses.tolist())) == [2, 3]
        adapter.table_a["o_proj"][...] = build(WIDE, SHARING, rank=6).table_a["o_proj"][...]
        with pytest.raises(
            InputError, match=r"table_a/o_proj and table_a/q_proj and .*shard \d+ is used"
        ):
            adapter.check()

    def test_a_private_shard_of_another_type_is_found(self):
        adapter = build(WIDE, SHARING)
        adapter.table_a["q_proj"][...] = adapter.table_a["o_proj"][...]
        with pytest.raises(InputError, match="table_a/q_proj: the private vectors of block 0 must"):
            adapter.check()

    def test_types_that_are_alone_with_their_widths_are_routed_as_in_the_paper(self):
        sites = {"up_proj": SHARING["up_proj"], "down_proj": SHARING["down_proj"]}
        wide, paper = build(WIDE, sites), build(CONFIG, sites)
        assert routing.checksum(wide.tables()) == routing.checksum(paper.tables())
        for name, array in trained_arrays(paper).items():
            np.testing.assert_array_equal(trained_arrays(wide)[name], array)

    def test_shared_a_pools_are_uniform_within_the_bound_of_the_width(self):
        pool = np.asarray(build(WIDE, SHARING).pool_a["width_8"][...])
        assert 0.8 * 8**-0.5 < np.abs(pool).max() <= 8**-0.5

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"pool_scope": "site"}, "pool_scope='site'; did you mean 'site_type'"),
            ({"pool_scope": None}, "pool_scope=None; .*Known: site_type, width"),
            (
                {"pool_scope": "width", "rank": None, "subset_selection": False},
                "subset_selection=False contradicts pool_scope='width': every block",
            ),
            (
                {"pool_scope": "width", "pair_dissociation": False},
                "pair_dissociation=False contradicts pool_scope='width': B would",
            ),
        ],
    )
    def test_what_cannot_be_is_refused(self, fields, message):
        with pytest.raises(InputError, match=f"mos: {message}"):
            MoSConfig(**{"equivalent_rank": 2, "rank": 4, **fields})


class TestRateRatio:
    @pytest.mark.parametrize(
        ("config", "own", "other"),
        [
            (MoSConfig(2, 3, 2, 1), "pool_b", "pool_a"),
            (LoRAConfig(rank=2), "b", "a"),
        ],
        ids=["mos", "lora"],
    )
    def test_b_moves_by_the_multiple_and_a_as_before(self, config, own, other):
        section = TrainingSection(learning_rate=1e-2, steps=10, weight_decay=0.1)
        trained = nnx.state(randomised(build(config)), nnx.Param)
        gradients = jax.tree.map(lambda leaf: jnp.sin(7 * leaf), trained)

        def updates(ratio):
            ratios = dataclasses.replace(config, b_rate_ratio=ratio).rate_ratios()
            optimizer = make_optimizer(section, ratios)
            state = optimizer.init(trained)
            for _ in range(2):
                update, state = optimizer.update(gradients, state, trained)
            return update

        plain, faster = updates(1.0), updates(4.0)
        for name in SITES:
            unchanged = plain[other][name].get_value()
            assert np.all(unchanged != 0)
            np.testing.assert_array_equal(faster[other][name].get_value(), unchanged)
            want = 4 * np.asarray(plain[own][name].get_value())
            assert np.all(want != 0)
            np.testing.assert_array_equal(faster[own][name].get_value(), want)

    def test_without_a_ratio_the_optimizer_has_nothing_to_do(self):
        assert MoSConfig(2, 3).rate_ratios() == LoRAConfig().rate_ratios() == {}
        assert MoSConfig(2, 3, b_rate_ratio=16).rate_ratios() == {"pool_b": 16}
        assert LoRAConfig(b_rate_ratio=0.5).rate_ratios() == {"b": 0.5}

    @pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), "4", True, None])
    def test_what_is_no_positive_number_is_refused(self, value):
        for method, fields in (("mos", {"rank": 4}), ("lora", {})):
            with pytest.raises(InputError, match=f"{method}: b_rate_ratio must be a finite number"):
                make_config(method, {**fields, "b_rate_ratio": value})
