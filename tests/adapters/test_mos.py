import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mos_jax.adapters import routing
from mos_jax.adapters.adapter import Frozen
from mos_jax.adapters.lora import LoRAConfig
from mos_jax.adapters.low_rank import LowRank
from mos_jax.adapters.methods import count_parameters, create_adapter, make_config
from mos_jax.adapters.mos import MoS, MoSConfig
from mos_jax.adapters.sites import SiteShape
from mos_jax.errors import InputError
from mos_jax.models.known import KNOWN_CONFIGS
from tests.adapters.fixtures_adapters import (
    MODEL_LAYERS,
    SITES,
    SOME_LAYERS,
    assembled_by_hand,
    frozen_arrays,
    quick_jit,
    randomised,
    split_trained,
    trained_arrays,
)

CONFIG = MoSConfig(equivalent_rank=3, rank=5, shards_per_vector=2, private_rank=1)


def build(config=CONFIG, sites=SITES, seed=0) -> Any:
    return create_adapter(config, sites, jax.random.key(seed))


def model_sites(name):
    return {site: SiteShape(*shape) for site, shape in KNOWN_CONFIGS[name].site_shapes().items()}


# Per unit of rank, over all seven site types.
MODELS = {
    "llama2-7b": 2_498_560,
    "llama2-13b": 3_911_680,
    "llama3-8b": 2_621_440,
    "llama3.2-3b": 1_519_616,
    "llama3.2-1b": 704_512,
    "smollm2-135m": 305_280,
}


class TestCounts:
    @pytest.mark.parametrize("name", MODELS)
    @pytest.mark.parametrize(
        "config",
        [
            MoSConfig(1, 2),
            MoSConfig(2, 8, 4, 1),
            MoSConfig(8, 16, 4, 3, pair_dissociation=False),
            MoSConfig(64, 72, 1, 60),
        ],
        ids=lambda config: f"e={config.equivalent_rank}",
    )
    def test_the_budget_is_that_of_lora_to_the_digit(self, name, config):
        sites, e = model_sites(name), config.equivalent_rank
        counts = count_parameters(config, sites)
        assert counts == {
            site: e * shape.num_layers * (shape.d_in + shape.d_out) for site, shape in sites.items()
        }
        assert sum(counts.values()) == e * MODELS[name]
        assert counts == count_parameters(LoRAConfig(rank=e), sites)

    @pytest.mark.parametrize(
        ("name", "at_2", "at_8", "at_64"),
        [
            ("llama2-7b", 4_997_120, 19_988_480, 159_907_840),
            ("llama2-13b", 7_823_360, 31_293_440, 250_347_520),
            ("llama3-8b", 5_242_880, 20_971_520, 167_772_160),
            ("llama3.2-3b", 3_039_232, 12_156_928, 97_255_424),
            ("llama3.2-1b", 1_409_024, 5_636_096, 45_088_768),
            ("smollm2-135m", 610_560, 2_442_240, 19_537_920),
        ],
    )
    def test_published_counts_at_ranks_2_8_and_64(self, name, at_2, at_8, at_64):
        sites = model_sites(name)
        for e, count in ((2, at_2), (8, at_8), (64, at_64)):
            assert sum(count_parameters(LoRAConfig(rank=e), sites).values()) == count
            assert sum(count_parameters(MoSConfig(e, 2 * e), sites).values()) == count

    def test_trained_random_scaling_adds_its_scalars_on_llama2_7b(self):
        sites = model_sites("llama2-7b")
        counts = {
            kind: sum(
                count_parameters(MoSConfig.pure_sharing(2, random_scaling=kind), sites).values()
            )
            for kind in (None, "fixed", "trained")
        }
        assert counts[None] == counts["fixed"] == 4_997_120
        assert counts["trained"] - counts[None] == 64 * 224 == 14_336

    def test_only_adapted_layers_and_types_are_paid_for(self):
        sites = {"q_proj": SiteShape(3, 8, 8, (1, 4, 6))}
        assert count_parameters(CONFIG, sites) == {"q_proj": 3 * 3 * 16}
        assert build(CONFIG, sites).count_trained() == 3 * 3 * 16

    def test_counting_does_not_allocate_what_it_counts(self):
        # 4 TB of trained arrays.
        sites = {"q_proj": SiteShape(2, 10**9, 10**9)}
        assert count_parameters(MoSConfig(256, 3, 1, 2), sites)["q_proj"] == 256 * 2 * 2 * 10**9


class TestInit:
    def test_step_0_is_the_base(self):
        x = jnp.asarray(np.random.default_rng(0).normal(0, 100, (4, 8)), jnp.float32)

        @quick_jit
        def changes(adapter):
            factors = adapter.factors().values()
            outputs = [jax.vmap(LowRank.apply, in_axes=(0, None))(f, x) for f in factors]
            return outputs, [f.b for f in factors], [f.delta() for f in factors]

        for config in (CONFIG, MoSConfig(2, 2, 1, 2), MoSConfig.pure_sharing(2)):
            adapter = build(config)
            assert all(np.any(pool[...]) for pool in adapter.pool_a.values())
            for change in jax.tree.leaves(changes(adapter)):
                assert not np.any(change)

    def test_a_shards_are_uniform_within_the_bound_of_the_full_width(self):
        wide = {"q_proj": SiteShape(8, 1024, 8)}
        pool = np.asarray(build(MoSConfig(4, 8, 8, 1), wide).pool_a["q_proj"][...])
        bound = 1024**-0.5  # 128 is the width of a shard
        assert pool.shape == (4 * 8 * 8, 128)
        assert np.abs(pool).max() <= bound
        private = pool[3 * 8 * 8 :]
        for part in (pool, private):
            deciles = np.quantile(part, np.linspace(0, 1, 11))
            np.testing.assert_allclose(deciles, np.linspace(-bound, bound, 11), atol=0.05 * bound)

    def test_the_key_seeds_the_pools_and_not_the_tables(self):
        one, other = build(seed=0), build(seed=1)
        for name in SITES:
            assert np.all(one.pool_a[name][...] != other.pool_a[name][...])
        assert routing.checksum(one.tables()) == routing.checksum(other.tables())

    def test_the_routing_seed_changes_the_tables_and_not_the_pools(self):
        one, other = build(), build(dataclasses.replace(CONFIG, routing_seed=1))
        for name in SITES:
            np.testing.assert_array_equal(one.pool_a[name][...], other.pool_a[name][...])
            assert np.any(one.table_a[name][...] != other.table_a[name][...])
            assert np.any(one.table_b[name][...] != other.table_b[name][...])

    def test_the_routing_seed_defaults_to_0(self):
        assert MoSConfig(2, 4).routing_seed == 0

    def test_a_types_arrays_do_not_depend_on_which_other_types_are_adapted(self):
        both, alone = build(), build(sites={"down_proj": SITES["down_proj"]})
        backwards = build(sites=dict(reversed(SITES.items())))
        for part in ("pool_a", "table_a", "table_b"):
            want = np.asarray(getattr(both, part)["down_proj"][...])
            for other in (alone, backwards):
                np.testing.assert_array_equal(getattr(other, part)["down_proj"][...], want)

    def test_types_of_one_shape_have_pools_and_tables_of_their_own(self):
        site = SiteShape(3, 8, 8)
        adapter = build(sites={"q_proj": site, "k_proj": site})
        for part in (adapter.pool_a, adapter.table_a, adapter.table_b):
            assert np.any(part["q_proj"][...] != part["k_proj"][...])


ASSEMBLED = {
    "public and private": CONFIG,
    "public only": MoSConfig(2, 4, 4, 0),
    "whole vectors": MoSConfig(3, 4, 1, 2),
    "tied pairs": MoSConfig(3, 5, 2, 1, pair_dissociation=False),
    "all shards": MoSConfig(2, None, 2, 1, subset_selection=False),
    "private only": MoSConfig(2, 2, 2, 2),
    "one block's worth": MoSConfig(1, 1, 4, 0),
}
each_config = pytest.mark.parametrize("config", ASSEMBLED.values(), ids=ASSEMBLED)


class TestAssembly:
    def by_hand(self, adapter, config, name, num_layers=3):
        e, p = config.equivalent_rank, config.private_rank
        num_public = (e - p) * num_layers * config.shards_per_vector
        return tuple(
            assembled_by_hand(
                np.asarray(pool[name][...]), np.asarray(table[name][...]), num_public, p
            )
            for pool, table in (
                (adapter.pool_a, adapter.table_a),
                (adapter.pool_b, adapter.table_b),
            )
        )

    @each_config
    def test_all_layers_at_once_equal_the_loop(self, config):
        adapter = randomised(build(config))
        factors = quick_jit(lambda adapter: adapter.factors())(adapter)
        assert sorted(factors) == sorted(SITES)
        for name, site in SITES.items():
            a, b = self.by_hand(adapter, config, name)
            np.testing.assert_array_equal(factors[name].a, a)
            np.testing.assert_array_equal(factors[name].b, b)
            rank = config.rank or config.private_rank + 3 * (
                config.equivalent_rank - config.private_rank
            )
            assert factors[name].a.shape == (3, rank, site.d_in)
            assert factors[name].b.shape == (3, rank, site.d_out)
            np.testing.assert_array_equal(factors[name].scale, np.full(3, 16 / rank, np.float32))

    @each_config
    def test_one_layer_traced_or_not_equals_the_loop(self, config):
        adapter = randomised(build(config))
        compiled = quick_jit(lambda layer: adapter.site_factors("down_proj", layer))
        every = [compiled(k) for k in range(3)]
        if config is CONFIG:
            every += [adapter.site_factors("down_proj", k) for k in range(3)]
        a, b = self.by_hand(adapter, config, "down_proj")
        for k, factors in enumerate(every):
            np.testing.assert_array_equal(factors.a, a[k % 3])
            np.testing.assert_array_equal(factors.b, b[k % 3])
            assert (factors.scale.shape, factors.layers) == ((), None)

    def test_vmap_and_scan_over_layers_equal_the_loop(self):
        adapter = randomised(build())
        layers = jnp.arange(3)
        mapped = quick_jit(jax.vmap(adapter.factors))(layers)
        _, scanned = quick_jit(
            lambda: jax.lax.scan(lambda _, layer: (None, adapter.factors(layer)), None, layers)
        )()
        for name in SITES:
            a, b = self.by_hand(adapter, CONFIG, name)
            for factors in (mapped[name], scanned[name]):
                np.testing.assert_array_equal(factors.a, a)
                np.testing.assert_array_equal(factors.b, b)
                np.testing.assert_array_equal(factors.scale, np.full(3, 16 / 5, np.float32))

    def test_a_hand_written_table_gives_the_hand_written_vectors(self):
        # 2 blocks, 2 public and 1 private vectors, 2 shards each.
        sites = {"q_proj": SiteShape(2, 4, 2)}
        adapter = build(MoSConfig(2, 3, 2, 1), sites)
        adapter.pool_a["q_proj"][...] = jnp.arange(16.0).reshape(8, 2)
        adapter.pool_b["q_proj"][...] = 100 + jnp.arange(8.0).reshape(8, 1)
        table_a = [[[2, 0], [3, 1], [4, 5]], [[0, 1], [2, 3], [6, 7]]]
        table_b = [[[1, 0], [3, 2], [4, 5]], [[3, 1], [0, 2], [6, 7]]]
        adapter.table_a["q_proj"][...] = jnp.array(table_a, jnp.int32)
        adapter.table_b["q_proj"][...] = jnp.array(table_b, jnp.int32)
        adapter.check()
        factors = adapter.site_factors("q_proj")
        assert factors.a.tolist() == [
            [[4, 5, 0, 1], [6, 7, 2, 3], [8, 9, 10, 11]],
            [[0, 1, 2, 3], [4, 5, 6, 7], [12, 13, 14, 15]],
        ]
        assert factors.b.tolist() == [
            [[101, 100], [103, 102], [104, 105]],
            [[103, 101], [100, 102], [106, 107]],
        ]

    def test_selected_layers_stand_at_their_place_and_the_rest_have_scale_0(self):
        whole, some = randomised(build()), randomised(build(sites=SOME_LAYERS))
        compiled = quick_jit(some.factors)
        for name in SITES:
            a, b = self.by_hand(some, CONFIG, name)
            every = some.site_factors(name)
            assert every.layers == (0, 2, 3)
            np.testing.assert_array_equal(every.a, whole.site_factors(name).a)
            for k in range(MODEL_LAYERS):
                for factors in (some.factors(k)[name], compiled(k)[name]):
                    if k in (0, 2, 3):
                        place = (0, 2, 3).index(k)
                        np.testing.assert_array_equal(factors.a, a[place])
                        np.testing.assert_array_equal(factors.b, b[place])
                        assert factors.scale == np.float32(16 / 5)
                    else:
                        assert factors.scale == 0
                        assert not np.any(factors.delta())

    def test_private_vectors_of_a_meet_their_partners_in_b(self):
        # Private vector j of block k of both pools is marked 10 k + j, the public ones 0.
        sites = {"q_proj": SiteShape(3, 4, 4)}
        adapter = build(MoSConfig(3, 3, 2, 2), sites)
        marks = [0] * 6 + [10 * k + j + 1 for k in range(3) for j in range(2) for _ in range(2)]
        pool = jnp.repeat(jnp.array(marks, jnp.float32)[:, None], 2, axis=1)
        adapter.pool_a["q_proj"][...] = pool
        adapter.pool_b["q_proj"][...] = pool
        factors = adapter.site_factors("q_proj")
        for k in range(3):
            want = [[0] * 4, [10 * k + 1] * 4, [10 * k + 2] * 4]
            assert factors.a[k].tolist() == factors.b[k].tolist() == want

    def test_the_active_rank_scales(self):
        adapter = build(MoSConfig(3, 5, 2, 1, alpha=2.5))
        assert adapter.site_factors("q_proj").scale.tolist() == [0.5] * 3
        everything = build(MoSConfig.pure_sharing(2))
        assert everything.site_factors("q_proj", 1).scale == np.float32(16 / 6)


def loss_of_factors(factors, targets):
    """A loss that sees every block's change of its weight."""
    return sum(jnp.sum((factors[name].delta() - targets[name]) ** 2) for name in factors)


def pool_gradients(adapter, targets):
    graphdef, pools, rest = split_trained(adapter)

    @jax.jit
    @jax.grad
    def gradients(pools):
        return loss_of_factors(nnx.merge(graphdef, pools, rest).factors(), targets)

    return {
        "/".join(map(str, path)): np.asarray(variable[...])
        for path, variable in nnx.to_flat_state(gradients(pools))
    }


def random_targets(sites=SITES):
    random = np.random.default_rng(9)
    return {
        name: jnp.asarray(random.normal(size=(site.num_layers, site.d_in, site.d_out)), jnp.float32)
        for name, site in sites.items()
    }


class TestGradients:
    @each_config
    def test_pools_get_the_sum_over_the_gradients_of_separate_copies(self, config):
        sites = {"q_proj": SITES["q_proj"]}
        adapter, targets = randomised(build(config, sites)), random_targets(sites)
        gradients = pool_gradients(adapter, targets)
        assert sorted(gradients) == ["pool_a/q_proj", "pool_b/q_proj"]
        copies = quick_jit(lambda a: jax.grad(loss_of_factors)(a.factors(), targets))(adapter)
        shards = config.shards_per_vector
        for name in sites:
            for part in ("a", "b"):
                by_block = np.asarray(getattr(copies[name], part), np.float64)
                table = np.asarray(getattr(adapter, f"table_{part}")[name][...])
                have = gradients[f"pool_{part}/{name}"]
                want = np.zeros(have.shape)
                for k, j, i in np.ndindex(table.shape):
                    want[table[k, j, i]] += np.split(by_block[k, j], shards)[i]
                assert np.abs(want).max() > 1
                np.testing.assert_allclose(have, want, rtol=1e-4, atol=1e-3)

    def test_idle_shards_get_exactly_no_gradient_and_are_counted(self):
        # 8 public shards of which two blocks draw 2 each: at least 4 are idle in each pool.
        sites = {"q_proj": SiteShape(2, 8, 4)}
        adapter = randomised(build(MoSConfig(3, 2, 2, 1), sites))
        gradients = pool_gradients(adapter, random_targets(sites))
        idle = 0
        for part, width in (("a", 4), ("b", 2)):
            used = set(np.asarray(adapter.tables()[f"table_{part}/q_proj"]).ravel().tolist())
            unused = sorted(set(range(12)) - used)
            assert len(unused) >= 4
            gradient = gradients[f"pool_{part}/q_proj"]
            assert not np.any(gradient[unused])
            assert np.all(np.any(gradient[sorted(used)], axis=1))
            idle += len(unused) * width
        assert adapter.count_idle_parameters() == idle
        summary = adapter.summary()
        assert summary["idle_parameters"] == idle
        assert summary["used_parameters"] == adapter.count_trained() - idle
        assert summary["trained_parameters"] == 3 * 2 * 12
        assert summary["expected_idle_share_of_public_pool"] == pytest.approx((1 - 1 / 4) ** 2)

    def test_nothing_is_idle_where_blocks_use_everything(self):
        for config in (MoSConfig.pure_sharing(2), MoSConfig(2, 2, 2, 2)):
            assert build(config).count_idle_parameters() == 0
            assert build(config).summary()["used_parameters"] == build(config).count_trained()


def summed_loss(adapter, x, y):
    """Regression on fixed inputs, one site type after the other."""
    loss = jnp.float32(0)
    for name, factors in adapter.factors().items():
        outputs = jax.vmap(LowRank.apply, in_axes=(0, None))(factors, x[name])
        loss += jnp.mean((outputs - y[name]) ** 2)
    return loss


@quick_jit
def one_step(adapter, x, y):
    graphdef, params, rest = split_trained(adapter)

    def loss(params):
        return summed_loss(nnx.merge(graphdef, params, rest), x, y)

    before, gradients = jax.value_and_grad(loss)(params)
    params = jax.tree.map(lambda value, gradient: value - 1e-4 * gradient, params, gradients)
    return before, loss(params), nnx.merge(graphdef, params, rest)


class TestStrategies:
    @pytest.mark.parametrize(
        ("selection", "dissociation", "shards", "p"),
        list(itertools.product((True, False), (True, False), (1, 2), (0, 1))),
    )
    def test_all_sixteen_combinations_train_within_the_budget(
        self, selection, dissociation, shards, p
    ):
        e = 2
        config = MoSConfig(
            e, 3 if selection else None, shards, p, subset_selection=selection,
            pair_dissociation=dissociation,
        )  # fmt: skip
        adapter = randomised(build(config))
        assert adapter.count_trained() == sum(
            e * site.num_layers * (site.d_in + site.d_out) for site in SITES.values()
        )
        for name, site in SITES.items():
            table_a, table_b = (adapter.tables()[f"table_{part}/{name}"] for part in "ab")
            rank = 3 if selection else p + (e - p) * site.num_layers
            assert table_a.shape == table_b.shape == (site.num_layers, rank, shards)
            assert np.array_equal(table_a, table_b) is not dissociation
            everything = (e - p) * site.num_layers * shards
            for k in range(site.num_layers):
                public = {index for index in table_a[k].ravel().tolist() if index < everything}
                assert (len(public) == everything) is not selection
                assert len(public) == (rank - p) * shards
        random = np.random.default_rng(3)
        x = {n: random.normal(size=(6, s.d_in)).astype(np.float32) for n, s in SITES.items()}
        y = {
            n: random.normal(size=(s.num_layers, 6, s.d_out)).astype(np.float32)
            for n, s in SITES.items()
        }
        before, after, stepped = one_step(adapter, x, y)
        assert after < before
        old, new = trained_arrays(adapter), trained_arrays(stepped)
        assert all(np.any(old[name] != new[name]) for name in old)
        old, new = frozen_arrays(adapter), frozen_arrays(stepped)
        assert len(old) == 4
        for name in old:
            np.testing.assert_array_equal(old[name], new[name])

    def test_open_rank_is_all_public_vectors_and_the_private_ones(self):
        sites = {"q_proj": SiteShape(5, 4, 4), "k_proj": SiteShape(3, 4, 4)}
        adapter = build(MoSConfig(3, None, 2, 1, subset_selection=False), sites)
        assert adapter.site_factors("q_proj").rank == 1 + 2 * 5
        assert adapter.site_factors("k_proj").rank == 1 + 2 * 3

    def test_every_field_may_be_given_by_name(self):
        fields = dataclasses.asdict(MoSConfig(2, 3, random_scaling="fixed"))
        assert make_config("mos", fields) == MoSConfig(2, 3, random_scaling="fixed")
        for name in (
            "equivalent_rank", "rank", "shards_per_vector", "private_rank", "alpha",
            "routing_seed", "subset_selection", "pair_dissociation", "random_scaling",
        ):  # fmt: skip
            assert name in fields


class TestOnlyPrivateIsLoRA:
    @pytest.mark.parametrize("dissociated", [True, False])
    @pytest.mark.parametrize(("rank", "shards"), [(2, 1), (2, 4), (None, 2)])
    def test_factors_and_gradients_are_those_of_lora_bitwise(self, rank, shards, dissociated):
        config = MoSConfig(2, rank, shards, 2, pair_dissociation=dissociated)
        mos, lora = build(config), build(LoRAConfig(rank=2))
        for name in SITES:
            np.testing.assert_array_equal(mos.site_factors(name).a, lora.site_factors(name).a)

        b = {
            name: np.random.default_rng(4).normal(size=(3, 2, site.d_out)).astype(np.float32)
            for name, site in SITES.items()
        }
        for name in SITES:
            lora.b[name][...] = jnp.asarray(b[name])
            mos.pool_b[name][...] = jnp.asarray(b[name].reshape(mos.pool_b[name][...].shape))
        for name in SITES:
            one, other = mos.site_factors(name), lora.site_factors(name)
            for part in ("a", "b", "scale"):
                np.testing.assert_array_equal(getattr(one, part), getattr(other, part))
        of_mos = pool_gradients(mos, random_targets())
        of_lora = pool_gradients(lora, random_targets())
        for name in SITES:
            for part in "ab":
                want = of_lora[f"{part}/{name}"]
                have = of_mos[f"pool_{part}/{name}"].reshape(want.shape)
                assert np.any(want)
                np.testing.assert_array_equal(have, want)


class TestPureSharing:
    def test_it_is_one_pair_of_pools_used_whole_by_every_block(self):
        config = MoSConfig.pure_sharing(2)
        assert config == MoSConfig(2, subset_selection=False, pair_dissociation=False)
        adapter = randomised(build(config))
        for name in SITES:
            factors = adapter.site_factors(name)
            assert factors.rank == 2 * 3
            pool_a = np.asarray(adapter.pool_a[name][...], np.float64)
            pool_b = np.asarray(adapter.pool_b[name][...], np.float64)
            want = 16 / 6 * sum(np.outer(a, b) for a, b in zip(pool_a, pool_b, strict=True))
            for delta in np.asarray(factors.delta()):
                np.testing.assert_allclose(delta, want, rtol=1e-4, atol=1e-5)

    def test_fields_other_than_the_switches_pass_through(self):
        config = MoSConfig.pure_sharing(4, alpha=8.0, routing_seed=3, random_scaling="fixed")
        assert (config.equivalent_rank, config.alpha, config.routing_seed) == (4, 8.0, 3)
        assert config.random_scaling == "fixed"

    @pytest.mark.parametrize("kind", ["fixed", "trained"])
    def test_random_scaling_multiplies_the_vectors_of_a_by_each_sites_own_scalars(self, kind):
        plain = randomised(build(MoSConfig.pure_sharing(2)))
        scaled = build(MoSConfig.pure_sharing(2, random_scaling=kind, random_scaling_std=0.5))
        for name in SITES:
            scalars = np.asarray(scaled.scaling[name][...])
            assert scalars.shape == (3, 6)
            assert scalars.dtype == np.float32
            assert np.unique(scalars).size == scalars.size
            scaled.pool_a[name][...] = plain.pool_a[name][...]
            scaled.pool_b[name][...] = plain.pool_b[name][...]
            have, want = scaled.site_factors(name), plain.site_factors(name)
            np.testing.assert_array_equal(have.a, scalars[:, :, None] * np.asarray(want.a))
            np.testing.assert_array_equal(have.b, want.b)
            np.testing.assert_array_equal(have.scale, want.scale)
            for k in range(3):
                np.testing.assert_array_equal(scaled.site_factors(name, k).a, have.a[k])

    def test_fixed_scalars_are_frozen_and_come_from_the_routing_seed(self):
        def scalars(seed, **fields):
            config = MoSConfig.pure_sharing(2, random_scaling="fixed", **fields)
            adapter = build(config, seed=seed)
            assert all(type(v) is Frozen for v in adapter.scaling.values())
            assert not any("scaling" in name for name in trained_arrays(adapter))
            return np.asarray(adapter.scaling["q_proj"][...])

        np.testing.assert_array_equal(scalars(0), scalars(1))
        assert np.all(scalars(0) != scalars(0, routing_seed=1))

    def test_trained_scalars_are_counted_and_come_from_the_key(self):
        config = MoSConfig.pure_sharing(2, random_scaling="trained")
        adapter, other = build(config), build(config, seed=1)
        assert all(type(v) is nnx.Param for v in adapter.scaling.values())
        plain = build(MoSConfig.pure_sharing(2))
        extra = adapter.count_trained() - plain.count_trained()
        assert extra == adapter.summary()["parameters_beyond_budget"] == 2 * 3 * 6
        assert plain.summary()["parameters_beyond_budget"] == 0
        values = np.asarray(adapter.scaling["q_proj"][...])
        assert np.all(values != np.asarray(other.scaling["q_proj"][...]))
        gradients = pool_gradients(randomised(adapter), random_targets())
        assert all(np.all(gradients[f"scaling/{name}"] != 0) for name in SITES)

    @pytest.mark.parametrize("kind", ["fixed", "trained"])
    def test_the_scalars_are_normal_with_the_given_moments(self, kind):
        site = {"q_proj": SiteShape(24, 1, 1)}
        for mean, std, fields in (
            (1.0, 0.02, {}),
            (3.0, 0.5, {"random_scaling_mean": 3.0, "random_scaling_std": 0.5}),
        ):
            config = MoSConfig.pure_sharing(8, random_scaling=kind, **fields)
            drawn = np.asarray(build(config, site).scaling["q_proj"][...])  # 24 x 192
            assert abs(drawn.mean() - mean) < 5 * std / np.sqrt(drawn.size)
            assert abs(drawn.std() / std - 1) < 0.05
            within = np.mean(np.abs(drawn - mean) < std)
            assert abs(within - 0.6827) < 0.04

    def test_step_0_is_the_base_with_random_scaling_too(self):
        for kind in ("fixed", "trained"):
            adapter = build(MoSConfig.pure_sharing(2, random_scaling=kind))
            assert not any(np.any(f.delta()) for f in adapter.factors().values())


class TestRefused:
    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"private_rank": 5, "rank": 6}, "private_rank=5 must be at most equivalent_rank=2"),
            ({"private_rank": 1, "rank": 1}, "rank=1 must be above private_rank=1"),
            ({"equivalent_rank": 4, "private_rank": 3, "rank": 2}, "rank=2 .*private_rank=3"),
            ({"private_rank": 2, "rank": 3}, "equivalent_rank = 2 .*rank must be 2, got 3"),
            ({"private_rank": 2, "rank": 1}, "equivalent_rank = 2 .*rank must be 2, got 1"),
            ({"rank": None}, "rank is open"),
            ({"rank": 4, "subset_selection": False}, "rank=4 contradicts subset_selection=False"),
            ({"rank": 0}, "rank must be an integer >= 1, got 0"),
            ({"rank": -4}, "rank must be an integer >= 1, got -4"),
            ({"rank": 4.0}, "rank must be an integer >= 1, got 4.0"),
            ({"rank": "4"}, "rank must be an integer >= 1, got '4'"),
            ({"equivalent_rank": 0}, "equivalent_rank must be an integer >= 1, got 0"),
            ({"equivalent_rank": True}, "equivalent_rank must be an integer >= 1, got True"),
            ({"equivalent_rank": None}, "equivalent_rank must be an integer >= 1, got None"),
            ({"shards_per_vector": 0}, "shards_per_vector must be an integer >= 1, got 0"),
            ({"shards_per_vector": 2.5}, "shards_per_vector must be an integer >= 1, got 2.5"),
            ({"private_rank": -1}, "private_rank must be an integer >= 0, got -1"),
            ({"private_rank": False}, "private_rank must be an integer >= 0, got False"),
            ({"routing_seed": -1}, "routing_seed must be an integer >= 0, got -1"),
            ({"routing_seed": 0.5}, "routing_seed must be an integer >= 0, got 0.5"),
            ({"alpha": 0}, "alpha must be a finite number above 0, got 0"),
            ({"alpha": -16.0}, "alpha must be a finite number above 0, got -16.0"),
            ({"alpha": float("nan")}, "alpha must be a finite number above 0, got nan"),
            ({"alpha": float("inf")}, "alpha must be a finite number above 0, got inf"),
            ({"alpha": "16"}, "alpha must be a finite number above 0, got '16'"),
            ({"alpha": True}, "alpha must be a finite number above 0, got True"),
            ({"subset_selection": 1}, "subset_selection must be True or False, got 1"),
            ({"pair_dissociation": None}, "pair_dissociation must be True or False, got None"),
            ({"random_scaling": "free"}, "random_scaling must be None, 'fixed' or .*'free'"),
            ({"random_scaling": True}, "random_scaling must be None, 'fixed' or .*True"),
            ({"random_scaling_std": -0.1}, "random_scaling_std .*-0.1"),
            ({"random_scaling_mean": float("nan")}, "random_scaling_mean .*nan"),
        ],
    )
    def test_a_configuration_that_cannot_be_used_says_why_with_its_numbers(self, fields, message):
        defaults = {"equivalent_rank": 2, "rank": 4}
        with pytest.raises(InputError, match=f"mos: .*{message}"):
            MoSConfig(**{**defaults, **fields})
        with pytest.raises(ValueError, match=message):
            make_config("mos", {**defaults, **fields})

    @pytest.mark.parametrize("field", ["alpha", "random_scaling_mean", "random_scaling_std"])
    @pytest.mark.parametrize("value", ["1", None, True, float("inf"), 1e39, 10**400], ids=repr)
    def test_what_is_no_finite_number_in_fp32_is_refused(self, field, value):
        with pytest.raises(InputError, match=f"mos: {field} must be a finite number"):
            MoSConfig(2, 4, **{field: value})

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("rank", 4),
            ("shards_per_vector", 2),
            ("private_rank", 1),
            ("subset_selection", True),
            ("pair_dissociation", True),
        ],
    )
    def test_pure_sharing_refuses_what_contradicts_it(self, field, value):
        with pytest.raises(InputError, match=f"mos: {field}={value} contradicts pure_sharing"):
            MoSConfig.pure_sharing(2, **{field: value})
        same = getattr(MoSConfig.pure_sharing(2), field)
        assert MoSConfig.pure_sharing(2, **{field: same}) == MoSConfig.pure_sharing(2)

    @pytest.mark.parametrize(
        ("config", "site", "message"),
        [
            (MoSConfig(2, 7), SiteShape(3, 8, 8), r"rank=7 .*7 public .*'q_proj' has .*6 of them"),
            (MoSConfig(2, 5, 1, 1), SiteShape(3, 8, 8), r"rank=5 .*4 public .* 3 of them"),
            (MoSConfig(2, 4, 3), SiteShape(3, 8, 6), "=3 does not divide d_in=8 of 'q_proj'"),
            (MoSConfig(2, 4, 3), SiteShape(3, 6, 8), "=3 does not divide d_out=8 of 'q_proj'"),
            (MoSConfig(2, 4, 16), SiteShape(3, 8, 16), "=16 does not divide d_in=8"),
        ],
    )
    def test_sites_that_do_not_fit_are_named_with_the_numbers(self, config, site, message):
        with pytest.raises(InputError, match=message):
            build(config, {"q_proj": site})
        with pytest.raises(InputError, match=message):
            count_parameters(config, {"q_proj": site})

    def test_the_last_rank_that_fits_builds(self):
        for config in (MoSConfig(2, 6), MoSConfig(2, 4, 1, 1), MoSConfig(2, 2, 8, 2)):
            assert isinstance(build(config, {"q_proj": SiteShape(3, 8, 8)}), MoS)

    def test_selected_layers_bound_the_rank(self):
        message = "rank=5 .*4 of them"
        with pytest.raises(InputError, match=message):
            build(MoSConfig(2, 5), {"q_proj": SiteShape(2, 8, 8, (0, 4))})

    def test_no_sites_or_malformed_ones_are_refused(self):
        with pytest.raises(InputError, match="no sites"):
            build(sites={})
        with pytest.raises(InputError, match=r"'q_proj'.*distinct"):
            build(sites={"q_proj": SiteShape(2, 8, 8, (1, 1))})

    def test_an_unknown_field_gets_the_nearest_name(self):
        with pytest.raises(InputError, match=r"'equivalentrank'.*did you mean 'equivalent_rank'"):
            make_config("mos", {"equivalentrank": 2})
        with pytest.raises(InputError, match="mos: unknown field 'rslora'"):
            make_config("mos", {"rank": 2, "rslora": True})

    def test_an_unknown_method_gets_the_nearest_name(self):
        with pytest.raises(InputError, match=r"'moss'; did you mean 'mos'\?.*lora, mos"):
            make_config("moss", {})

    def test_a_configuration_cannot_be_changed_behind_its_checks(self):
        with pytest.raises(dataclasses.FrozenInstanceError):
            CONFIG.rank = 0  # type: ignore[misc]
        with pytest.raises(InputError, match="rank=1 must be above private_rank=1"):
            dataclasses.replace(CONFIG, rank=1)


class TestCheck:
    def test_a_table_changed_by_hand_is_found_with_its_name(self):
        adapter = build()
        adapter.check()
        table = np.array(adapter.table_b["down_proj"][...])
        table[1, 0, 0] = table[1, 0, 1]
        adapter.table_b["down_proj"][...] = jnp.asarray(table)
        with pytest.raises(InputError, match=r"table_b/down_proj: block 1 .* twice"):
            adapter.check()

    def test_tables_that_differ_are_found_where_pairs_are_tied(self):
        adapter = build(dataclasses.replace(CONFIG, pair_dissociation=False))
        other = build(dataclasses.replace(CONFIG, routing_seed=1))
        adapter.table_b["q_proj"][...] = other.table_b["q_proj"][...]
        with pytest.raises(InputError, match="table_b/q_proj must be equal to table_a/q_proj"):
            adapter.check()

    def test_the_summary_carries_the_checksum_of_all_tables(self):
        adapter = build()
        assert sorted(adapter.tables()) == [
            f"table_{part}/{name}" for part in "ab" for name in ("down_proj", "q_proj")
        ]
        assert adapter.summary()["routing_checksum"] == routing.checksum(adapter.tables())
        assert adapter.summary()["method"] == "mos"
