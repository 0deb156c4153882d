import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mos_jax.adapters.bank import AdapterBank
from mos_jax.adapters.combine import HOW, combine, keep_mask, scaled
from mos_jax.adapters.low_rank import LowRank
from mos_jax.errors import InputError
from mos_jax.interop.peft import export_peft, read_peft_factors
from tests.adapters.fixtures_adapters import MODEL_LAYERS, SITES, SOME_LAYERS
from tests.adapters.test_contract import CONFIGS, assert_same, random_one, sites_of

SETTINGS = {how: {} if how in ("exact", "linear") else {"density": 0.6} for how in HOW}


def draw(rank, seed=0, sites=SITES, scale=None):
    """Random factors of one rank, whose scale differs by block."""
    random = np.random.default_rng(seed)

    def one(site):
        a, b = (random.normal(size=(site.num_layers, rank, w)) for w in (site.d_in, site.d_out))
        own = random.uniform(0.5, 2, site.num_layers) if scale is None else [scale] * len(a)
        return LowRank(*(jnp.asarray(x, jnp.float32) for x in (a, b, own)), site.layers)

    return {name: one(site) for name, site in sites.items()}


def dense(factors, depth=3):
    """By site type, the dense change of all blocks, fp64 [depth, h, o]."""
    changes = {}
    for name, f in factors.items():
        a, b, scale = (np.asarray(x, np.float64) for x in (f.a, f.b, f.scale))
        changes[name] = np.zeros((depth, a.shape[2], b.shape[2]))
        for position, layer in enumerate(f.layers or range(depth)):
            changes[name][layer] = scale[position] * a[position].T @ b[position]
    return changes


def weighted_sum(several, weights, depth=3):
    total: dict = {}
    for factors, weight in zip(several, weights, strict=True):
        for name, change in dense(factors, depth).items():
            total[name] = total.get(name, 0) + weight * change
    return total


def assert_close(factors, want, depth=3, rtol=1e-6):
    have = dense(factors, depth)
    assert set(have) == set(want)
    for name, change in want.items():
        np.testing.assert_allclose(have[name], change, rtol=0, atol=rtol * np.abs(change).max())


class TestExact:
    def test_it_is_the_weighted_sum_whatever_the_methods(self):
        names = list({config.method: name for name, config in reversed(CONFIGS.items())}.values())
        several = [random_one(name, i % 2 == 1).factors() for i, name in enumerate(names)]
        # Those of all layers are for a model of three blocks here, the others for one of five.
        for part in (several[::2], several[1::2]):
            depth = 3 if part[0]["q_proj"].layers is None else MODEL_LAYERS
            weights = np.linspace(-1, 2, len(part)).tolist()
            found = combine(part, weights)
            assert_close(found.factors, weighted_sum(part, weights, depth), depth)
            for name, f in found.factors.items():
                assert f.rank == sum(factors[name].rank for factors in part)
                assert f.layers == part[0][name].layers
                assert {x.dtype for x in (f.a, f.b, f.scale)} == {jnp.dtype("float32")}
            assert found.error < 1e-6
            assert set(found.errors) == set(found.factors)

    def test_adapters_of_other_sites_and_blocks(self):
        several = [
            {"q_proj": draw(2)["q_proj"]},
            {
                name: dataclasses.replace(f, layers=(0, 2))
                for name, f in _blocks(draw(3, 1)).items()
            },
        ]
        found = combine(several, [0.5, -2])
        assert_close(found.factors, weighted_sum(several, [0.5, -2]))
        assert {name: (f.rank, f.layers) for name, f in found.factors.items()} == {
            "q_proj": (5, None),
            "down_proj": (3, (0, 2)),
        }
        assert found.factors["q_proj"].ranks == (5, 2, 5)
        assert not np.any(found.factors["q_proj"].a[1, 2:])
        few = [{"q_proj": dataclasses.replace(_blocks(draw(1, i))["q_proj"], layers=k)}
               for i, k in enumerate([(0, 2), (2, 4)])]  # fmt: skip
        assert combine(few, [1, 1]).factors["q_proj"].layers == (0, 2, 4)
        assert combine(few, [1, 1]).factors["q_proj"].ranks == (1, 2, 1)
        assert_close(combine(few, [1, 1]).factors, weighted_sum(few, [1, 1], 5), 5)

    def test_ranks_that_differ_by_block_are_kept(self):
        several = [random_one("lora-patterns").factors(), random_one("lora").factors()]
        found = combine(several, [0.5, -2])
        assert_close(found.factors, weighted_sum(several, [0.5, -2]))
        alone = combine(several[:1], [2.0], "ties", density=1.0).factors
        for name, f in found.factors.items():
            own = several[0][name].ranks
            assert len(set(own)) > 1
            assert alone[name].ranks == own
            assert f.ranks == tuple(rank + several[1][name].rank for rank in own)
            assert not np.any(f.b[0, f.ranks[0] :])

    @pytest.mark.parametrize("rank", [1, 3, 9])
    def test_with_a_rank_it_is_the_best_approximation_of_that_rank(self, rank):
        several, weights = [draw(2), draw(3, 1)], [0.7, -0.3]
        found = combine(several, weights, rank=rank)
        distance = norm = 0.0
        for name, change in weighted_sum(several, weights).items():
            assert found.factors[name].rank == min(rank, 5, 8, change.shape[-1])
            u, sizes, v = np.linalg.svd(change, full_matrices=False)
            best = (u[..., :rank] * sizes[:, None, :rank]) @ v[:, :rank]
            np.testing.assert_allclose(dense(found.factors)[name], best, atol=1e-5)
            left = np.sum(sizes[:, rank:] ** 2)
            assert found.errors[name] == pytest.approx(np.sqrt(left / np.sum(sizes**2)), abs=1e-6)
            distance, norm = distance + left, norm + np.sum(sizes**2)
        assert found.error == pytest.approx(np.sqrt(distance / norm), abs=1e-6)
        if rank == 9:
            assert found.error < 1e-6


def _blocks(factors):
    """The first two blocks of some factors."""
    return jax.tree.map(lambda leaf: leaf[:2], factors)


class TestLinear:
    def test_a_and_b_are_weighted_by_the_roots(self):
        several, weights = [draw(2), draw(2, 1)], [0.7, -0.3]
        found = combine(several, weights, "linear")
        for name, f in found.factors.items():
            a = b = 0.0
            for factors, weight in zip(several, weights, strict=True):
                c = weight * np.asarray(factors[name].scale, np.float64)[:, None, None]
                a = a + np.sign(c) * np.sqrt(abs(c)) * np.asarray(factors[name].a)
                b = b + np.sqrt(abs(c)) * np.asarray(factors[name].b)
            np.testing.assert_allclose(f.a, a, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(f.b, b, rtol=1e-5, atol=1e-6)
        assert 0.1 < found.error < 10

    @pytest.mark.parametrize("how", HOW)
    def test_one_adapter_alone_is_itself(self, how):
        settings = {} if how in ("exact", "linear") else {"density": 1.0}
        for weight in (1.0, -1.5):
            found = combine([draw(3)], [weight], how, **settings)
            assert_close(found.factors, weighted_sum([draw(3)], [weight]))
            assert found.error < 1e-6

    def test_equal_adapters_whose_weights_sum_to_1_are_not_one_of_them(self):
        """The cross terms count: (2 sqrt(1/2))^2 = 2."""
        found = combine([draw(2)] * 2, [0.5, 0.5], "linear")
        assert_close(found.factors, weighted_sum([draw(2)], [2.0]))
        assert found.error == pytest.approx(1.0)


def ties_by_hand(arrays, weights, density):
    """One place after the other."""
    kept = []
    for array in arrays:
        flat = np.asarray(array, np.float64).ravel()
        order = sorted(range(flat.size), key=lambda i: -abs(flat[i]))
        chosen = set(order[: int(density * flat.size)])
        kept.append([x if i in chosen else 0.0 for i, x in enumerate(flat)])
    merged = []
    for entries in zip(*kept, strict=True):
        positive = sum(entries) >= 0
        own = [w * x for w, x in zip(weights, entries, strict=True) if (x > 0) == positive and x]
        merged.append(sum(own) / len(own) if own else 0.0)
    return np.reshape(merged, np.shape(arrays[0]))


class TestTies:
    @pytest.mark.parametrize("density", [0.3, 1.0])
    def test_a_and_b_equal_a_plain_loop(self, density):
        several, weights = [draw(2, seed) for seed in range(3)], [1.0, 0.5, -2.0]
        found = combine(several, weights, "ties", density=density)
        for name, f in found.factors.items():
            for k in range(3):
                c = [w * float(g[name].scale[k]) for w, g in zip(weights, several, strict=True)]
                for part, signs in (("a", np.sign(c)), ("b", [1, 1, 1])):
                    arrays = [getattr(g[name], part)[k] for g in several]
                    want = ties_by_hand(arrays, signs * np.sqrt(np.abs(c)), density)
                    np.testing.assert_allclose(getattr(f, part)[k], want, rtol=1e-5, atol=1e-7)

    def test_the_share_is_of_the_rank_of_a_block(self):
        """A block of a lower rank comes out as if its type had that rank."""
        ranks, density = (2, 4, 3), 0.5

        def cut(factors):
            own = (np.arange(4) < np.array(ranks)[:, None])[..., None]
            return {
                name: dataclasses.replace(f, a=f.a * own, b=f.b * own, ranks=ranks)
                for name, f in factors.items()
            }

        several = [cut(draw(4, seed)) for seed in range(2)]
        found = combine(several, [1.0, 0.5], "ties", density=density).factors
        for k, r in enumerate(ranks):
            part = slice(k, k + 1)
            alone = [
                {
                    name: LowRank(f.a[part, :r], f.b[part, :r], f.scale[part])
                    for name, f in g.items()
                }
                for g in several
            ]
            for name, want in combine(alone, [1.0, 0.5], "ties", density=density).factors.items():
                np.testing.assert_array_equal(found[name].a[k, :r], want.a[0])
                np.testing.assert_array_equal(found[name].b[k, :r], want.b[0])
                assert not np.any(found[name].a[k, r:])

    def test_dense_changes_equal_a_plain_loop(self):
        several, weights = [draw(2), draw(3, 1)], [1.0, 0.5]
        found = combine(several, weights, "ties", density=0.4, rank=4)
        changes = [dense(factors)["down_proj"] for factors in several]
        for k in range(3):
            want = ties_by_hand([change[k] for change in changes], weights, 0.4)
            # Rank 4 is all of 8 x 4.
            np.testing.assert_allclose(dense(found.factors)["down_proj"][k], want, atol=1e-5)

    def test_signs_that_disagree(self):
        """Elected is the sign with more mass, and only its adapters are averaged."""
        a = (
            np.array([[3.0, -1.0, 2.0]]),
            np.array([[-1.0, -1.0, -2.5]]),
            np.array([[1.0, 3.0, 0.0]]),
        )
        several = [
            {"q_proj": LowRank(jnp.asarray(x[None], jnp.float32), jnp.ones((1, 1, 1)), jnp.ones(1))}
            for x in a
        ]
        found = combine(several, [1.0, 1.0, 1.0], "ties", density=1.0)
        np.testing.assert_allclose(found.factors["q_proj"].a[0], [[2.0, 3.0, -2.5]], rtol=1e-6)


class TestDare:
    @pytest.mark.parametrize("how", ["dare_linear", "dare_ties"])
    def test_the_seed_decides(self, how):
        several = [draw(2), draw(2, 1)]
        run = lambda seed: combine(several, [1, 1], how, density=0.5, seed=seed)  # noqa: E731
        assert_same(run(0).factors, run(0).factors)
        assert run(0).error != run(1).error

    def test_no_entry_is_dropped_at_density_1(self):
        several, weights = [draw(2), draw(2, 1)], [0.7, 0.3]
        for dare, plain in (("dare_linear", "linear"), ("dare_ties", "ties")):
            density = {} if plain == "linear" else {"density": 1.0}
            want = combine(several, weights, plain, **density)
            assert_same(combine(several, weights, dare, density=1.0).factors, want.factors)

    def test_kept_entries_are_rescaled_and_the_others_zero(self):
        found = combine([draw(2)], [1.0], "dare_linear", density=0.25)
        f, own = found.factors["q_proj"], draw(2)["q_proj"]
        root = np.sqrt(np.asarray(own.scale))[:, None, None]
        for part in ("a", "b"):
            have, want = np.asarray(getattr(f, part)), root * np.asarray(getattr(own, part)) / 0.25
            kept = have != 0
            assert 0.1 < kept.mean() < 0.4
            np.testing.assert_allclose(have[kept], want[kept], rtol=1e-5)

    def test_the_dense_change_is_kept_in_the_mean(self):
        """Over seeds, the mean change nears the exact sum as noise of that many draws does."""
        several, weights = [draw(2), draw(3, 1)], [0.7, 0.3]
        want, runs = weighted_sum(several, weights)["down_proj"], 200
        total = 0.0
        for seed in range(runs):
            found = combine(several, weights, "dare_linear", density=0.5, rank=4, seed=seed)
            total = total + dense(found.factors)["down_proj"]
            one = found.errors["down_proj"]
        error = np.linalg.norm(total / runs - want) / np.linalg.norm(want)
        assert 0.3 < one < 2
        assert error < 1.5 / np.sqrt(runs)

    def test_masks_differ_by_adapter_site_part_and_block_and_keep_their_share(self):
        where = [(0, 0, "q", "a", 0), (1, 0, "q", "a", 0), (0, 1, "q", "a", 0), (0, 0, "v", "a", 0)]
        where += [(0, 0, "q", "b", 0), (0, 0, "q", "a", 1)]
        masks = [keep_mask((40, 50), 0.3, *place) for place in where]
        assert len({mask.tobytes() for mask in masks}) == len(masks)
        assert all(abs(mask.mean() - 0.3) < 0.05 for mask in masks)
        # Fixed for good: a combination is repeated years later from its seed.
        assert keep_mask((2, 4), 0.5, *where[0]).tolist() == FIRST_MASK


FIRST_MASK = [[1.0, 0.0, 1.0, 1.0], [1.0, 1.0, 0.0, 0.0]]


@pytest.mark.parametrize(
    ("how", "rank"), [(h, r) for h in HOW for r in (None, 2) if (h, r) != ("linear", 2)]
)
def test_the_error_is_that_of_the_dense_changes(how, rank):
    several, weights = [draw(2), draw(2, 1)], [0.7, -0.4]
    found = combine(several, weights, how, rank=rank, **SETTINGS[how])
    want, have = weighted_sum(several, weights), dense(found.factors)
    distance = norm = 0.0
    for name, change in want.items():
        distances = np.sum((have[name] - change) ** 2), np.sum(change**2)
        assert found.errors[name] == pytest.approx(np.sqrt(distances[0] / distances[1]), abs=1e-7)
        distance, norm = distance + distances[0], norm + distances[1]
    assert found.error == pytest.approx(np.sqrt(distance / norm), abs=1e-7)
    assert (found.error < 1e-6) == (how == "exact" and rank is None)


def test_what_cancels_out_has_an_error_of_0_or_inf():
    assert combine([draw(2)] * 2, [1, -1]).error == 0
    assert combine([draw(2)] * 2, [1, -1], "dare_linear", density=0.5).error == float("inf")


def test_a_scaled_set_is_that_times_the_change():
    assert_close(scaled(draw(2), -0.3), weighted_sum([draw(2)], [-0.3]))
    undone = combine([draw(2), scaled(draw(2), -1)], [1, 1])
    assert all(np.abs(change).max() < 1e-12 for change in dense(undone.factors).values())
    with pytest.raises(InputError, match="by must be a finite number"):
        scaled(draw(2), float("nan"))


def test_a_combination_is_used_like_any_adapter(tmp_path):
    several = [random_one("mos", True).factors(), random_one("vera", True).factors()]
    found = combine(several, [0.5, 1.0])
    bank = AdapterBank.holding(SOME_LAYERS, {"both": found.factors, "mos": several[0]})
    assert_same(bank.get("both"), found.factors)
    export_peft(tmp_path / "x", found.factors, base_name="tiny", num_layers=MODEL_LAYERS)
    whole = {n: dataclasses.replace(s, num_layers=MODEL_LAYERS, layers=None) for n, s in
             sites_of("mos", True).items()}  # fmt: skip
    assert_same(read_peft_factors(tmp_path / "x", whole), found.factors)
    again = combine([found.factors, several[1]], [1.0, -1.0])
    assert_close(again.factors, weighted_sum(several[:1], [0.5], MODEL_LAYERS), MODEL_LAYERS)


def one_block():
    return {name: LowRank(f.a[0], f.b[0], f.scale[0]) for name, f in draw(2).items()}


@pytest.mark.parametrize(
    ("adapters", "weights", "settings", "words"),
    [
        ([], [], {}, "at least one"),
        (draw(2), [1], {}, "needs a list of adapters"),
        ([draw(2)], [1, 2], {}, "1 adapters need as many weights, got 2"),
        ([draw(2)], [float("inf")], {}, "a weight must be a finite number"),
        ([draw(2)], ["1"], {}, "a weight must be a finite number, got '1'"),
        ([draw(2)], [1], {"how": "tie"}, "unknown combination 'tie'; did you mean 'ties'"),
        ([draw(2)], [1], {"how": "ties"}, "'ties' needs density"),
        ([draw(2)], [1], {"how": "ties", "density": 0.0}, "density must be a finite number above"),
        ([draw(2)], [1], {"how": "dare_ties", "density": 1.5}, "must be at most 1, got 1.5"),
        ([draw(2)], [1], {"density": 0.5}, "density has no part in 'exact'"),
        ([draw(2)], [1], {"rank": 0}, "rank must be an integer >= 1"),
        ([draw(2)], [1], {"how": "linear", "rank": 2}, "rank has no part in 'linear'"),
        ([draw(2)], [1], {"seed": -1}, "seed must be an integer >= 0"),
        ([draw(2), draw(3)], [1, 1], {"how": "linear"}, r"at 'q_proj' they are \[2, 3\]; take 'ex"),
        ([draw(2), draw(3)], [1, 1], {"how": "ties", "density": 0.5}, "or give rank to merge"),
        ([draw(2), None], [1, 1], {}, "adapter 1 must be an adapter or its factors"),
        ([one_block()], [1], {}, "its factors of all blocks"),
        ([draw(2), {"q_proj": draw(2)["down_proj"]}], [1, 1], {}, "8 -> 4 and 8 -> 12"),
        ([draw(2), _blocks(draw(2))], [1, 1], {}, "of 2 and 3 blocks"),
        ([draw(2), draw(2, sites=SOME_LAYERS)], [1, 1], {}, "the last one named is 3"),
        ([draw(2, scale=float("nan"))], [1], {"rank": 1}, "values at 'q_proj' that are not"),
        ([draw(2, scale=1e30)], [1e30], {}, "at 'q_proj' is not finite in fp32"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(adapters, weights, settings, words):
    with pytest.raises(InputError, match=words):
        combine(adapters, weights, **settings)
