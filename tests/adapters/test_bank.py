import contextlib
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mos_jax.adapters.bank import BASE_NAME, AdapterBank
from mos_jax.adapters.factor_slots import write_slot
from mos_jax.adapters.lora import LoRAConfig
from mos_jax.adapters.low_rank import LowRank
from mos_jax.adapters.methods import create_adapter
from mos_jax.adapters.mos import MoSConfig
from mos_jax.adapters.sites import SiteShape, select_sites
from mos_jax.errors import InputError
from mos_jax.models.generation import Sampling, _decode, _prefill, generate
from tests.adapters.fixtures_adapters import MODEL_LAYERS, SITES, SOME_LAYERS, quick_jit, randomised
from tests.adapters.test_contract import CONFIGS, assert_same, random_one, sites_of
from tests.models.fixtures_decoder import filled_adapter, plain_logits, tiny_decoder, tokens_of

WHOLE = {name: SiteShape(MODEL_LAYERS, s.d_in, s.d_out) for name, s in SITES.items()}


def lora(rank, seed=0, sites=SITES):
    config = LoRAConfig(rank=rank)
    return randomised(create_adapter(config, sites, jax.random.key(seed)), seed)


@contextlib.contextmanager
def compilations(caplog):
    """Fills a list with what JAX compiles in the block, from its persistent cache or not."""
    found = []
    caplog.clear()
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        yield found
    found += [m for m in caplog.messages if m.startswith("Finished XLA compilation")]


class TestLifeCycle:
    def test_adapters_come_and_go(self):
        bank = AdapterBank(SITES, slots=2, rank=4)
        assert (bank.names, bank.active) == ((), None)
        one, two, three = lora(2), lora(4, 1), lora(3, 2)
        bank.add("one", one)
        bank.add("two", two.factors())
        assert bank.names == ("one", "two")
        with pytest.raises(InputError, match=r"2 slots, all in use \(one, two\).*slots=3"):
            bank.add("three", three)
        bank.delete("one")
        bank.add("three", three)
        assert bank.names == ("two", "three")
        bank.replace("two", one)
        assert_same(bank.get("two"), one.factors())
        assert_same(bank.get("three"), three.factors())

    def test_one_is_active_or_none(self):
        bank = AdapterBank.holding(SITES, {"one": lora(2), "two": lora(3, 1)})
        for site, f in bank.active_factors(0).items():
            assert f.a.shape == (3, SITES[site].d_in)
            assert not np.any(f.delta())
        bank.activate("two")
        assert bank.active == bank.summary()["active"] == "two"
        want = lora(3, 1).factors()["q_proj"].delta()[1]
        np.testing.assert_allclose(bank.active_factors(1)["q_proj"].delta(), want, rtol=1e-5)
        with pytest.raises(InputError, match="'two' is active; disable"):
            bank.delete("two")
        bank.replace("two", lora(1, 5))
        want = lora(1, 5).factors()["q_proj"].delta()[1]
        np.testing.assert_allclose(bank.active_factors(1)["q_proj"].delta(), want, rtol=1e-5)
        bank.disable()
        assert bank.active is None
        assert not np.any(bank.active_factors(1)["q_proj"].delta())
        bank.delete("two")
        assert bank.names == ("one",)

    def test_a_deleted_adapter_leaves_zeros(self):
        bank = AdapterBank.holding(SITES, {"one": lora(2)})
        assert any(map(np.any, jax.tree.leaves(bank.for_rows(["one"]).bank)))
        bank.delete("one")
        assert not any(map(np.any, jax.tree.leaves(bank.for_rows([BASE_NAME]).bank)))

    def test_a_lower_rank_leaves_nothing_of_the_one_before(self):
        bank = AdapterBank.holding(SITES, {"one": lora(4)})
        small = {"q_proj": lora(1, 3).factors()["q_proj"]}
        bank.replace("one", small)
        assert_same(bank.get("one"), small)
        block = bank.for_rows(["one"])(2)
        np.testing.assert_allclose(
            block["q_proj"].delta()[0], small["q_proj"].delta()[2], rtol=1e-5, atol=1e-6
        )
        assert not np.any(block["down_proj"].delta())

    def test_a_bank_can_be_resized(self):
        bank = AdapterBank.holding(SITES, {"one": lora(2), "two": lora(3, 1)})
        bank.activate("two")
        larger = bank.resized(slots=5, rank=6)
        assert (larger.slots, larger.rank) == (5, {"q_proj": 6, "down_proj": 6})
        assert (larger.names, larger.active) == (("one", "two"), "two")
        for name in bank.names:
            assert_same(larger.get(name), bank.get(name))
        with pytest.raises(InputError, match="1 slots, all in use"):
            bank.resized(slots=1)
        with pytest.raises(InputError, match=r"'two' at 'q_proj' has rank 3, the bank 2"):
            bank.resized(rank=2)

    def test_memory_is_fixed_and_reported(self):
        rank = {"q_proj": 3, "down_proj": 2}
        bank = AdapterBank(SITES, slots=4, rank=rank)
        numbers = 3 * (3 * (8 + 12) + 2 * (8 + 4) + 2)  # entries and scales of one adapter
        assert bank.nbytes == 5 * 4 * numbers
        assert bank.summary()["slot_bytes"] == 4 * numbers
        for name in ("one", "two"):
            bank.add(name, lora(2))
        assert bank.nbytes == 5 * 4 * numbers
        half = AdapterBank(SITES, slots=4, rank=rank, dtype="bfloat16")
        assert half.nbytes == 5 * (2 * numbers + 2 * 3 * 2)  # the scales stay fp32

    def test_a_change_is_made_in_the_banks_own_memory(self):
        bank = AdapterBank.holding(SITES, {"one": lora(2)})
        before = bank.for_rows(["one"])
        bank.replace("one", lora(2, 1))
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before.bank))
        # Nothing of a bank is left to be used by mistake.
        with pytest.raises((RuntimeError, ValueError), match="deleted"):
            jax.jit(lambda f: f(0))(before)


class TestRefusals:
    @pytest.mark.parametrize("name", ["", "  ", "a/b", BASE_NAME, 3, None])
    def test_names(self, name):
        bank = AdapterBank(SITES, slots=1, rank=2)
        with pytest.raises(InputError, match="name of an adapter must be"):
            bank.add(name, lora(2))

    def test_unknown_and_taken_names(self):
        bank = AdapterBank.holding(SITES, {"french": lora(2)})
        with pytest.raises(InputError, match=r"'french' is in the bank already; replace\(\)"):
            bank.add("french", lora(2))
        for call in (
            bank.get,
            bank.delete,
            bank.activate,
            lambda name: bank.replace(name, lora(2)),
            lambda name: bank.for_rows(["french", name]),
        ):
            with pytest.raises(InputError, match="'frensh' in the bank; did you mean 'french'"):
                call("frensh")
        with pytest.raises(InputError, match="no adapter '__base__'"):
            bank.delete(BASE_NAME)
        for rows in ([], "french"):
            with pytest.raises(InputError, match="a list of names"):
                bank.for_rows(rows)

    def test_what_does_not_fit_changes_nothing(self):
        bank = AdapterBank(SITES, slots=2, rank=2)
        bank.add("one", lora(2))
        before = bank.get("one")
        good = before["q_proj"]
        infinite = LowRank(good.a * jnp.inf, good.b, good.scale)
        for factors, words in (
            (lora(3), "has rank 3, the bank 2; take resized"),
            ({"qproj": good}, "adapts 'qproj', which the bank has not; did you mean 'q_proj'"),
            ({"down_proj": good}, r"'x' at 'down_proj' must have a \[3, 2, 8\], b \[3, 2, 4\]"),
            (lora(2, sites=WHOLE), r"must have a \[3, 2, 8\]"),
            (lora(2, sites=SOME_LAYERS), r"adapts the blocks \[3\], the bank has \[0, 1, 2\]"),
            ({"q_proj": infinite}, "not finite in float32"),
            ({}, "must be an adapter or factors"),
            ({"q_proj": 3}, "must be an adapter or factors"),
            (None, "must be an adapter or factors"),
        ):
            for call in (bank.add, bank.replace):
                name = "x" if call == bank.add else "one"
                with pytest.raises(InputError, match=words.replace("'x'", f"'{name}'")):
                    call(name, factors)
        assert bank.names == ("one",)
        assert_same(bank.get("one"), before)

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ({"slots": 0, "rank": 2}, "slots must be an integer >= 1, got 0"),
            ({"slots": 2, "rank": 0}, "rank of 'q_proj' must be an integer >= 1, got 0"),
            ({"slots": 2, "rank": {"q_proj": 2}}, "rank names q_proj, the sites are down_proj, q"),
            ({"slots": 2, "rank": 2, "dtype": "bf16"}, "did you mean 'bfloat16'"),
        ],
    )
    def test_sizes(self, arguments, words):
        with pytest.raises(InputError, match=words):
            AdapterBank(SITES, **arguments)

    def test_nothing_to_hold(self):
        with pytest.raises(InputError, match="give at least one"):
            AdapterBank.holding(SITES, {})
        with pytest.raises(InputError, match="unknown site 'q_proj'; did you mean 'down_proj'"):
            AdapterBank.holding({"down_proj": SITES["down_proj"]}, {"one": lora(2)})


@pytest.mark.parametrize("layers", [False, True], ids=["all-layers", "some-layers"])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_method_comes_out_as_it_went_in(name, layers):
    sites = sites_of(name)
    whole = {n: SiteShape(MODEL_LAYERS, s.d_in, s.d_out) for n, s in sites.items()}
    factors = random_one(name, layers).factors()
    bank = AdapterBank.holding(whole if layers else sites, {name: factors})
    assert_same(bank.get(name), factors)


def test_a_bank_of_some_blocks_gives_zeros_in_the_others():
    bank = AdapterBank.holding(SOME_LAYERS, {"one": lora(2, sites=SOME_LAYERS)})
    rows = bank.for_rows(["one", BASE_NAME])
    want = lora(2, sites=SOME_LAYERS).factors()["q_proj"].delta()
    for k in range(MODEL_LAYERS):
        delta = rows(k)["q_proj"].delta()
        assert np.any(delta[0]) == (k in (0, 2, 3))
        assert not np.any(delta[1])
        if k in (0, 2, 3):
            np.testing.assert_allclose(delta[0], want[(0, 2, 3).index(k)], rtol=1e-5)
    with pytest.raises(InputError, match=r"adapts all blocks, the bank has \[0, 2, 3\] only"):
        bank.replace("one", lora(2, sites=WHOLE))


def test_a_bf16_bank_rounds_what_it_holds():
    bank = AdapterBank.holding(SITES, {"one": lora(2)}, dtype="bfloat16")
    for name, f in bank.get("one").items():
        want = lora(2).factors()[name]
        np.testing.assert_array_equal(f.a, want.a.astype(jnp.bfloat16).astype(jnp.float32))
        np.testing.assert_array_equal(f.scale, want.scale)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 8)), jnp.float32)
    got = bank.for_rows(["one", BASE_NAME])(0)["q_proj"].apply(x)
    want = lora(2).factors(0)["q_proj"].apply(x[:2])
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got[:2], want, atol=0.03 * np.abs(want).max())
    assert not np.any(got[2:])


@pytest.fixture(scope="module")
def decoder():
    return tiny_decoder()


@pytest.fixture(scope="module")
def adapters(decoder):
    """An adapter of every entry of the battery, under its name."""
    return {
        name: filled_adapter(select_sites(decoder.sites, list(sites_of(name))), config, seed)
        for seed, (name, config) in enumerate(CONFIGS.items())
    }


@pytest.fixture(scope="module")
def bank(decoder, adapters):
    return AdapterBank.holding(decoder.sites, adapters)


@quick_jit
def logits_of(decoder, tokens, factors=None):
    return decoder(tokens, factors)


class TestOnABase:
    def test_each_row_of_a_batch_of_all_methods_is_its_adapter_alone(self, decoder, adapters, bank):
        names = [BASE_NAME, *adapters]
        tokens = tokens_of(decoder, rows=len(names), length=5)
        got = logits_of(decoder, tokens, bank.for_rows(names))
        for row, name in enumerate(names):
            factors = None if name == BASE_NAME else _spread(adapters[name].factors())
            want = plain_logits(decoder, tokens[row], factors)
            size = np.abs(want).max()
            np.testing.assert_allclose(got[row], want, atol=2e-5 * size)
            plain = plain_logits(decoder, tokens[row])
            assert (np.abs(want - plain).max() > 1e-3 * size) == (name != BASE_NAME)

    def test_the_cache_gives_what_the_full_forward_gives(self, decoder, adapters, bank):
        names = [*adapters, BASE_NAME]
        rows = bank.for_rows(names)
        tokens = tokens_of(decoder, rows=len(names), length=5)
        full = np.asarray(logits_of(decoder, tokens, rows))
        extend = quick_jit(lambda t, p, c, f: decoder.extend(t, p, c, f))
        start = jnp.zeros(len(names), jnp.int32)
        empty = decoder.empty_cache(len(names), 8)
        hidden, cache = extend(tokens[:, :4], start, empty, rows)
        atol = 2e-5 * np.abs(full).max()
        np.testing.assert_allclose(decoder.logits(hidden), full[:, :4], atol=atol)
        hidden, _ = extend(tokens[:, 4:], jnp.full(len(names), 4, jnp.int32), cache, rows)
        np.testing.assert_allclose(decoder.logits(hidden)[:, 0], full[:, 4], atol=atol)

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_rows_of_the_base_are_the_base_bitwise(self, adapters, dtype):
        decoder = tiny_decoder(dtype=dtype)
        bank = AdapterBank.holding(decoder.sites, {"mos": adapters["mos"]}, dtype=dtype)
        tokens = tokens_of(decoder, rows=3)
        run = jax.jit(lambda d, t, f: d(t, f))
        got = run(decoder, tokens, bank.for_rows([BASE_NAME, "mos", BASE_NAME]))
        plain = run(decoder, tokens, None)
        np.testing.assert_array_equal(got[0], plain[0])
        np.testing.assert_array_equal(got[2], plain[2])
        assert np.any(got[1] != plain[1])
        np.testing.assert_array_equal(run(decoder, tokens, bank.active_factors), plain)

    def test_rows_of_a_mixed_generation_give_the_tokens_of_each_adapter_alone(
        self, decoder, adapters, bank
    ):
        names = ["mos", BASE_NAME, "lora", "mos", "tied-qkv", "uni-lora", "vb-lora"]
        prompts = [[5 + row, 6, 7][: 1 + row % 3] for row in range(len(names))]
        mixed = generate(decoder, prompts, [-1], Sampling.create(6), bank.for_rows(names))
        alone = [
            generate(
                decoder,
                [prompt],
                [-1],
                Sampling.create(6),
                None if name == BASE_NAME else adapters[name].factors(),
            )[0]
            for name, prompt in zip(names, prompts, strict=True)
        ]
        assert mixed == alone
        assert mixed != generate(decoder, prompts, [-1], Sampling.create(6))

    def test_the_number_of_names_must_be_that_of_the_rows(self, decoder, bank):
        with pytest.raises(InputError, match="the batch's 3 rows"):
            decoder(tokens_of(decoder, rows=3), bank.for_rows(["mos", "lora"]))


def _spread(factors):
    return {name: f.for_all_layers(2) for name, f in factors.items()}


class TestCompilations:
    def test_no_change_of_adapters_compiles_anything_again(self, decoder, caplog):
        """Adds, swaps, deletes, activations and other rows, of ranks, sites and blocks that vary.

        The factors are made beforehand: a method's own assembly is compiled once for it.
        """
        some = [
            filled_adapter(select_sites(decoder.sites, include, layers=layers), config, seed)
            for seed, (config, include, layers) in enumerate(
                [
                    (LoRAConfig(3), "all-linear", None),
                    (MoSConfig(2, 3, 2, 1), "all-linear", None),
                    (LoRAConfig(1), ["v_proj"], None),
                    (LoRAConfig(2), ["q_proj", "down_proj"], [1]),
                ]
            )
        ]
        factors = jax.tree.map(np.asarray, [adapter.factors() for adapter in some])
        jax.clear_caches()
        bank = AdapterBank(decoder.sites, slots=3, rank=4)
        tokens = tokens_of(decoder, rows=2, length=4)
        forward = quick_jit(lambda d, t, f: d(t, f))

        def use(names):
            np.asarray(forward(decoder, tokens, bank.for_rows(names)))
            generate(decoder, [[5], [6, 7]], [-1], Sampling.create(2), bank.for_rows(names))
            np.asarray(forward(decoder, tokens, bank.active_factors))

        bank.add("a", factors[0])
        use(["a", BASE_NAME])
        with compilations(caplog) as found:
            bank.add("b", factors[1])
            use(["b", "a"])
            bank.add("c", factors[2])
            bank.activate("c")
            use(["c", "c"])
            bank.replace("a", factors[3])
            use([BASE_NAME, "a"])
            bank.delete("a")
            bank.add("d", factors[0])
            bank.disable()
            use(["d", "b"])
        assert found == []
        assert (forward._cache_size(), _prefill._cache_size(), _decode._cache_size()) == (2, 1, 1)
        assert write_slot._cache_size() == 1

    def test_the_counter_counts(self, caplog):
        with compilations(caplog) as found:
            jax.jit(lambda x: 3 * x)(1.0)
        assert len(found) == 1
        with compilations(caplog) as found:
            AdapterBank(SITES, slots=7, rank=5).add("one", lora(2))
        assert found
