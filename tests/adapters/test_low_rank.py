import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mos_jax.adapters.low_rank import LowRank
from mos_jax.adapters.strictness import strict
from mos_jax.errors import InputError
from tests.adapters.fixtures_adapters import quick_jit

# Blocks, rank, both widths, rows of inputs.
L, R, H, D, N = 3, 2, 5, 4, 6


def draw(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def one_block():
    return LowRank(jnp.asarray(draw(R, H)), jnp.asarray(draw(R, D)), jnp.float32(1.5))


def all_blocks(layers=None):
    scale = np.array([0.5, 2.0, -3.0], np.float32)
    return LowRank(
        jnp.asarray(draw(L, R, H)), jnp.asarray(draw(L, R, D)), jnp.asarray(scale), layers
    )


def dense(factors):
    """scale * a^T b, entry by entry, in double precision."""
    a, b, scale = (np.asarray(x, np.float64) for x in (factors.a, factors.b, factors.scale))
    if a.ndim == 3:
        return np.stack([dense(LowRank(*entry)) for entry in zip(a, b, scale, strict=True)])
    change = np.zeros((a.shape[1], b.shape[1]))
    for i in range(a.shape[1]):
        for j in range(b.shape[1]):
            change[i, j] = scale * sum(a[r, i] * b[r, j] for r in range(a.shape[0]))
    return change


def test_delta_of_one_block_is_the_scaled_sum_of_outer_products():
    delta = one_block().delta()
    assert (delta.shape, delta.dtype) == ((H, D), jnp.float32)
    np.testing.assert_allclose(delta, dense(one_block()), rtol=1e-5, atol=1e-6)


def test_delta_of_all_blocks_uses_each_blocks_own_scale():
    delta = all_blocks().delta()
    assert delta.shape == (L, H, D)
    np.testing.assert_allclose(delta, dense(all_blocks()), rtol=1e-5, atol=1e-6)


def test_apply_equals_the_product_with_the_dense_change():
    x = draw(N, H)
    y = one_block().apply(jnp.asarray(x))
    assert (y.shape, y.dtype) == ((N, D), jnp.float32)
    np.testing.assert_allclose(y, x.astype(np.float64) @ dense(one_block()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.bfloat16, 0.03), (jnp.float16, 0.004)])
def test_apply_returns_the_dtype_of_its_input_within_its_precision(dtype, tolerance):
    x = jnp.asarray(draw(N, H), dtype)
    y = one_block().apply(x)
    assert y.dtype == dtype
    exact = np.asarray(x, np.float64) @ dense(one_block())
    np.testing.assert_allclose(np.asarray(y, np.float64), exact, atol=tolerance * abs(exact).max())


def test_the_scale_is_applied_before_anything_is_rounded_to_bf16():
    # Next to 256, bf16 holds even numbers only: 257 (1 + 1/512) = 257.5 rounds to 258. Were the
    # sum 257 or the scale rounded first, the result would be 256.
    factors = LowRank(jnp.array([[256.0, 1.0]]), jnp.ones((1, 1)), jnp.float32(1 + 1 / 512))
    assert float(factors.apply(jnp.ones((1, 2), jnp.bfloat16))[0, 0]) == 258.0


def test_zero_b_applies_as_exact_zeros():
    factors = LowRank(jnp.asarray(draw(R, H)), jnp.zeros((R, D)), jnp.float32(8))
    for dtype in (jnp.float32, jnp.bfloat16):
        assert not np.any(factors.apply(jnp.asarray(1e4 * draw(N, H), dtype)))
    assert not np.any(factors.delta())


def test_zero_scale_applies_as_exact_zeros():
    factors = LowRank(jnp.asarray(draw(R, H)), jnp.asarray(draw(R, D)), jnp.float32(0))
    assert not np.any(factors.apply(jnp.asarray(draw(N, H))))


def test_merged_weights_compute_what_base_and_adapter_compute_apart():
    x, weight = jnp.asarray(draw(N, H)), jnp.asarray(draw(H, D))
    merged = one_block().merge(weight)
    np.testing.assert_allclose(x @ merged, x @ weight + one_block().apply(x), rtol=1e-5, atol=1e-5)
    assert np.abs(merged - weight).max() > 0.1


def test_merge_sums_in_fp32_and_rounds_once_to_the_weights_dtype():
    weight = jnp.asarray(draw(L, H, D), jnp.bfloat16)
    merged = all_blocks().merge(weight)
    assert merged.dtype == jnp.bfloat16
    exact = weight.astype(jnp.float32) + all_blocks().delta()
    np.testing.assert_array_equal(merged, exact.astype(jnp.bfloat16))


def test_merge_of_some_layers_leaves_the_others_bitwise():
    weight = jnp.asarray(draw(5, H, D), jnp.bfloat16)
    factors = all_blocks(layers=(0, 2, 3))
    merged = factors.merge(weight)
    arrays = tuple(map(np.asarray, (factors.a, factors.b, factors.scale)))
    expected = np.asarray(weight).copy()
    for row, k in enumerate((0, 2, 3)):
        one = LowRank(*(array[row] for array in arrays))
        expected[k] = one.merge(np.asarray(weight)[k])
        assert np.any(expected[k] != weight[k])
    np.testing.assert_array_equal(merged, expected)


def test_for_all_layers_puts_each_block_in_its_place_and_zeros_elsewhere():
    factors = all_blocks(layers=(0, 2, 3))
    spread = quick_jit(lambda factors: factors.for_all_layers(5))(factors)
    assert spread.layers is None
    for name in ("a", "b", "scale"):
        have, want = getattr(spread, name), getattr(factors, name)
        assert have.shape == (5, *want.shape[1:])
        np.testing.assert_array_equal(have[jnp.array([0, 2, 3])], want)
        assert not np.any(have[jnp.array([1, 4])])
    weight = jnp.asarray(draw(5, H, D))
    np.testing.assert_array_equal(spread.merge(weight), factors.merge(weight))


@pytest.mark.parametrize("blocks", [1, 3, 4])
def test_blocks_that_do_not_exist_are_refused(blocks):
    factors = all_blocks(layers=(1, 2, 4))
    message = rf"the blocks \[1, 2, 4\], do not fit weights with \[{blocks}\]"
    with pytest.raises(InputError, match=message):
        factors.for_all_layers(blocks)
    with pytest.raises(InputError, match=message):
        factors.merge(np.ones((blocks, H, D), np.float32))


@pytest.mark.parametrize("blocks", [1, 2, 7])
def test_another_number_of_blocks_is_refused(blocks):
    message = rf"leading axes \[3\] do not fit weights with \[{blocks}\]"
    with pytest.raises(InputError, match=message):
        all_blocks().for_all_layers(blocks)
    with pytest.raises(InputError, match=message):
        all_blocks().merge(np.ones((blocks, H, D), np.float32))


def test_one_block_is_not_spread_or_merged_as_several():
    one = one_block()
    placed = LowRank(one.a, one.b, one.scale, (1,))
    for factors, blocks in ((one, [L]), (placed, [L]), (placed, []), (all_blocks((0, 1, 2)), [])):
        with pytest.raises(InputError, match=rf"do not fit weights with \[{L if blocks else ''}\]"):
            factors.merge(np.ones((*blocks, H, D), np.float32))
    with pytest.raises(InputError, match=r"leading axes \[\] do not fit"):
        one.for_all_layers(L)


def test_delta_is_computed_in_full_fp32_on_every_device():
    # GPUs and TPUs would multiply fp32 in a shorter format.
    assert "HIGHEST" in str(jax.make_jaxpr(LowRank.delta)(one_block()))


def test_for_all_layers_of_all_layers_changes_nothing():
    factors = all_blocks()
    spread = factors.for_all_layers(L)
    for name in ("a", "b", "scale"):
        np.testing.assert_array_equal(getattr(spread, name), getattr(factors, name))


def test_rank_and_count():
    assert (one_block().rank, all_blocks().rank) == (R, R)
    assert one_block().count() == R * (H + D)
    assert all_blocks().count() == L * R * (H + D)


def test_scan_and_vmap_over_blocks_equal_a_loop():
    factors, x = all_blocks(), jnp.asarray(draw(N, H))
    loop = [LowRank(factors.a[k], factors.b[k], factors.scale[k]).apply(x) for k in range(L)]
    _, scanned = jax.lax.scan(lambda carry, block: (carry, block.apply(x)), None, factors)
    mapped = jax.vmap(lambda block: block.apply(x))(factors)
    np.testing.assert_allclose(scanned, loop, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(mapped, loop, rtol=1e-5, atol=1e-6)


def test_layers_is_static_and_survives_jit():
    doubled = jax.jit(lambda f: jax.tree.map(lambda leaf: 2 * leaf, f))(all_blocks((0, 2, 3)))
    assert doubled.layers == (0, 2, 3)
    assert len(jax.tree.leaves(doubled)) == 3
    np.testing.assert_array_equal(doubled.scale, 2 * all_blocks().scale)


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_with_an_axis_of_rows_each_row_meets_its_own_factors(rows):
    factors = jax.tree.map(lambda leaf: leaf[:rows], all_blocks())
    x = draw(N, H)
    y = factors.apply(jnp.asarray(x))
    assert (y.shape, y.dtype) == ((N, D), jnp.float32)
    exact = np.einsum("bsh,bho->bso", x.reshape(rows, -1, H), dense(factors)).reshape(N, D)
    np.testing.assert_allclose(y, exact, rtol=1e-5, atol=1e-5)
    rounded = factors.apply(jnp.asarray(x, jnp.bfloat16))
    assert rounded.dtype == jnp.bfloat16
    np.testing.assert_allclose(rounded.astype(float), exact, atol=0.03 * abs(exact).max())


def test_rows_that_do_not_divide_the_tokens_are_refused():
    with pytest.raises(InputError, match="3 rows do not fit a batch of 7 tokens"):
        all_blocks().apply(jnp.asarray(draw(7, H)))


def test_scaled_and_negated_factors_make_the_scaled_and_the_opposite_change():
    for factors in (one_block(), all_blocks((0, 2, 3))):
        want = -2.5 * factors.delta()
        np.testing.assert_allclose(factors.scaled(-2.5).delta(), want, rtol=1e-6)
        np.testing.assert_array_equal((-factors).delta(), -factors.delta())
        assert (-factors).layers == factors.scaled(2).layers == factors.layers
        assert (-factors).scale.dtype == factors.scaled(2).scale.dtype == jnp.float32


def test_strict_refuses_silent_widening():
    def widen(x, y):
        return x + y

    arguments = jnp.ones(2, jnp.bfloat16), jnp.ones(2, jnp.float32)
    assert widen(*arguments).dtype == jnp.float32
    with pytest.raises(Exception, match=r"[Pp]romotion"):
        strict(widen)(*arguments)


def test_strict_refuses_silent_broadcasting():
    def add(x, y):
        return x + y

    arguments = jnp.ones((2, 3)), jnp.ones(3)
    assert add(*arguments).shape == (2, 3)
    with pytest.raises(ValueError, match="rank_promotion"):
        strict(add)(*arguments)


def test_strict_is_over_when_the_function_returns_or_raises():
    @strict
    def fails():
        raise KeyError

    strict(lambda: None)()
    with pytest.raises(KeyError):
        fails()
    assert (jnp.ones((2, 3)) + jnp.ones(3, jnp.bfloat16)).shape == (2, 3)


def test_strict_keeps_the_name_and_the_result():
    @strict
    def half(x):
        """Halves."""
        return x / 2

    assert (half.__name__, half.__doc__, half(3.0)) == ("half", "Halves.", 1.5)


@pytest.mark.parametrize("method", ["delta", "merge", "apply"])
def test_the_numerics_of_low_rank_raise_on_mixed_factors(method):
    # bf16 factors under an fp32 scale would widen silently.
    factors = one_block()
    mixed = LowRank(factors.a.astype(jnp.bfloat16), factors.b, jnp.ones((1,), jnp.float32))
    arguments = {"delta": (), "merge": (jnp.ones((H, D)),), "apply": (jnp.ones((N, H)),)}
    with pytest.raises((TypeError, ValueError)):
        getattr(mixed, method)(*arguments[method])
