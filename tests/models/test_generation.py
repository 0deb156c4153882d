import jax
import jax.numpy as jnp
import pytest

from mos_jax import InputError
from mos_jax.models.generation import Sampling, _decode, generate
from tests.models.fixtures_decoder import filled_adapter, tiny_decoder

NEVER = [-1]


@pytest.fixture(scope="module")
def decoder():
    return tiny_decoder()


@pytest.fixture(scope="module")
def factors(decoder):
    return filled_adapter(decoder.sites).factors()


@jax.jit
def full_forward(decoder, tokens, factors):
    return jnp.argmax(decoder(tokens, factors), axis=-1)


def greedy_without_cache(decoder, prompt, steps, factors):
    ids = list(prompt)
    for _ in range(steps):
        # Filler behind the last token is invisible to it, and one length compiles once.
        filled = jnp.asarray([ids + [0] * (40 - len(ids))], jnp.int32)
        ids.append(int(full_forward(decoder, filled, factors)[0, len(ids) - 1]))
    return ids[len(prompt) :]


@pytest.mark.parametrize("adapted", [False, True])
def test_greedy_rows_of_unequal_length_equal_the_full_forward(decoder, factors, adapted):
    chosen = factors if adapted else None
    prompts = [[5, 6, 7], [9], list(range(20, 53))]
    got = generate(decoder, prompts, NEVER, Sampling.create(5), chosen)
    assert got == [greedy_without_cache(decoder, p, 5, chosen) for p in prompts]


def test_a_row_stops_at_a_stop_token_and_the_others_go_on(decoder, factors):
    prompts = [[5, 6, 7], [9, 4]]
    free = generate(decoder, prompts, NEVER, Sampling.create(6), factors)
    stop = free[0][2]
    cut = generate(decoder, prompts, [stop], Sampling.create(6), factors)
    for row, tokens in enumerate(free):
        end = tokens.index(stop) if stop in tokens else 6
        assert cut[row] == tokens[:end]
    assert len(cut[0]) <= 2


def test_sampling_repeats_with_its_seed_and_varies_with_it(decoder, factors):
    def sample(seed):
        sampling = Sampling.create(12, temperature=5.0, seed=seed)
        return generate(decoder, [[5, 6, 7]], NEVER, sampling, factors)[0]

    assert sample(0) == sample(0)
    assert len({tuple(sample(seed)) for seed in range(4)}) > 1


def test_a_cold_or_narrow_sample_is_greedy(decoder, factors):
    greedy = generate(decoder, [[5, 6, 7]], NEVER, Sampling.create(6), factors)
    cold = Sampling.create(6, temperature=1e-4)
    narrow = Sampling.create(6, temperature=1.0, top_p=1e-6)
    assert generate(decoder, [[5, 6, 7]], NEVER, cold, factors) == greedy
    assert generate(decoder, [[5, 6, 7]], NEVER, narrow, factors) == greedy


def test_rows_that_begin_alike_are_sampled_apart(decoder, factors):
    sampling = Sampling.create(12, temperature=5.0)
    rows = generate(decoder, [[5, 6, 7]] * 3, NEVER, sampling, factors)
    assert len(set(map(tuple, rows))) == 3


def test_one_compiled_decode_step_serves_all_steps(decoder, factors):
    jax.clear_caches()
    generate(decoder, [[5, 6, 7], [9]], NEVER, Sampling.create(9), factors)
    assert _decode._cache_size() == 1
    generate(decoder, [[8] * 20, [9] * 3], NEVER, Sampling.create(4), factors)
    assert _decode._cache_size() == 1


def test_no_prompts_give_no_rows(decoder):
    assert generate(decoder, [], NEVER) == []


@pytest.mark.parametrize(
    ("prompts", "new", "words"),
    [
        ([[1], []], 4, "prompt 1 is empty"),
        ([[1, 320]], 4, r"outside 0\.\.319"),
        ([[-1]], 4, r"outside 0\.\.319"),
        ([[1]], 10**6, "positions of"),
    ],
)
def test_prompts_that_cannot_run_are_refused(decoder, prompts, new, words):
    with pytest.raises(InputError, match=words):
        generate(decoder, prompts, NEVER, Sampling.create(new))


@pytest.mark.parametrize(
    "fields",
    [
        {"max_new_tokens": 0},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.5},
    ],
)
def test_sampling_out_of_range_is_refused(fields):
    with pytest.raises(InputError, match=next(iter(fields))):
        Sampling.create(**fields)
