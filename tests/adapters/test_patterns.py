"""Ranks and alphas that differ by site: who gets what, and what no method may do with it."""

import functools
import json
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from mos_jax.adapters.budget import fit
from mos_jax.adapters.lora import LoRAConfig
from mos_jax.adapters.methods import METHODS, count_parameters, create_adapter, make_config
from mos_jax.adapters.patterns import Pattern, by_block
from mos_jax.adapters.sites import SITE_TYPES, SiteShape, select_sites
from mos_jax.adapters.storage import CARD_FILE, load_adapter, save_adapter
from mos_jax.errors import InputError
from tests.adapters.fixtures_adapters import (
    SITES,
    SOME_LAYERS,
    quick_jit,
    randomised,
    split_trained,
    trained_arrays,
)
from tests.models.fixtures_decoder import filled_adapter, tiny_decoder, tokens_of

KEY = jax.random.key(0)
ALL = {name: SiteShape(3, 8, 8) for name in SITE_TYPES}


class TestWhoGetsWhat:
    """The rule of PEFT: the end of the module's name from a dot on, the first key that fits."""

    @pytest.mark.parametrize(
        ("pattern", "wanted"),
        [
            ({}, {"q_proj": (2, 2, 2), "down_proj": (2, 2, 2)}),
            ({"q_proj": 5}, {"q_proj": (5, 5, 5), "down_proj": (2, 2, 2)}),
            ({"layers.1.self_attn.q_proj": 5}, {"q_proj": (2, 5, 2), "down_proj": (2, 2, 2)}),
            ({"model.layers.1.mlp.down_proj": 5}, {"q_proj": (2, 2, 2), "down_proj": (2, 5, 2)}),
            ({r"layers\.[02]\..*": 5}, {"q_proj": (5, 2, 5), "down_proj": (5, 2, 5)}),
            ({"mlp.*": 5}, {"q_proj": (2, 2, 2), "down_proj": (5, 5, 5)}),
            ({"q_proj|down_proj": 5}, {"q_proj": (5, 5, 5), "down_proj": (5, 5, 5)}),
            ({"1.self_attn.q_proj": 7, "q_proj": 5}, {"q_proj": (5, 7, 5), "down_proj": (2, 2, 2)}),
            ({"q_proj": 5, "1.self_attn.q_proj": 7}, {"q_proj": (5, 5, 5), "down_proj": (2, 2, 2)}),
        ],
    )
    def test_a_site_has_the_value_of_the_first_key_that_ends_its_name(self, pattern, wanted):
        assert by_block(pattern, 2, SITES, "test") == wanted

    def test_blocks_are_those_of_the_model_not_of_the_arrays(self):
        pattern = {"layers.3.self_attn.q_proj": 5}
        assert by_block(pattern, 2, SOME_LAYERS, "test")["q_proj"] == (2, 2, 5)

    def test_a_site_that_no_model_has_goes_by_its_own_name(self):
        sites = {"probe": SiteShape(2, 8, 8)}
        assert by_block({"1.probe": 5}, 2, sites, "test") == {"probe": (2, 5)}

    @pytest.mark.parametrize(
        ("pattern", "words"),
        [
            ({"proj": 5}, "'proj' matches none of the adapted sites.*Known: down_proj, q_proj"),
            ({"qproj": 5}, "did you mean 'q_proj'"),
            ({"q_proj": 3, "layers.3.self_attn.q_proj": 5}, r"'layers.3.self_attn.q_proj' matches"),
            ({"layers.7.self_attn.q_proj": 5}, r"did you mean 'model\.layers\.\d\.self_attn\.q_pr"),
        ],
    )
    def test_a_key_that_matches_nothing_raises_with_the_candidates(self, pattern, words):
        with pytest.raises(InputError, match=rf"lora: rank_pattern: .*{words}"):
            create_adapter(LoRAConfig(rank_pattern=pattern), SITES, KEY)
        with pytest.raises(InputError, match=r"lora: alpha_pattern: "):
            create_adapter(LoRAConfig(alpha_pattern=pattern), SITES, KEY)

    @pytest.mark.parametrize(
        ("fields", "words"),
        [
            ({"rank_pattern": {"[qv": 4}}, r"rank_pattern: '\[qv' is not a regular expression"),
            ({"rank_pattern": {"q_proj": 0}}, r"rank_pattern\['q_proj'\] must be an integer >= 1"),
            ({"rank_pattern": {"q_proj": True}}, r"rank_pattern\['q_proj'\] must be an integer"),
            ({"rank_pattern": {"q_proj": 2.0}}, r"rank_pattern\['q_proj'\] must be an integer"),
            (
                {"alpha_pattern": {"q_proj": 0}},
                r"alpha_pattern\['q_proj'\] must be a finite",
            ),
            (
                {"alpha_pattern": {"q_proj": math.nan}},
                r"alpha_pattern\['q_proj'\] must be a finite",
            ),
            ({"alpha_pattern": {"q_proj": "1"}}, r"alpha_pattern\['q_proj'\] must be a finite"),
            ({"rank_pattern": {3: 4}}, "rank_pattern: a key must be a string that is not empty"),
            ({"rank_pattern": {"": 4}}, "rank_pattern: a key must be a string that is not empty"),
            ({"rank_pattern": "q_proj"}, r"rank_pattern must map names .* got 'q_proj'"),
            ({"rank_pattern": [["q_proj", 4]]}, r"rank_pattern must map names"),
            ({"rank_patterns": {}}, "unknown field 'rank_patterns'; did you mean 'rank_pattern'"),
        ],
    )
    def test_a_pattern_that_cannot_be_used_says_why(self, fields, words):
        with pytest.raises(InputError, match=f"lora: .*{words}"):
            make_config("lora", fields)


class TestPattern:
    def test_it_is_a_mapping_that_hashes_by_its_items_in_order(self):
        one, same = Pattern({"a": 1, "b": 2}), Pattern({"a": 1, "b": 2})
        other = Pattern({"b": 2, "a": 1})
        assert one == same == {"a": 1, "b": 2}
        assert hash(one) == hash(same)
        assert one != other
        assert repr(one) == "{'a': 1, 'b': 2}"

    def test_a_configuration_does_not_follow_the_dict_that_it_was_made_from(self):
        given = {"q_proj": 4}
        config = LoRAConfig(rank_pattern=given)
        given["q_proj"] = 5
        assert config.rank_pattern == {"q_proj": 4}
        assert config == LoRAConfig(rank_pattern={"q_proj": 4})
        assert len({config, LoRAConfig(rank_pattern={"q_proj": 4}), LoRAConfig()}) == 2


# Ranks 1 to 4 by (site type, block), as keys by module.
RANKS = {"q_proj": (1, 4, 2), "down_proj": (3, 3, 1)}
LORA = LoRAConfig(
    rank=3,
    alpha=6.0,
    rank_pattern={
        "layers.0.self_attn.q_proj": 1,
        "layers.1.self_attn.q_proj": 4,
        "q_proj": 2,
        "2.mlp.down_proj": 1,
    },
    alpha_pattern={"layers.1.*": 2.0},
)


def loss_of(factors):
    """Depends on every entry of every change."""
    return sum(jnp.sum(jnp.sin(f.delta())) for f in factors.values())


class TestLoRA:
    def test_ranks_scales_and_counts(self):
        adapter = create_adapter(LORA, SITES, KEY)
        assert adapter.site_ranks == RANKS
        assert adapter.site_scales == {"q_proj": (6.0, 0.5, 3.0), "down_proj": (2.0, 2 / 3, 6.0)}
        counts = {"q_proj": 7 * (8 + 12), "down_proj": 7 * (8 + 4)}
        assert adapter.count_trained_by_site() == counts == count_parameters(LORA, SITES)
        assert adapter.count_trained() == adapter.count_served() == sum(counts.values())
        assert adapter.summary()["trained_parameters"] == sum(counts.values())
        factors = adapter.factors()
        assert {name: f.ranks for name, f in factors.items()} == RANKS
        for name, f in factors.items():
            np.testing.assert_array_equal(f.scale, np.float32(adapter.site_scales[name]))

    def test_rslora_takes_the_root_of_each_rank(self):
        config = LoRAConfig(rank=2, alpha=3.0, rslora=True, rank_pattern={"1.self_attn.q_proj": 9})
        scales = create_adapter(config, SITES, KEY).site_scales
        assert scales["q_proj"] == (3 / math.sqrt(2), 1.0, 3 / math.sqrt(2))

    def test_a_pattern_that_says_what_all_have_is_no_pattern(self):
        one = create_adapter(LoRAConfig(rank=2), SITES, KEY)
        same = create_adapter(LoRAConfig(rank=2, rank_pattern={".*": 2}), SITES, KEY)
        for name in SITES:
            f = same.site_factors(name)
            assert f.ranks is None
            np.testing.assert_array_equal(f.a, one.site_factors(name).a)

    def test_rows_beyond_a_rank_are_zero_and_never_move(self):
        """Under AdamW with weight decay, which moves everything that a gradient reaches."""
        adapter = create_adapter(LORA, SITES, KEY)
        graphdef, params, rest = split_trained(adapter)
        optimizer = optax.adamw(0.1, weight_decay=0.1)
        state = optimizer.init(params)

        @quick_jit
        def step(params, state):
            gradients = jax.grad(lambda p: loss_of(nnx.merge(graphdef, p, rest).factors()))(params)
            updates, state = optimizer.update(gradients, state, params)
            return optax.apply_updates(params, updates), state

        for _ in range(3):
            params, state = step(params, state)
        arrays = trained_arrays(nnx.merge(graphdef, params, rest))
        first = trained_arrays(adapter)
        for name, ranks in RANKS.items():
            for part in "ab":
                array = arrays[f"{part}/{name}"]
                for k, r in enumerate(ranks):
                    assert not np.any(array[k, r:])
                    assert np.all(array[k, :r] != first[f"{part}/{name}"][k, :r])

    def test_whatever_stands_in_rows_beyond_a_rank_is_no_part_of_the_adapter(self):
        adapter = randomised(create_adapter(LORA, SITES, KEY))
        for name, ranks in RANKS.items():
            f, arrays = adapter.site_factors(name), trained_arrays(adapter)
            one = quick_jit(functools.partial(adapter.site_factors, name))
            for k, r in enumerate(ranks):
                for part in "ab":
                    want = arrays[f"{part}/{name}"][k, :r]
                    assert np.all(arrays[f"{part}/{name}"][k] != 0)
                    for have in (getattr(f, part)[k], getattr(one(jnp.int32(k)), part)):
                        np.testing.assert_array_equal(have[:r], want)
                        assert not np.any(have[r:])

    def test_a_block_starts_as_in_a_lora_of_its_rank(self):
        """The same bound at every rank, uniform, B zero."""
        sites = {"q_proj": SiteShape(2, 256, 4)}
        config = LoRAConfig(rank=16, rank_pattern={"layers.1.self_attn.q_proj": 8})
        f = create_adapter(config, sites, KEY).site_factors("q_proj")
        bound = 256**-0.5
        for k, r in enumerate((16, 8)):
            deciles = np.quantile(f.a[k, :r], np.linspace(0, 1, 11))
            np.testing.assert_allclose(deciles, np.linspace(-bound, bound, 11), atol=0.1 * bound)
        assert not np.any(f.b)

    @settings(max_examples=15, deadline=None)
    @given(
        st.lists(st.integers(1, 3), min_size=3, max_size=3),
        st.lists(st.sampled_from([0.5, 1.0, 3.0]), min_size=3, max_size=3),
        st.booleans(),
    )
    def test_it_is_one_lora_for_each_rank(self, ranks, alphas, rslora):
        """Changes and gradients are those of separate adapters, one for each block."""
        site = SiteShape(3, 4, 6)
        rank_pattern = {f"layers.{k}.self_attn.q_proj": r for k, r in enumerate(ranks)}
        alpha_pattern = {re.escape(f"{k}.self_attn.q_proj"): a for k, a in enumerate(alphas)}
        config = LoRAConfig(2, 1.5, rslora, rank_pattern=rank_pattern, alpha_pattern=alpha_pattern)
        whole = randomised(create_adapter(config, {"q_proj": site}, KEY))
        graphdef, params, rest = split_trained(whole)

        def loss(params, graphdef=graphdef, rest=rest):
            return loss_of(nnx.merge(graphdef, params, rest).factors())

        gradients = nnx.to_pure_dict(jax.grad(loss)(params))
        assert whole.count_trained() == sum(ranks) * 10
        for k, (r, alpha) in enumerate(zip(ranks, alphas, strict=True)):
            own = create_adapter(LoRAConfig(r, alpha, rslora), {"q_proj": SiteShape(1, 4, 6)}, KEY)
            own_graphdef, own_params, own_rest = split_trained(own)
            nnx.replace_by_pure_dict(
                own_params,
                {p: {"q_proj": getattr(whole, p)["q_proj"][k : k + 1, :r]} for p in "ab"},
            )
            merged = nnx.merge(own_graphdef, own_params, own_rest)
            np.testing.assert_allclose(
                merged.site_factors("q_proj").delta()[0],
                whole.site_factors("q_proj").delta()[k],
                rtol=1e-6,
            )
            alone = nnx.to_pure_dict(jax.grad(loss)(own_params, own_graphdef, own_rest))
            for part in "ab":
                have = gradients[part]["q_proj"][k]
                np.testing.assert_allclose(have[:r], alone[part]["q_proj"][0], rtol=1e-5, atol=1e-6)
                assert not np.any(have[r:])


class TestFactors:
    def test_ranks_stay_with_factors_of_all_blocks_until_a_model_takes_them(self):
        some = LoRAConfig(rank=3, rank_pattern={"0.self_attn.q_proj": 1})
        f = create_adapter(some, SOME_LAYERS, KEY).factors()["q_proj"]
        assert f.ranks == (1, 3, 3)
        assert (-f).ranks == f.scaled(2.0).ranks == f.ranks
        assert f.for_all_layers(5).ranks is None
        whole = create_adapter(LORA, SITES, KEY).factors()["q_proj"]
        assert whole.for_all_layers(3).ranks is None
        assert create_adapter(LORA, SITES, KEY).factors(1)["q_proj"].ranks is None

    def test_a_base_takes_them_for_all_blocks_or_one_by_one(self):
        """With types in blocks of their own."""
        base = tiny_decoder()
        names = ["1.self_attn.q_proj", "down_proj", r"layers\.0\..*v_proj"]
        config = LoRAConfig(2, rank_pattern={"0.*": 3, "q_proj": 1}, alpha_pattern={"1.*": 3.0})
        adapter = filled_adapter(select_sites(base.sites, names), config)
        tokens = tokens_of(base, rows=1, length=5)
        logits = base(tokens, adapter.factors())
        assert np.abs(logits - base(tokens)).max() > 0.01
        np.testing.assert_allclose(base(tokens, adapter.factors), logits, rtol=1e-5, atol=1e-5)

    def test_a_card_from_before_there_were_patterns_is_read(self, tmp_path):
        adapter = randomised(create_adapter(LoRAConfig(rank=2), SITES, KEY))
        card = save_adapter(tmp_path / "old", adapter) / CARD_FILE
        raw = json.loads(card.read_text())
        assert raw["config"].pop("rank_pattern") == raw["config"].pop("alpha_pattern") == {}
        card.write_text(json.dumps(raw))
        assert load_adapter(tmp_path / "old").config == LoRAConfig(rank=2)


class TestBudget:
    def test_sites_of_a_fixed_rank_keep_it(self):
        found = fit("lora", SITES, 700, rank_pattern={"down_proj": 1})
        # 36 of down_proj, and 60 for each rank of q_proj.
        assert found.config.rank == 11
        assert found.trained == 36 + 11 * 60
        assert found.config.rank_pattern == {"down_proj": 1}

    def test_a_pattern_that_leaves_nothing_to_fit_is_refused(self):
        with pytest.raises(InputError, match=r"budget: rank decides nothing .*rank_pattern"):
            fit("lora", SITES, 700, rank_pattern={".*": 1})


class TestPage:
    """docs/patterns.md says what is so."""

    PAGE = (Path(__file__).parents[2] / "docs/patterns.md").read_text(encoding="utf-8")

    def test_its_code_runs(self):
        blocks = re.findall(r"^```python\n(.*?)^```", self.PAGE, re.MULTILINE | re.DOTALL)
        assert len(blocks) == 6
        exec("\n".join(blocks), {})

    def test_its_table_names_every_method_and_what_it_refuses(self):
        rows = re.findall(r"^\| `(\w+)` \| .* \| (\w+).* \| (\w+).* \|$", self.PAGE, re.MULTILINE)
        assert [name for name, *_ in rows] == [
            "lora",
            "mos",
            *sorted(set(METHODS) - {"lora", "mos"}),
        ]
        for name, *takes in rows:
            refused = METHODS[name].no_pattern
            fields = ("rank_pattern", "alpha_pattern")
            assert takes == ["no" if field in refused else "yes" for field in fields]
