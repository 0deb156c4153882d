"""Which pieces of prompts are found again, by what, and what gives way."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mos_jax import InputError
from mos_jax.models.kv_cache import Cache
from mos_jax.serving.prefixes import Prefixes
from tests.models.fixtures_decoder import tiny_decoder

SIZE = 4
DECODER = tiny_decoder()
PIECE = DECODER.empty_cache(1, SIZE).k.nbytes * 2


def prefixes(slots):
    return Prefixes(DECODER, SIZE, slots * PIECE + PIECE // 2)


def tokens_of(*pieces):
    """Tokens of pieces that are named by a number each."""
    return np.repeat(np.asarray(pieces, np.int32), SIZE)


def keep(store, tenant, *pieces):
    """Keeps a chain as a row does; returns how much of it was."""
    node, cache = store.find(tenant, tokens_of())[0], DECODER.empty_cache(2, 16)
    for place, piece in enumerate(pieces):
        node = store.keep(tenant, node, tokens_of(piece), cache, 1, place * SIZE)
        if node is None:
            return place
    return len(pieces)


def found(store, tenant, *pieces):
    return len(store.find(tenant, tokens_of(*pieces))) - 1


def test_a_piece_is_found_behind_the_same_pieces_of_the_same_tenant_only():
    store = prefixes(8)
    assert keep(store, "a", 1, 2, 3) == 3
    assert found(store, "a", 1, 2, 3, 4) == 3
    assert found(store, "a", 1, 3) == 1
    assert found(store, "a", 2, 3) == 0
    assert found(store, "b", 1, 2, 3) == 0
    assert found(store, "a", 1) == 1
    assert len(store.find("a", tokens_of(1, 2)[:-1])) - 1 == 1  # no part of a piece


def test_the_piece_used_longest_ago_gives_way_and_never_one_that_others_follow():
    store = prefixes(4)
    keep(store, "a", 1, 2)
    keep(store, "b", 1, 2)
    assert found(store, "a", 1, 2) == 2
    keep(store, "c", 1)  # the end of b's chain goes, its beginning stays
    assert (found(store, "b", 1, 2), found(store, "a", 1, 2), found(store, "c", 1)) == (1, 2, 1)
    assert store.counts["evictions"] == 1
    # A chain longer than the cache keeps its beginning.
    assert keep(store, "d", 1, 2, 3, 4, 5) == 4
    assert found(store, "d", 1, 2, 3, 4, 5) == 4
    assert [found(store, name, 1) for name in "abc"] == [0, 0, 0]
    assert keep(store, "d", 1, 2, 3, 4, 6) == 4


def test_what_is_forgotten_is_not_found_and_nothing_follows_it():
    store = prefixes(4)
    keep(store, "a", 1, 2)
    keep(store, "b", 1, 2)
    node = store.find("a", tokens_of(1, 2))[-1]
    store.forget("a")
    store.forget("unknown")
    assert store.keep("a", node, tokens_of(3), DECODER.empty_cache(1, 16), 0, 8) is None
    assert (found(store, "a", 1, 2), found(store, "b", 1, 2)) == (0, 2)
    assert keep(store, "c", 1, 2) == 2
    assert store.counts["evictions"] == 0


def test_keys_and_values_come_back_as_they_were_where_they_are_wanted():
    store = prefixes(3)
    rng = np.random.default_rng(0)
    shape = DECODER.empty_cache(2, 16).k.shape
    k, v = rng.standard_normal((2, *shape)).astype(np.float32)
    node = store.find("a", tokens_of())[0]
    for place in range(3):
        held = Cache(jnp.asarray(k), jnp.asarray(v))
        node = store.keep("a", node, tokens_of(place), held, 1, place * SIZE)
    chain = store.find("a", tokens_of(0, 1, 7))
    got = store.restore(DECODER.empty_cache(3, 16), 2, chain)
    for array, want in ((got.k, k), (got.v, v)):
        np.testing.assert_array_equal(array[:, 2, :, :8], want[:, 1, :, :8])
        assert not array[:, 2, :, 8:].any()
        assert not array[:, :2].any()


def test_its_bytes_are_what_fits_into_the_limit_and_too_few_are_refused():
    store = prefixes(3)
    assert store.slots == 3
    assert store.nbytes == 3 * PIECE
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(store._store)) == 3 * PIECE
    with pytest.raises(InputError, match=f"holds no piece of 4 tokens, which takes {PIECE} bytes"):
        Prefixes(DECODER, SIZE, PIECE - 1)
