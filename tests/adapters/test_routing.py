import dataclasses

import numpy as np
import pytest

from mos_jax.adapters.pools import PoolLayout
from mos_jax.adapters.routing import (
    check_balance,
    check_table,
    checksum,
    count_idle,
    count_uses,
    draw_normals,
    draw_table,
    expected_idle_share,
)
from mos_jax.errors import InputError

# num_layers, equivalent_rank, rank, private_rank, shards_per_vector
LAYOUT = PoolLayout(4, 3, 6, 1, 2)
LAYOUTS = [
    LAYOUT,
    PoolLayout(4, 2, 3, 0, 1),
    PoolLayout(1, 2, 2, 0, 4),
    PoolLayout(3, 2, 6, 0, 2),  # all public shards in every block
    PoolLayout(3, 3, 5, 2, 1),  # all public shards, and private ones
    PoolLayout(3, 2, 2, 2, 3),  # nothing public
]
# Of LAYOUT, "q_proj" and seed 7.
GOLDEN_FIRST_BLOCK = [[8, 2], [13, 11], [6, 3], [15, 14], [9, 10], [16, 17]]
GOLDEN_CHECKSUM = "df98adb85761c37ddc84b9b595ec1d33415aba05be42a24ccb594a9ec540a752"
GOLDEN_BALANCED_FIRST_BLOCK = [[8, 13], [14, 15], [5, 2], [4, 0], [1, 11], [16, 17]]
GOLDEN_BALANCED_CHECKSUM = "64b444bffdb120b1b9c8f8d1512f8f00dfc13e323b04a9e85506d3cb2d5c573f"
each_draw = pytest.mark.parametrize("balanced", [False, True], ids=["free", "balanced"])
each_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=str)


def draw_tables(layout, name, seed, balanced=False):
    """Of A and of B."""
    return tuple(draw_table(layout, name, side, seed, balanced) for side in ("a", "b"))


def public(layout, table):
    return table[:, : layout.rank - layout.private_rank].reshape(layout.num_layers, -1)


def private(layout, table):
    return table[:, layout.rank - layout.private_rank :].reshape(layout.num_layers, -1)


@each_layout
def test_a_pool_has_e_L_l_shards_of_which_p_l_per_block_are_private(layout):
    blocks, e, r, p, shards, _ = dataclasses.astuple(layout)
    assert layout.num_public == (e - p) * blocks * shards
    assert layout.num_private_per_layer == p * shards
    assert layout.num_shards == e * blocks * shards
    assert layout.drawn == ((r - p) * shards,) * layout.num_layers


@each_layout
@each_draw
def test_tables_are_int32_of_r_vectors_of_l_shards_for_every_block(layout, balanced):
    for table in draw_tables(layout, "q_proj", 0, balanced):
        assert table.dtype == np.int32
        assert table.shape == (layout.num_layers, layout.rank, layout.shards_per_vector)


@each_layout
@each_draw
def test_a_matrix_uses_no_public_shard_twice_and_no_private_one_as_public(layout, balanced):
    for seed in range(20):
        for table in draw_tables(layout, "q_proj", seed, balanced):
            for picks in public(layout, table):
                assert len(set(picks.tolist())) == picks.size
                assert set(picks.tolist()) <= set(range(layout.num_public))


def test_public_shards_repeat_across_blocks():
    table, _ = draw_tables(LAYOUT, "q_proj", 0)
    picks = public(LAYOUT, table)
    assert len(np.unique(picks)) < picks.size


@each_layout
@each_draw
def test_every_private_shard_is_used_by_exactly_one_block_and_paired(layout, balanced):
    table_a, table_b = draw_tables(layout, "q_proj", 0, balanced)
    everything = np.arange(layout.num_public, layout.num_shards)
    for table in (table_a, table_b):
        np.testing.assert_array_equal(np.sort(private(layout, table).ravel()), everything)
    np.testing.assert_array_equal(private(layout, table_a), private(layout, table_b))


@each_draw
def test_tables_of_a_and_b_differ_in_every_block(balanced):
    for seed in range(5):
        table_a, table_b = draw_tables(LAYOUT, "q_proj", seed, balanced)
        assert np.all(np.any(public(LAYOUT, table_a) != public(LAYOUT, table_b), axis=1))


def test_without_subset_selection_blocks_use_all_shards_each_in_its_own_order():
    layout = PoolLayout(4, 3, 12, 0, 2)
    for table in draw_tables(layout, "q_proj", 0):
        picks = public(layout, table)
        for row in picks:
            np.testing.assert_array_equal(np.sort(row), np.arange(layout.num_public))
            assert np.any(row != np.arange(layout.num_public))
        assert len({tuple(row) for row in picks.tolist()}) == layout.num_layers


@pytest.mark.parametrize("rank", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("shards", [1, 3])
def test_balanced_draws_use_shards_equally_often_and_leave_none_idle_that_could_be_used(
    rank, shards
):
    layout = PoolLayout(4, 3, rank, 1, shards)
    draws, public_shards = sum(layout.drawn), layout.num_public
    for seed in range(10):
        for table in draw_tables(layout, "q_proj", seed, balanced=True):
            uses = np.bincount(public(layout, table).ravel(), minlength=public_shards)
            assert sorted(set(uses.tolist())) == sorted(
                {draws // public_shards, -(-draws // public_shards)}
            )
            np.testing.assert_array_equal(count_uses(layout, table), uses)
            idle = max(0, public_shards - draws)
            assert count_idle(layout, table) == idle
            assert expected_idle_share(layout, balanced=True) == pytest.approx(idle / public_shards)
            assert (idle == 0) is (rank >= 3)


@pytest.mark.parametrize("layout", LAYOUTS[3:], ids=str)
def test_where_blocks_use_all_shards_or_none_balance_changes_nothing(layout):
    np.testing.assert_array_equal(
        draw_tables(layout, "q_proj", 2, balanced=True), draw_tables(layout, "q_proj", 2)
    )


def test_balanced_draws_have_streams_of_their_own_for_seed_and_pool():
    tables = [
        draw_table(LAYOUT, name, side, seed, balanced=True)
        for name in ("q_proj", "k_proj")
        for side in ("a", "b")
        for seed in (0, 1, 2**40)
    ]
    assert len({table.tobytes() for table in tables}) == len(tables)
    np.testing.assert_array_equal(tables[0], draw_table(LAYOUT, "q_proj", "a", 0, True))


def test_the_same_seed_gives_the_same_tables():
    first, again = (draw_tables(LAYOUT, "q_proj", 5) for _ in range(2))
    np.testing.assert_array_equal(first, again)


def test_drawing_leaves_numpys_global_generator_alone_and_does_not_read_it():
    np.random.seed(1)  # noqa: NPY002
    first = draw_tables(LAYOUT, "q_proj", 0)
    after = np.random.random()  # noqa: NPY002
    np.random.seed(1)  # noqa: NPY002
    assert np.random.random() == after  # noqa: NPY002
    np.testing.assert_array_equal(first, draw_tables(LAYOUT, "q_proj", 0))


def test_other_seeds_types_and_blocks_give_other_tables():
    tables = {
        (seed, name): draw_tables(LAYOUT, name, seed)[0]
        for seed in (0, 1, 2**32, 2**40)
        for name in ("q_proj", "k_proj")
    }
    assert len({table.tobytes() for table in tables.values()}) == len(tables)
    rows = public(LAYOUT, tables[0, "q_proj"])
    assert len({tuple(row) for row in rows.tolist()}) == LAYOUT.num_layers


def test_the_generator_has_not_changed():
    # Stored adapters hold their tables; what a change breaks is the sharing of one table by
    # adapters of one configuration that were made before and after it.
    table_a, table_b = draw_tables(LAYOUT, "q_proj", 7)
    assert table_a[0].tolist() == GOLDEN_FIRST_BLOCK
    assert checksum({"a": table_a, "b": table_b}) == GOLDEN_CHECKSUM


def test_the_balanced_generator_has_not_changed():
    table_a, table_b = draw_tables(LAYOUT, "q_proj", 7, balanced=True)
    assert table_a[0].tolist() == GOLDEN_BALANCED_FIRST_BLOCK
    assert checksum({"a": table_a, "b": table_b}) == GOLDEN_BALANCED_CHECKSUM


def test_normals_are_standard_normal_and_their_generator_has_not_changed():
    golden = [[-1.75290520, -1.74467119, -0.74092348], [0.04693968, -0.30126593, -0.33404890]]
    np.testing.assert_allclose(draw_normals((2, 3), "q_proj", 7), golden, atol=1e-8)
    drawn = draw_normals((200, 100), "q_proj", 0)
    assert abs(drawn.mean()) < 5 / np.sqrt(drawn.size)
    assert abs(drawn.std() - 1) < 0.03
    for width, share in ((0.5, 0.3829), (1, 0.6827), (2, 0.9545), (3, 0.9973)):
        assert np.mean(np.abs(drawn) < width) == pytest.approx(share, abs=0.02)
    assert abs(np.corrcoef(drawn[:, :-1].ravel(), drawn[:, 1:].ravel())[0, 1]) < 0.04


def test_normals_differ_by_seed_and_type():
    draws = [draw_normals((4, 4), name, seed) for name in ("q_proj", "k_proj") for seed in (0, 1)]
    assert np.unique(draws).size == 4 * 16


@each_draw
def test_any_shard_lands_in_any_position_equally_often(balanced):
    layout = PoolLayout(4, 1, 3, 0, 2)  # 8 public shards, 6 positions
    draws = 300
    counts = np.zeros((6, layout.num_public))
    together = 0
    for seed in range(draws):
        table_a, table_b = draw_tables(layout, "q_proj", seed, balanced)
        rows_a, rows_b = table_a.reshape(4, 6), table_b.reshape(4, 6)
        for row in rows_a:
            counts[np.arange(6), row] += 1
        together += np.sum(rows_a == rows_b)
    # Binomial counts of 4 * 300 draws: mean 150, standard deviation 11.5.
    assert counts.sum() == 6 * 4 * draws
    np.testing.assert_allclose(counts, 150, atol=5 * 11.5)
    chi_squared = np.sum((counts - 150) ** 2 / 150)
    assert 12 < chi_squared < 80  # 42 degrees of freedom give 42 +- 9
    # A and B agree at a position by chance only: 7,200 positions, 900 +- 30.
    assert abs(together - 900) < 5 * 30


@pytest.mark.parametrize(
    ("rank", "private_rank", "percent", "digits"),
    [(2, 0, 36, 0), (4, 0, 13, 0), (8, 0, 1.4, 1), (8, 1, 0.03, 2)],
)
def test_expected_idle_share_at_30_layers_and_equivalent_rank_2(
    rank, private_rank, percent, digits
):
    for shards in (1, 4):
        share = expected_idle_share(PoolLayout(30, 2, rank, private_rank, shards))
        assert round(100 * share, digits) == percent


def test_drawn_tables_leave_the_expected_share_idle():
    layout = PoolLayout(12, 2, 3, 1, 2)
    idle = [count_idle(layout, draw_tables(layout, "q", seed)[0]) for seed in range(200)]
    expected = (1 - 2 / 12) ** 12
    assert expected_idle_share(layout) == pytest.approx(expected)
    # Single pools of 24 shards vary by some 0.06, so the mean of 200 by 0.005.
    assert np.mean(idle) / layout.num_public == pytest.approx(expected, abs=0.02)


def test_idle_counts_public_shards_in_no_blocks_table():
    layout = PoolLayout(2, 2, 2, 1, 2)  # 4 public shards, 2 drawn by each block
    table = np.array([[[0, 1], [4, 5]], [[1, 0], [6, 7]]], np.int32)
    check_table(layout, table, "table")
    assert count_idle(layout, table) == 2
    table[1, 0] = [3, 1]
    assert count_idle(layout, table) == 1


def test_nothing_is_idle_without_public_shards_or_without_subset_selection():
    for layout in (PoolLayout(3, 2, 2, 2, 3), PoolLayout(3, 2, 6, 0, 2)):
        assert expected_idle_share(layout) == 0
        assert count_idle(layout, draw_tables(layout, "q_proj", 0)[0]) == 0


@each_layout
def test_drawn_tables_pass_the_checks(layout):
    for table in draw_tables(layout, "q_proj", 3):
        check_table(layout, table, "table")
    for table in draw_tables(layout, "q_proj", 3, balanced=True):
        check_table(layout, table, "table")
        check_balance(layout, table, "table")


def test_blocks_of_a_type_in_a_pool_are_checked_as_those_of_the_pool():
    table = draw_tables(LAYOUT, "width_8", 0)[0]
    check_table(LAYOUT, table[1:3], "table", range(1, 3))
    with pytest.raises(InputError, match=r"table: a routing table here is int32 \(2, 6, 2\)"):
        check_table(LAYOUT, table, "table", range(1, 3))
    with pytest.raises(InputError, match="private vectors of block 0 must use shards 20 to 21"):
        check_table(LAYOUT, table[1:3], "table", range(2, 4))


def test_the_check_of_balance_names_the_shards_and_their_uses():
    layout = PoolLayout(3, 1, 2, 0, 1)  # 3 shards, 6 draws
    balanced = np.array([[[0], [1]], [[2], [0]], [[1], [2]]], np.int32)
    check_balance(layout, balanced, "table_a/q_proj")
    balanced[2, 1] = 0
    check_table(layout, balanced, "table_a/q_proj")
    with pytest.raises(InputError, match=r"table_a/q_proj: shard 2 is used 1 times and shard 0 3"):
        check_balance(layout, balanced, "table_a/q_proj")


def broken(**changes):
    table = draw_tables(LAYOUT, "q_proj", 0)[0]
    for place, value in changes.values():
        table[place] = value
    return table


def swapped_private():
    table = broken()
    table[[0, 1], -1] = table[[1, 0], -1]
    return table


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (broken()[:3], r"int32 \(4, 6, 2\), got int32 \(3, 6, 2\)"),
        (broken()[:, :5], r"got int32 \(4, 5, 2\)"),
        (broken().reshape(4, 12, 1), r"got int32 \(4, 12, 1\)"),
        (broken().astype(np.int64), r"got int64"),
        (broken().astype(np.float32), r"got float32"),
        (broken(x=((2, 0, 0), -1)), r"block 2 uses a public shard outside 0\.\.15"),
        (broken(x=((2, 0, 0), 16)), r"block 2 uses a public shard outside 0\.\.15"),
        (broken(x=((3, 4, 1), 10**6)), r"block 3 uses a public shard outside"),
        (broken(x=((1, 0, 0), 4), y=((1, 4, 1), 4)), "block 1 uses a public shard twice"),
        (broken(x=((0, 5, 0), 3)), "private vectors of block 0 must use shards 16 to 17"),
        (broken(x=((1, 5), [19, 18])), "private vectors of block 1 must use shards 18 to 19"),
        (swapped_private(), "private vectors of block 0"),
    ],
)
def test_the_check_names_what_is_wrong_with_a_table(table, message):
    with pytest.raises(InputError, match=f"table_a/q_proj: .*{message}"):
        check_table(LAYOUT, table, "table_a/q_proj")


def test_the_checksum_sees_every_single_index():
    tables = dict(zip("ab", draw_tables(LAYOUT, "q_proj", 0), strict=True))
    seen = {checksum(tables)}
    for name in tables:
        for place in range(tables[name].size):
            changed = {key: table.copy() for key, table in tables.items()}
            changed[name].flat[place] ^= 1
            seen.add(checksum(changed))
    assert len(seen) == 1 + sum(table.size for table in tables.values())


def test_the_checksum_sees_names_and_shapes_but_not_the_order_of_names():
    table = np.arange(12, dtype=np.int32).reshape(2, 3, 2)
    other = table[::-1].copy()
    base = checksum({"a": table, "b": other})
    assert base == checksum({"b": other, "a": table})
    assert len(base) == 64
    others = [
        {"a": other, "b": table},
        {"a": table, "c": other},
        {"a": table},
        {"a": table.reshape(2, 6, 1), "b": other},
    ]
    assert len({base, *map(checksum, others)}) == 5


def test_the_checksum_does_not_depend_on_the_memory_layout():
    table = draw_tables(LAYOUT, "q_proj", 0)[0]
    assert checksum({"a": np.asfortranarray(table)}) == checksum({"a": table})
    assert checksum({"a": table.astype(">i4")}) == checksum({"a": table})
