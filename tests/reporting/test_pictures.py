import numpy as np
import pytest
from matplotlib.text import Text

from mos_jax.reporting.curves import (
    Curve,
    Panel,
    RateTrial,
    one_by_one,
    over_rates,
    over_steps,
    rate_text,
    smooth,
)
from mos_jax.reporting.pictures import (
    Bar,
    Point,
    accuracy_against_size,
    difference_bars,
    pareto_front,
    short_number,
)
from mos_jax.reporting.style import arm_styles, png_bytes

POINTS = [
    Point("small", 1e5, 0.40, 0.35, 0.45),
    Point("good", 6e5, 0.60, 0.55, 0.65),
    Point("bad", 6e5, 0.30, 0.20, 0.40, note="2/4 seeds"),
    Point("large", 2.4e6, 0.58, 0.53, 0.63),
]
STYLES = arm_styles([point.arm for point in POINTS])


def line_of(axes, label):
    return next(line for line in axes.lines if line.get_label() == label)


def container_of(axes, label):
    return next(c for c in axes.containers if c.get_label() == label)


def texts(axes):
    return [text.get_text() for text in axes.texts]


def test_pareto_front_has_what_nothing_smaller_beats():
    assert [point.arm for point in pareto_front(POINTS)] == ["small", "good"]


def test_accuracy_against_size_shows_means_intervals_front_and_guess():
    figure = accuracy_against_size(POINTS, STYLES, "size", "accuracy", (0.1, "guessing"))
    (axes,) = figure.axes
    assert axes.get_xscale() == "log"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("size", "accuracy")
    for point in POINTS:
        data, _, (bars,) = container_of(axes, point.arm)
        # Equal sizes stand side by side, a few percent off.
        assert data.get_xdata()[0] == pytest.approx(point.size, rel=0.1)
        assert data.get_ydata()[0] == point.mean
        assert data.get_color() == STYLES[point.arm].colour
        np.testing.assert_allclose(bars.get_segments()[0][:, 1], [point.low, point.high])
    front = line_of(axes, "Pareto front")
    np.testing.assert_allclose(front.get_xdata(), [1e5, 6e5, 2.4e6])
    np.testing.assert_allclose(front.get_ydata(), [0.4, 0.6, 0.6])
    assert {"guessing", "small", "good", "bad, 2/4 seeds", "large"} == set(texts(axes))
    # The front is named, above all that is drawn; the grid does not strike words through.
    legend = axes.get_legend()
    assert [words.get_text()[-14:] for words in legend.get_texts()] == ["(Pareto front)"]
    figure.canvas.draw()
    assert legend.get_window_extent().y0 >= axes.get_window_extent().y1
    (words,) = [text for text in axes.texts if text.get_text() == "guessing"]
    assert words.get_bbox_patch().get_facecolor() == (1, 1, 1, 1)
    low, high = axes.get_ylim()
    assert low < 0.1
    assert high > 0.65


def test_labels_of_arms_of_one_size_neither_overlap_nor_leave_the_picture():
    many = [Point(f"a long name {i}", 6e5, 0.5 + i / 500, 0.4, 0.6) for i in range(10)]
    points = [Point("the smallest arm of all", 3e5, 0.4, 0.3, 0.5), *many]
    styles = arm_styles([point.arm for point in points])
    figure = accuracy_against_size(points, styles, "size", "accuracy")
    figure.canvas.draw()
    boxes = [Text.get_window_extent(text) for text in figure.axes[0].texts]
    width, height = figure.canvas.get_width_height()
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[i + 1 :])
        assert 0 <= box.x0 < box.x1 <= width
        assert 0 <= box.y0 < box.y1 <= height


def test_difference_bars_show_differences_intervals_and_the_margin():
    bars = [Bar("good", 0.1, 0.05, 0.15, "+0.100"), Bar("bad", None, note="not compared")]
    figure = difference_bars(bars, STYLES, "difference to small", margin=0.03)
    (axes,) = figure.axes
    (patch,) = axes.patches
    assert patch.get_width() == pytest.approx(0.1)
    (container,) = [c for c in axes.containers if hasattr(c, "has_xerr")]
    np.testing.assert_allclose(container[2][0].get_segments()[0][:, 0], [0.05, 0.15])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["good", "bad"]
    assert {line.get_xdata()[0] for line in axes.lines if len(set(line.get_xdata())) == 1} >= {
        0,
        -0.03,
    }
    assert {"+0.100", "not compared", "margin"} == set(texts(axes))


def curve(offset=0.0):
    return Curve(np.array([10, 20, 30]), np.array([[1.0, 2, 3], [3.0, 4, 5]]) + offset)


def test_curves_show_the_mean_and_the_seeds_reach():
    panel = Panel("Title", "height", {"good": curve(), "bad": curve(9)}, (1.5, "guessing"))
    figure = over_steps([panel, panel], STYLES)
    assert len(figure.axes) == 2
    axes = figure.axes[0]
    np.testing.assert_allclose(line_of(axes, "good").get_ydata(), [2, 3, 4])
    np.testing.assert_allclose(line_of(axes, "good").get_xdata(), [10, 20, 30])
    band = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == (1, 5)
    assert {"good", "bad", "guessing"} == set(texts(axes))
    assert max(axes.get_xticks()) <= 30


def test_many_arms_have_their_bands_one_by_one():
    names = [f"arm {i}" for i in range(7)]
    styles = arm_styles(names)
    panel = Panel("", "height", {name: curve(i) for i, name in enumerate(names)})
    assert not over_steps([panel], styles).axes[0].collections
    figure = one_by_one(panel, styles)
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title(loc="left") for axes in shown] == names
    for i, axes in enumerate(shown):
        np.testing.assert_allclose(line_of(axes, names[i]).get_ydata(), np.array([2, 3, 4]) + i)
        assert len(axes.collections) == 1


def test_rates_show_runs_means_failures_and_the_choice():
    trials = {
        "good": [RateTrial(1e-3, 0.2), RateTrial(1e-3, 0.4), RateTrial(1e-2, 0.9)],
        "bad": [RateTrial(1e-3, 0.1), RateTrial(1e-2, None)],
    }
    figure = over_rates(trials, {"good": 1e-2, "bad": 1e-3}, STYLES, "accuracy")
    good, bad = figure.axes
    np.testing.assert_allclose(line_of(good, "good").get_ydata(), [0.3, 0.9])
    np.testing.assert_allclose(line_of(good, "chosen").get_xdata(), [1e-2])
    np.testing.assert_allclose(line_of(bad, "chosen").get_ydata(), [0.1])
    assert line_of(bad, "failed").get_xdata() == [1e-2]
    assert not any(line.get_label() == "failed" for line in good.lines)
    assert good.get_xscale() == "log"
    assert [label.get_text() for label in bad.get_xticklabels()] == ["1e-3", "1e-2"]


def test_pictures_become_pngs_that_are_not_empty():
    png = png_bytes(accuracy_against_size(POINTS, STYLES, "size", "accuracy"))
    assert png.startswith(b"\x89PNG")
    assert len(png) > 5000


def test_running_mean():
    np.testing.assert_allclose(smooth(np.array([[1.0, 3, 5, 7]]), 2), [[1, 2, 4, 6]])
    np.testing.assert_allclose(smooth(np.array([1.0, 3, 5]), 9), [1, 2, 3])


@pytest.mark.parametrize(
    ("rate", "text"), [(3e-3, "3e-3"), (1e-4, "1e-4"), (2.5e-5, "2.5e-5"), (0.5, "5e-1")]
)
def test_rates_as_text(rate, text):
    assert rate_text(rate) == text


def test_short_numbers():
    assert [short_number(x) for x in (999, 20_000, 2_442_240)] == ["999", "20k", "2.442M"]
