import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mos_jax.models.choosing import Controls, choose, keep_likeliest, log_probabilities

run = jax.jit(choose)
keep = jax.jit(keep_likeliest)
SETTINGS = [(0.0, 1.0, 0), (1.0, 1.0, 0), (0.7, 0.8, 0), (1.3, 1.0, 3), (1.0, 0.6, 4)]


def controls(rows):
    """Of (temperature, top_p, top_k, seed) of each row."""
    temperature, top_p, top_k, seed = zip(*rows, strict=True)
    seeds = np.stack([np.asarray(seed), np.zeros(len(rows))], axis=1)
    return Controls(
        jnp.asarray(temperature, jnp.float32),
        jnp.asarray(top_p, jnp.float32),
        jnp.asarray(top_k, jnp.int32),
        jnp.asarray(seeds.astype(np.uint32)),
    )


def exact(logits, temperature, top_p, top_k):
    """Probabilities by the definition, sorted and in double precision."""
    logits = np.asarray(logits, np.float64) / temperature
    kept = np.ones(len(logits), bool)
    if top_k:
        kept = logits >= np.sort(logits)[-min(top_k, len(logits))]
    mass = np.exp(logits - logits.max()) * kept
    mass /= mass.sum()
    above = np.asarray([mass[logits > x].sum() for x in logits])
    kept &= (above < top_p) | (top_p >= 1)
    return mass * kept / (mass * kept).sum()


@given(
    st.lists(st.integers(-40, 40), min_size=1, max_size=12),
    st.integers(0, 14),
    # No sum of such weights is near these shares, so that rounding decides nothing.
    st.sampled_from([0.0137, 0.31713, 0.71317, 0.97531, 1.0]),
)
def test_what_stays_is_what_the_definition_says(halves, top_k, top_p):
    row = np.full(12, -1e9, np.float32)
    row[: len(halves)] = np.asarray(halves, np.float32) / 2
    got = keep(row[None], jnp.float32([top_p]), jnp.int32([top_k]))[0]
    want = exact(row, 1.0, top_p, top_k) > 0
    np.testing.assert_array_equal(np.isfinite(got) & (row > -1e8), want & (row > -1e8))
    np.testing.assert_array_equal(got[np.isfinite(got)], row[np.isfinite(got)])


@pytest.mark.parametrize("top_p", [1e-38, 1e-40, 1e-46])
@pytest.mark.parametrize("top_k", [0, 2])
def test_the_smallest_shares_leave_the_likeliest(top_p, top_k):
    logits = jnp.tile(jnp.asarray([1.2, 0.1, -0.5, 2.0, 1.9], jnp.float32), (50, 1))
    rows = controls([(3.0, top_p, top_k, seed) for seed in range(50)])
    np.testing.assert_array_equal(run(logits, jnp.arange(50), rows), 3)


@pytest.mark.parametrize(("temperature", "top_p", "top_k"), SETTINGS[1:])
def test_tokens_are_drawn_with_the_exact_probabilities(temperature, top_p, top_k):
    logits = np.asarray([1.2, 0.1, 2.0, -0.5, 1.9, -3.0, 0.7], np.float32)
    draws, each = 20_000, []
    every = jnp.tile(logits, (draws, 1))
    rows = controls([(temperature, top_p, top_k, seed) for seed in range(draws)])
    # Along seeds, and along the positions of one seed.
    each.append(run(every, jnp.full(draws, 5, jnp.int32), rows))
    alike = controls([(temperature, top_p, top_k, 7)] * draws)
    each.append(run(every, jnp.arange(draws, dtype=jnp.int32), alike))
    want = exact(logits, temperature, top_p, top_k)
    for tokens in each:
        share = np.bincount(np.asarray(tokens), minlength=7) / draws
        assert not share[want == 0].any()
        spread = np.sqrt(want * (1 - want) / draws)
        assert (np.abs(share - want) <= 4.5 * spread).all()


def test_a_rows_token_does_not_depend_on_its_neighbours_or_its_place():
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((5, 50)).astype(np.float32)
    settings = [(*setting, seed) for seed, setting in enumerate(SETTINGS)]
    positions = np.arange(5, dtype=np.int32)
    mixed = np.asarray(run(logits, positions, controls(settings)))
    for row, setting in enumerate(settings):
        # Alone: no other row has anything sampled or truncated.
        for place in (0, 4):
            alone = [(0.0, 1.0, 0, 9)] * 5
            alone[place] = setting
            moved = np.roll(logits, place - row, axis=0)
            at = np.roll(positions, place - row)
            assert run(moved, at, controls(alone))[place] == mixed[row]


@pytest.mark.parametrize("temperature", [1e-4, 1e-30, 1e-45])
def test_cold_is_greedy_without_overflow(temperature):
    logits = jnp.float32([[3.0, 9.0, 8.9, -4.0]])
    got = run(logits, jnp.int32([0]), controls([(temperature, 1.0, 0, 1)]))
    assert got.tolist() == [1]


def test_log_probabilities_are_those_of_the_softmax():
    logits = np.random.default_rng(1).standard_normal((3, 30)).astype(np.float32)
    tokens = jnp.int32([4, 0, 29])
    own, ids, likeliest = log_probabilities(jnp.asarray(logits), tokens, 6)
    want = np.asarray(jax.nn.log_softmax(logits, axis=-1))
    np.testing.assert_allclose(own, want[np.arange(3), tokens], atol=1e-5)
    np.testing.assert_array_equal(ids, np.argsort(-want, axis=-1)[:, :6])
    np.testing.assert_allclose(likeliest, np.take_along_axis(want, np.asarray(ids), 1), atol=1e-5)
