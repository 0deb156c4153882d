"""What the pictures of a MoS show is what its routing tables say."""

import jax
import numpy as np
import pytest

from mos_jax import InputError, MoSConfig, SiteShape, create_adapter
from mos_jax.reporting import inside_pictures
from mos_jax.reporting.style import png_bytes

SITES = {"q_proj": SiteShape(4, 8, 12)}
FULL = {"equivalent_rank": 2, "rank": 4, "shards_per_vector": 2, "private_rank": 1}


def mos(**fields):
    return create_adapter(MoSConfig(**{**FULL, **fields}), SITES, jax.random.key(0))


def off_diagonal(share):
    return share[~np.eye(len(share), dtype=bool)]


def test_shared_shards_are_counted_as_a_plain_loop_counts_them():
    adapter = mos()
    table = adapter.tables()["table_a/q_proj"]
    share = inside_pictures.shared_shards(adapter, "q_proj")
    for one in range(4):
        for other in range(4):
            mine, theirs = set(table[one].flat), set(table[other].flat)
            assert share[one, other] == sum(shard in theirs for shard in mine) / len(mine)


def test_what_each_strategy_does_to_what_layers_share_and_own():
    full = mos()
    alike = mos(pair_dissociation=False)
    whole = mos(subset_selection=False, rank=None)
    uncut = mos(shards_per_vector=1)
    public = mos(private_rank=0)
    private = mos(equivalent_rank=2, rank=2, private_rank=2)
    # Without pair dissociation a pair is what its shard of A is.
    shares = inside_pictures.shared_shards(alike, "q_proj")
    np.testing.assert_array_equal(inside_pictures.shared_pairs(alike, "q_proj"), shares)
    pairs = off_diagonal(inside_pictures.shared_pairs(full, "q_proj"))
    assert pairs.mean() < 0.5 * off_diagonal(shares).mean()
    # A block that uses all shards shares all but its private ones: 8 of 10.
    assert set(off_diagonal(inside_pictures.shared_shards(whole, "q_proj"))) == {0.8}
    assert not off_diagonal(inside_pictures.shared_shards(private, "q_proj")).any()
    # Without vector sharding a vector is its one shard.
    vectors = inside_pictures.shared_vectors(uncut, "q_proj")
    np.testing.assert_array_equal(vectors, inside_pictures.shared_shards(uncut, "q_proj"))
    cut = off_diagonal(inside_pictures.shared_vectors(full, "q_proj"))
    assert cut.mean() < 0.5 * off_diagonal(vectors).mean()
    # One vector of four is private, so at least so much is a block's own.
    assert (inside_pictures.own_shards(full, "q_proj") >= 0.25).all()
    assert inside_pictures.own_shards(public, "q_proj").min() < 0.25
    assert set(inside_pictures.own_shards(private, "q_proj")) == {1.0}


def test_a_block_owns_what_a_plain_loop_finds_nowhere_else():
    adapter = mos()
    table = adapter.tables()["table_b/q_proj"]
    for block, share in enumerate(inside_pictures.own_shards(adapter, "q_proj", "b")):
        others = np.delete(table, block, axis=0)
        assert share == np.mean([shard not in others for shard in table[block].flat])


def test_the_picture_marks_where_a_strategy_is_off():
    figure = inside_pictures.strategy_map(
        {"all": mos(), "no privatization": mos(private_rank=0)}, "q_proj"
    )
    panels = [axes for axes in figure.axes if axes.get_xlabel().startswith("mean ")]
    bold = [axes.xaxis.label.get_fontweight() == "bold" for axes in panels]
    # Four rows of two; the last one's second.
    assert bold == [False] * 7 + [True]
    owned = inside_pictures.own_shards(mos(private_rank=0), "q_proj").mean()
    assert panels[-1].get_xlabel() == f"mean {owned:.2f}"


def test_the_mosaic_names_the_shards_of_its_block():
    adapter = mos()
    figure = inside_pictures.mosaic(adapter, "q_proj", layer=2)
    pool, block = figure.axes
    assert [text.get_text() for text in pool.texts] == [str(n) for n in range(16)]
    wanted = [str(n) for n in adapter.tables()["table_a/q_proj"][2].flat]
    assert [text.get_text() for text in block.texts] == wanted


def test_a_block_of_a_lower_rank_has_fewer_tiles():
    adapter = mos(rank_pattern={"layers.1.self_attn.q_proj": 2})
    block = inside_pictures.mosaic(adapter, "q_proj", layer=1).axes[1]
    assert len(block.texts) == 2 * 2
    left = inside_pictures.routing_map(adapter, "q_proj").axes[0]
    assert len(left.texts) == (3 * 4 + 2) * 2


@pytest.mark.parametrize("fields", [{}, {"private_rank": 0, "shards_per_vector": 1}])
def test_all_pictures_can_be_drawn(fields):
    adapter = mos(**fields)
    for figure in (
        inside_pictures.pool_picture(adapter, "q_proj", "b"),
        inside_pictures.mosaic(adapter, "q_proj", 3, "b"),
        inside_pictures.routing_map(adapter, "q_proj"),
        inside_pictures.strategy_map({"one": adapter, "two": mos()}, "q_proj"),
    ):
        assert png_bytes(figure).startswith(b"\x89PNG")


def test_what_is_not_there_is_named():
    with pytest.raises(InputError, match=r"no site type 'q_porj'.*q_proj"):
        inside_pictures.shared_shards(mos(), "q_porj")
    with pytest.raises(InputError, match="blocks 0 to 3, got layer=4"):
        inside_pictures.mosaic(mos(), "q_proj", 4)
    with pytest.raises(InputError, match="at least one"):
        inside_pictures.strategy_map({}, "q_proj")
