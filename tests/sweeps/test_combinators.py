import pytest

from mos_jax.errors import InputError
from mos_jax.sweeps.combinators import arm, chain, grid, product, zipped


def test_an_arm_has_its_name_and_fields_of_the_adapter():
    assert arm("x", {"training.steps": 3}, rank=2) == {
        "arm": "x",
        "training.steps": 3,
        "adapter.rank": 2,
    }
    with pytest.raises(InputError, match=r"sets adapter\.rank twice, to 1 and to 2"):
        arm("x", {"adapter.rank": 1}, rank=2)


def test_a_grid_labels_its_items():
    assert list(grid("adapter.rank", [2, 4])) == [
        {"arm": "rank=2", "adapter.rank": 2},
        {"arm": "rank=4", "adapter.rank": 4},
    ]
    assert [item["arm"] for item in grid("adapter.rank", [2], label="r: {}")] == ["r: 2"]


def test_a_product_combines_everything_and_joins_labels():
    items = list(product([arm("mos", rank=8)], grid("training.steps", [1, 2], "s={}")))
    assert items == [
        {"arm": "mos s=1", "adapter.rank": 8, "training.steps": 1},
        {"arm": "mos s=2", "adapter.rank": 8, "training.steps": 2},
    ]
    three = list(product(grid("a.b", [1, 2]), grid("a.c", [1, 2, 3]), grid("a.d", [0])))
    assert len(three) == 6
    assert three[1] == {"arm": "b=1 c=2 d=0", "a.b": 1, "a.c": 2, "a.d": 0}


def test_an_empty_label_adds_nothing():
    assert next(product([arm("", rank=8)], [arm("x")])) == {"arm": "x", "adapter.rank": 8}
    assert arm("", rank=8) == {"adapter.rank": 8}


def test_parts_that_set_one_field_are_refused():
    with pytest.raises(InputError, match=r"sets adapter\.rank twice, to 1 and to 2"):
        list(product([arm("x", rank=1)], [arm("y", rank=2)]))
    with pytest.raises(InputError, match=r"sets a\.b twice"):
        list(zipped(grid("a.b", [1]), grid("a.b", [1])))


def test_zipped_parts_go_side_by_side():
    items = list(zipped(grid("a.b", [1, 2], "b{}"), grid("a.c", [3, 4], "c{}")))
    assert items == [
        {"arm": "b1 c3", "a.b": 1, "a.c": 3},
        {"arm": "b2 c4", "a.b": 2, "a.c": 4},
    ]
    with pytest.raises(InputError, match="equally long, got 1, 2 items"):
        list(zipped(grid("a.b", [1]), grid("a.c", [1, 2])))


def test_a_chain_puts_one_behind_the_other():
    assert list(chain([arm("x")], grid("a.b", [1]))) == [{"arm": "x"}, {"arm": "b=1", "a.b": 1}]
    assert list(chain()) == []
