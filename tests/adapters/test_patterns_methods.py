"""Patterns of ranks in every method: each block is what its method makes of the block's rank."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from mos_jax.adapters import routing
from mos_jax.adapters.methods import METHODS, count_parameters, create_adapter, make_config
from mos_jax.adapters.mos import MoSConfig
from mos_jax.adapters.pools import PoolLayout
from mos_jax.adapters.prolora import PRoLoRAConfig
from mos_jax.adapters.rasa import RaSAConfig
from mos_jax.adapters.share_lora import ShareLoRAConfig
from mos_jax.adapters.sites import SiteShape
from mos_jax.adapters.storage import adapter_arrays, with_arrays
from mos_jax.adapters.tied_lora import TiedLoRAConfig
from mos_jax.adapters.uni_lora import UniLoRAConfig
from mos_jax.adapters.vb_lora import VBLoRAConfig
from mos_jax.adapters.vera import VeRAConfig
from mos_jax.analysis.sharing import usage_counts
from mos_jax.errors import InputError
from tests.adapters.fixtures_adapters import (
    SITES,
    quick_jit,
    randomised,
    split_trained,
    trained_arrays,
)

KEY = jax.random.key(0)
QKV = {"q_proj": SITES["q_proj"], "v_proj": SITES["down_proj"]}
# Of blocks 0, 1 and 2: 2, 5, 3 in q_proj and 2, 3, 3 in the other type.
PATTERN = {"layers.0.*": 2, "layers.1.self_attn.q_proj": 5}
RANKS = {"q_proj": (2, 5, 3), "other": (2, 3, 3)}
ALPHAS = {"layers.2.*": 5.0}

CONFIGS = {
    "mos": MoSConfig(3, 3, 2, 1),
    "mos-scaled": MoSConfig(3, 3, 2, 1, rank_scaling=True, balanced_routing=True),
    "mos-width": MoSConfig(3, 3, 2, 0, pool_scope="width", random_scaling="fixed"),
    "prolora": PRoLoRAConfig(3, 1, 3, 2),
    "prolora-least": PRoLoRAConfig(3, 2, 2, 4),
    "share-a": ShareLoRAConfig(3, "a"),
    "share-b": ShareLoRAConfig(3, "b"),
    "tied": TiedLoRAConfig(3),
    "tied-qkv": TiedLoRAConfig(3, True),
    "vera": VeRAConfig(3),
    "vera-shared": VeRAConfig(3, projections="shared"),
    "rasa": RaSAConfig(3, 1),
    "rasa-least": RaSAConfig(3, 2),
    "vb-lora": VBLoRAConfig(3, num_vectors=5, vector_length=4),
    "uni-lora": UniLoRAConfig(31, 3),
    "uni-lora-drawn": UniLoRAConfig(31, 3, used_more="drawn"),
}
# Trained parameters by the formula of each method's paper, of q_proj (h 8, o 12) and of the other
# type (o 4), whose ranks sum up to 10 and 8, with the largest 5 and 3.
COUNTS = {
    "mos": (3 * 3 * 20, 3 * 3 * 12),
    "mos-scaled": (3 * 3 * 20 + 10, 3 * 3 * 12 + 8),
    "prolora": (3 * 20 + (10 - 3) * (3 + 6), 3 * 12 + (8 - 3) * (3 + 2)),
    "prolora-least": (6 * 20 + (10 - 6) * (4 + 3), 6 * 12 + (8 - 6) * (4 + 1)),
    "share-a": (5 * 8 + 10 * 12, 3 * 8 + 8 * 4),
    "share-b": (10 * 8 + 5 * 12, 8 * 8 + 3 * 4),
    "tied": (5 * 20 + 10 + 3 * 12, 3 * 12 + 8 + 3 * 4),
    "vera": (10 + 3 * 12, 8 + 3 * 4),
    "vera-shared": (10 + 3 * 12, 8 + 3 * 4),
    # Own vectors, one or two of the pool by block, and diagonals of both.
    "rasa": (10 * 20 + 10 + 3 * 2, 8 * 12 + 8 + 3 * 2),
    "rasa-least": (10 * 20 + 10 + 3 * 4, 8 * 12 + 8 + 3 * 4),
    "vb-lora": (10 * (2 + 3) * 5, 8 * (2 + 1) * 5),
    "uni-lora": (0, 0),
    "uni-lora-drawn": (0, 0),
}


@pytest.fixture(params=CONFIGS)
def name(request):
    return request.param


def sites_of(name):
    return QKV if name == "tied-qkv" else SITES


def with_patterns(config):
    fields = {} if "alpha_pattern" in config.no_pattern else {"alpha_pattern": ALPHAS}
    return dataclasses.replace(config, rank_pattern=PATTERN, **fields)


def built(name, **patterns):
    config = with_patterns(CONFIGS[name])
    return create_adapter(dataclasses.replace(config, **patterns), sites_of(name), KEY)


def ranks_of(site_name):
    return RANKS["q_proj" if site_name == "q_proj" else "other"]


def cut_to(adapter, arrays):
    """The adapter with the first entries, along every axis, of larger arrays."""
    graphdef, state = nnx.split(adapter)
    flat = dict(nnx.to_flat_state(state))
    for path, variable in flat.items():
        whole = arrays["/".join(map(str, path))]
        shape = variable.get_value().shape
        flat[path] = variable.replace(jnp.asarray(whole[tuple(slice(n) for n in shape)]))
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


@pytest.mark.parametrize("name", [name for name in CONFIGS if not name.startswith("uni-lora")])
def test_each_block_is_what_the_method_makes_of_that_rank(name):
    """With the first vectors of the same arrays, and an alpha of its own.

    In Uni-LoRA the ranks decide how often an entry is used, which `TestUniLoRA` looks at.
    """
    adapter = randomised(built(name))
    arrays, factors = adapter_arrays(adapter), adapter.factors()
    pool = {"rasa": 1, "rasa-least": 2}.get(name, 0)
    for rank in (2, 3, 5):
        plain = dataclasses.replace(CONFIGS[name], rank=rank)
        uniform = cut_to(create_adapter(plain, sites_of(name), KEY), arrays)
        for site_name, f in factors.items():
            if rank not in ranks_of(site_name):
                continue
            one = uniform.site_factors(site_name)
            for k, r in enumerate(ranks_of(site_name)):
                if r != rank:
                    continue
                r += 2 * pool  # RaSA uses the pool of three blocks, and pays for one.
                assert one.rank == r
                np.testing.assert_array_equal(f.a[k, :r], one.a[k])
                np.testing.assert_array_equal(f.b[k, :r], one.b[k])
                assert not np.any(f.a[k, r:])
                assert not np.any(f.b[k, r:])
                assert np.all(np.any(f.a[k, :r], axis=1))
                alpha = ALPHAS["layers.2.*"] if k == 2 else 16.0
                scaled = name.startswith(("mos", "prolora", "share", "tied"))
                assert f.scale[k] == np.float32(alpha / rank if scaled else 1)
    found = {site_name: f.ranks for site_name, f in factors.items()}
    assert found == {n: tuple(r + 2 * pool for r in ranks_of(n)) for n in factors}


def test_the_count_is_that_of_the_formula_with_the_blocks_own_ranks(name):
    adapter = built(name)
    counts = adapter.count_trained_by_site()
    assert counts == count_parameters(adapter.config, sites_of(name))
    if name in COUNTS:
        assert (counts["q_proj"], counts["down_proj"]) == COUNTS[name]
    if name == "tied-qkv":  # A and u as long as any of the types needs: 2, 5 and 3.
        assert counts == {"q_proj": 5 * 12 + 3 * 12, "v_proj": 3 * 4 + 3 * 4, "shared": 5 * 8 + 10}
    if name.startswith("uni-lora"):
        assert counts["shared"] == 31
    if name == "vb-lora":
        assert counts["shared"] == 5 * 4
        assert adapter.count_served() == 5 * 4 + (10 * 5 + 8 * 3) * 3


def test_what_is_beyond_a_rank_is_zero_is_not_counted_and_never_moves(name):
    """Under AdamW with weight decay, which moves everything that a gradient reaches."""
    adapter = built(name)
    graphdef, params, rest = split_trained(adapter)
    optimizer = optax.adamw(0.1, weight_decay=0.1)

    def loss(params):
        factors = nnx.merge(graphdef, params, rest).factors().values()
        return sum(jnp.sum(jnp.sin(f.delta() + 0.1 * f.a.sum())) for f in factors)

    @quick_jit
    def step(params, state):
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for _ in range(3):
        params, state = step(params, state)
    before, after = trained_arrays(adapter), trained_arrays(nnx.merge(graphdef, params, rest))
    size = sum(array.size for array in after.values())
    for path, array in after.items():
        part, _, site_name = path.partition("/")
        if not adapter.padded_rows(part, site_name):
            continue
        ranks = ranks_of("q_proj" if site_name == "qkv" else site_name)
        for k, r in enumerate(ranks):
            # Parts that hold some vectors of a site only differ in rank as the sites do.
            real = r - (max(ranks) - array.shape[1])
            assert not np.any(before[path][k, real:])
            assert not np.any(array[k, real:])
            if real and not name.startswith("vb-lora"):  # whose logits move k at a time
                assert np.all(array[k, :real] != before[path][k, :real])
            size -= array[k, real:].size
    assert adapter.count_trained() == size


class TestMoS:
    def test_tables_without_a_pattern_are_those_of_before(self):
        """A block of a lower rank draws the first shards that it would draw anyway."""
        whole = create_adapter(MoSConfig(3, 5, 2, 1), SITES, KEY).tables()
        tables = built("mos").tables()
        for side in "ab":
            for name, ranks in RANKS.items():
                path = f"table_{side}/{'q_proj' if name == 'q_proj' else 'down_proj'}"
                for k, r in enumerate(ranks):
                    np.testing.assert_array_equal(tables[path][k, : r - 1], whole[path][k, : r - 1])
                    np.testing.assert_array_equal(tables[path][k, r - 1], whole[path][k, -1])
                    assert not np.any(tables[path][k, r:])

    def test_a_pattern_that_says_what_all_have_changes_no_checksum(self):
        plain = create_adapter(MoSConfig(3, 3, 2, 1), SITES, KEY).tables()
        same = create_adapter(MoSConfig(3, 3, 2, 1, rank_pattern={".*": 3}), SITES, KEY).tables()
        assert routing.checksum(plain) == routing.checksum(same)
        assert routing.checksum(plain) != routing.checksum(built("mos").tables())

    def test_the_factors_are_those_of_a_plain_loop(self):
        adapter = randomised(built("mos"))
        arrays = adapter_arrays(adapter)
        for name in SITES:
            f = adapter.site_factors(name)
            for part in "ab":
                for k, r in enumerate(ranks_of(name)):
                    pool, table = arrays[f"pool_{part}/{name}"], arrays[f"table_{part}/{name}"]
                    public = [[pool[i] for i in table[k, j]] for j in range(r - 1)]
                    # 2 L l public shards, then one private vector for each block.
                    private = [pool[12 + 2 * k], pool[12 + 2 * k + 1]]
                    want = [np.concatenate(vector) for vector in [*public, private]]
                    assert table[k, : r - 1].max() < 12
                    np.testing.assert_array_equal(getattr(f, part)[k, :r], want)

    @pytest.mark.parametrize("ranks", [(2, 5, 3), (1, 1, 4), (6, 2, 2), (7, 7, 1), (7, 7, 7)])
    def test_balanced_draws_stay_balanced_whatever_the_ranks(self, ranks):
        layout = PoolLayout(3, 2, max(ranks), 0, 2, ranks)
        if max(ranks) > 6:
            layout = PoolLayout(3, 3, max(ranks), 0, 2, ranks)
        for seed in range(5):
            table = routing.draw_table(layout, "q_proj", "a", seed, balanced=True)
            routing.check_table(layout, table, "table")
            routing.check_balance(layout, table, "table")
            uses = routing.count_uses(layout, table)
            assert uses.sum() == 2 * sum(ranks)
            idle = routing.count_idle(layout, table) / layout.num_public
            assert idle == pytest.approx(routing.expected_idle_share(layout, balanced=True))

    def test_drawn_tables_leave_the_expected_share_idle(self):
        layout = PoolLayout(6, 2, 5, 1, 2, (2, 5, 3, 2, 2, 4))
        tables = [routing.draw_table(layout, "q", "a", seed) for seed in range(200)]
        idle = [routing.count_idle(layout, table) / layout.num_public for table in tables]
        share = np.prod([1 - drawn / 6 for drawn in (1, 4, 2, 1, 1, 3)])
        assert routing.expected_idle_share(layout) == pytest.approx(share)
        assert np.mean(idle) == pytest.approx(share, abs=0.02)

    def test_a_table_of_other_ranks_is_refused(self):
        adapter = built("mos")
        arrays = adapter_arrays(adapter)
        beyond = arrays["table_a/q_proj"].copy()
        beyond[0, 4, 1] = 1
        with pytest.raises(
            InputError, match="table_a/q_proj: block 0 has rank 2, so that the rows"
        ):
            with_arrays(adapter, {**arrays, "table_a/q_proj": beyond})
        shorter = arrays["table_a/q_proj"].copy()
        shorter[1, 3] = shorter[1, 4]
        shorter[1, 4] = [0, 1]
        with pytest.raises(InputError, match=r"block 1 uses a public shard outside 0\.\.11"):
            with_arrays(adapter, {**arrays, "table_a/q_proj": shorter})

    def test_use_is_counted_in_the_rows_that_are_there(self):
        counts = usage_counts(built("mos"))
        assert counts["pool_a/q_proj"].sum(axis=0).tolist() == [2 * 2, 5 * 2, 3 * 2]

    def test_figures_count_the_blocks_own_ranks(self):
        summary = built("mos-scaled").summary()
        assert summary["parameters_beyond_budget"] == 18
        assert summary["trained_parameters"] == 9 * 32 + 18
        # All blocks together draw 7 of 6 public vectors in q_proj, and 5 of 6 elsewhere.
        assert summary["expected_idle_share_of_public_pool"] == pytest.approx(1 / 6)

    @pytest.mark.parametrize(
        ("fields", "words"),
        [
            ({"private_rank": 2}, r"rank_pattern\['layers.0.\*'\]=2 must be above private_rank=2"),
            ({"rank": None, "subset_selection": False}, r"=2 contradicts subset_selection=False"),
            ({"private_rank": 3}, "nothing is public, so rank_pattern.* must be 3, got 2"),
            ({"private_rank": 3, "rank": None, "rank_pattern": {"q_proj": 3}}, "rank is open"),
            ({"rank_pattern": {"q_proj": 8}}, "rank=8 needs .* 7 public vectors .* 2 \\* 3 = 6"),
        ],
    )
    def test_a_pattern_that_does_not_fit_says_why(self, fields, words):
        with pytest.raises(InputError, match=f"mos: .*{words}"):
            built("mos", **fields)


class TestUniLoRA:
    @pytest.mark.parametrize("name", ["uni-lora", "uni-lora-drawn"])
    def test_the_factors_are_those_of_a_plain_loop_over_what_is_there(self, name):
        adapter = randomised(built(name))
        theta, tables = trained_arrays(adapter)["theta"], adapter.tables()
        places = [
            (path, k, j, i)
            for path, table in tables.items()
            for k, r in enumerate(ranks_of(path.partition("/")[2]))
            for j in range(r)
            for i in range(table.shape[2])
        ]
        # (10 + 8) of A in 8 entries, and B.
        assert len(places) == 18 * 8 + 10 * 12 + 8 * 4 == adapter.config.count_entries(SITES)
        used = np.zeros(31)
        for path, *place in places:
            used[tables[path][tuple(place)]] += 1
        assert used.max() - used.min() == 1
        for path, *place in places:
            entry = tables[path][tuple(place)]
            f = adapter.site_factors(path.partition("/")[2])
            have = getattr(f, path[len("index_")])[tuple(place)]
            assert have == pytest.approx(theta[entry] / np.sqrt(used[entry]), rel=1e-6)

    def test_an_index_beyond_a_rank_is_refused(self):
        adapter = built("uni-lora")
        index = adapter_arrays(adapter)["index_a/q_proj"].copy()
        index[0, 4, 0] = 3
        with pytest.raises(InputError, match="index_a/q_proj: an index beyond the rank of its bl"):
            with_arrays(adapter, {**adapter_arrays(adapter), "index_a/q_proj": index})

    def test_theta_may_not_be_longer_than_what_is_there(self):
        with pytest.raises(InputError, match="theta_length=297 must be at most the 296 entries"):
            built("uni-lora", theta_length=297)


class TestOthers:
    def test_the_diagonal_of_rasa_starts_by_a_blocks_own_rank_and_alpha(self):
        diagonal = trained_arrays(built("rasa"))["diagonal/q_proj"]
        want = [[8, 8 / 3, 8 / 3, 8 / 3], [2] * 4 + [8 / 3] * 3, [1.25] * 2 + [2.5 / 3] * 3]
        for row, values in zip(diagonal, want, strict=True):
            np.testing.assert_allclose(row[: len(values)], values, rtol=1e-6)

    @pytest.mark.parametrize("method", ["vera", "vb_lora", "uni_lora"])
    def test_methods_without_an_alpha_refuse_its_pattern_and_say_why(self, method):
        with pytest.raises(InputError, match=rf"{method}: no alpha_pattern here: .* has no alpha"):
            make_config(method, {"alpha_pattern": {"q_proj": 2.0}})
        assert make_config(method, {"alpha_pattern": {}}).alpha_pattern == {}

    def test_every_other_method_takes_both(self):
        for method in set(METHODS) - {"vera", "vb_lora", "uni_lora"}:
            fields = {"rank": 3} if method == "mos" else {}
            make_config(method, {**fields, "rank_pattern": {"x": 2}, "alpha_pattern": {"x": 2.0}})

    @pytest.mark.parametrize(
        ("config", "field"), [(PRoLoRAConfig(4, 2), "unshared"), (RaSAConfig(4, 2), "shared")]
    )
    def test_a_rank_below_what_every_site_has_is_refused(self, config, field):
        with pytest.raises(InputError, match=rf"{field}_rank=2 must be at most rank_pattern\['q_"):
            dataclasses.replace(config, rank_pattern={"q_proj": 1})

    def test_vera_of_one_pair_has_the_largest_rank_of_all_types(self):
        adapter = built("vera-shared")
        assert adapter.projection_a["shared"].shape == (5, 8)
        assert adapter.projection_b["shared"].shape == (5, 12)
        assert {n: p.shape for n, p in built("vera").projection_b.items()} == {
            "q_proj": (5, 12),
            "down_proj": (3, 4),
        }

    def test_types_may_have_different_blocks(self):
        sites = {"q_proj": SiteShape(2, 8, 12, (0, 1)), "down_proj": SiteShape(2, 8, 4, (1, 4))}
        adapter = create_adapter(ShareLoRAConfig(3, rank_pattern=PATTERN), sites, KEY)
        assert adapter.site_ranks == {"q_proj": (2, 5), "down_proj": (3, 3)}
        assert adapter.factors()["down_proj"].layers == (1, 4)
        assert adapter.factors(4)["q_proj"].scale == 0
