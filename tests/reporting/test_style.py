import io
import sys

import numpy as np
import pytest
from matplotlib.text import Text
from PIL import Image

from mos_jax import InputError
from mos_jax.reporting.style import (
    PALETTE,
    arm_styles,
    freeze_layout,
    label_column,
    new_figure,
    png_bytes,
    require_matplotlib,
    spread,
)


def test_many_arms_all_look_different_and_the_same_in_every_picture():
    names = [f"arm {i}" for i in range(25)]
    styles = arm_styles(names)
    assert len({(s.colour, s.marker, s.dash) for s in styles.values()}) == 25
    assert arm_styles(names) == styles
    assert len({styles[name].colour for name in names[: len(PALETTE)]}) == len(PALETTE)


@pytest.mark.parametrize(
    ("positions", "expected"),
    [
        ([], []),
        ([3.0], [3.0]),
        ([1.0, 5.0, 9.0], [1.0, 5.0, 9.0]),
        ([5.0, 5.0], [4.5, 5.5]),
        ([5.0, 5.5], [4.75, 5.75]),
        ([0.0, 0.0, 0.0], [0.0, 1.0, 2.0]),
        ([10.0, 9.9], [10.0, 9.0]),
        ([20.0, -3.0], [10.0, 0.0]),
    ],
)
def test_labels_move_as_little_as_they_must(positions, expected):
    np.testing.assert_allclose(spread(positions, 1.0, 0.0, 10.0), expected)


@pytest.mark.parametrize("seed", range(20))
def test_spread_labels_are_apart_in_order_and_inside(seed):
    random = np.random.default_rng(seed)
    wishes = random.uniform(-2, 12, random.integers(2, 11))
    found = np.array(spread(wishes.tolist(), 1.0, 0.0, 10.0))
    order = np.argsort(wishes, kind="stable")
    assert np.all(np.diff(found[order]) >= 1.0 - 1e-9)
    assert found.min() >= -1e-9
    assert found.max() <= 10 + 1e-9


def test_too_many_labels_are_spaced_evenly():
    np.testing.assert_allclose(spread([5.0, 4.0, 4.5], 9.0, 0.0, 10.0), [10.0, 0.0, 5.0])


def test_labels_in_a_column_do_not_overlap():
    figure = new_figure(4, 3)
    axes = figure.subplots()
    axes.set_ylim(0, 1)
    freeze_layout(figure)
    label_column(axes, [(0.2, 0.5 + i / 1000, f"name {i}", "#000000") for i in range(8)])
    figure.canvas.draw()
    boxes = [Text.get_window_extent(text) for text in axes.texts]
    assert len(boxes) == 8
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[i + 1 :])


def test_a_png_is_small_repeats_and_shows_the_colours():
    def draw():
        figure = new_figure(2, 1)
        figure.subplots().axhspan(0, 1, color=PALETTE[0])
        return png_bytes(figure)

    png = draw()
    assert png == draw()
    image = Image.open(io.BytesIO(png))
    assert image.mode == "P"
    wanted = tuple(int(PALETTE[0][i : i + 2], 16) for i in (1, 3, 5))
    assert wanted in {colour for _, colour in image.convert("RGB").getcolors(1 << 16)}


def test_without_matplotlib_the_line_that_installs_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match=r"pip install 'mos_jax\[report\]'"):
        require_matplotlib()
