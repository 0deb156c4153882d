"""Which pictures a report has, from its results."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from mos_jax.analysis.sharing import Sharing
from mos_jax.reporting.curves import BANDS, Curve, Panel, one_by_one, over_rates, over_steps, smooth
from mos_jax.reporting.pictures import Bar, Point, accuracy_against_size, difference_bars
from mos_jax.reporting.results import Results
from mos_jax.reporting.scores import Difference, Score
from mos_jax.reporting.sharing_pictures import gradient_map, usage_map
from mos_jax.reporting.style import ArmStyle, arm_styles, png_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The training loss of single batches jumps about: a running mean over this share of the steps.
SMOOTHED_SHARE = 0.04
# Bits may change by so much over the last quarter of the steps and still be called flat.
FLAT = 0.02


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture of the report.

    Attributes:
      name: of its file, without ".png"; what stands before the first "-" is its part of the report.
      caption: what it shows and how to read it.
      figure: the picture.
    """

    name: str
    caption: str
    figure: Figure

    @property
    def file(self) -> str:
        """Name of its file."""
        return f"{self.name}.png"

    @property
    def part(self) -> str:
        """Part of the report that it belongs to."""
        return self.name.partition("-")[0]

    def png(self) -> bytes:
        """The file's content."""
        return png_bytes(self.figure)

    def markdown(self) -> str:
        """The picture with its caption below."""
        words = self.caption.split(". ")[0].rstrip(".").replace("[", "(").replace("]", ")")
        return f"![{words}]({self.file})\n\n*{self.caption}*\n"


def draw_pictures(
    results: Results,
    scores: Mapping[str, Score],
    differences: Mapping[str, Sequence[Difference]],
    sharing: Sharing | None,
) -> list[Picture]:
    """Every picture that there are numbers for, in the order of the report."""
    styles = arm_styles([arm.name for arm in results.arms])
    found = [
        *_sizes(results, scores, styles),
        *_differences(results, differences, styles),
        *_rates(results, styles),
        *_curves(results, styles),
        *_memory(results, styles),
    ]
    if sharing is not None:
        found += [
            Picture(
                "sharing-usage",
                "Which layers read which shards. One column is a layer, one row a shard, white is "
                "not read. Public shards come first; private ones, which one layer reads, form the "
                "staircase below them.",
                usage_map(sharing),
            ),
            Picture(
                "sharing-gradients",
                "The shared pools' gradient, taken apart by layer. Left: its norm. Right: the "
                "cosine between the gradients of two layers on the shards that both read; blue is "
                "pulling together, red apart, grey no shard in common.",
                gradient_map(sharing),
            ),
        ]
    return found


def accuracy_name(results: Results) -> str:
    """What the score is called."""
    return "share of pairs recalled" if results.is_memory else "test accuracy"


def _sizes(
    results: Results, scores: Mapping[str, Score], styles: Mapping[str, ArmStyle]
) -> Iterator[Picture]:
    for field, label in (
        ("trained_parameters", "trained parameters"),
        ("served_bytes", "bytes that one tenant adds to a server (fp32)"),
    ):
        points = []
        for arm in results.arms:
            size, score = arm.fact(field), scores.get(arm.name)
            if score is None or not size:
                continue
            notes = ["unequal"] if arm.unequal else []
            lacks = score.seeds < score.planned
            notes += [f"{score.seeds}/{score.planned} seeds"] if lacks else []
            points.append(
                Point(arm.name, size, score.mean, score.low, score.high, ", ".join(notes))
            )
        if points:
            yield Picture(
                f"accuracy-{field}",
                f"{accuracy_name(results).capitalize()} against {label}. Bars are 95% intervals "
                "over seeds and items; the grey step joins the arms that no other beats at their "
                "size or below (by their means alone). Arms of equal size stand side by side.",
                accuracy_against_size(points, styles, label, accuracy_name(results), results.guess),
            )


def _differences(
    results: Results,
    differences: Mapping[str, Sequence[Difference]],
    styles: Mapping[str, ArmStyle],
) -> Iterator[Picture]:
    for place, (baseline, found) in enumerate(differences.items()):
        if all(one.mean is None for one in found):
            continue
        bars = [
            Bar(one.arm, one.mean, one.low, one.high, f"{one.mean:+.3f}")
            if one.mean is not None
            else Bar(one.arm, None, note="not compared")
            for one in found
        ]
        label = f"{accuracy_name(results)}: difference to {baseline}"
        yield Picture(
            f"differences-{place + 1}",
            f"Difference of each arm to {baseline}, paired by seed and item, with its 95% "
            "interval. An interval across 0 shows no difference at this size; one beside 0 may do "
            "so by luck, which the verdicts correct for and the intervals do not."
            + (" The dashed line is the margin of non-inferiority." if _margin(results) else ""),
            difference_bars(bars, styles, label, _margin(results)),
        )


def _margin(results: Results) -> float | None:
    return results.section.margin or None


def _rates(results: Results, styles: Mapping[str, ArmStyle]) -> Iterator[Picture]:
    tuned = [arm for arm in results.arms if len(arm.learning_rates) > 1]
    chosen = {arm.name: arm.learning_rate for arm in tuned}
    for metric, label in (
        ("validation_accuracy", "validation accuracy"),
        ("validation_loss", "validation loss (nats)"),
    ):
        trials = {arm.name: arm.trials(metric) for arm in tuned}
        trials = {name: runs for name, runs in trials.items() if runs}
        if any(trial.value is not None for runs in trials.values() for trial in runs):
            yield Picture(
                f"rates-{metric}",
                f"{label.capitalize()} of the tuning runs against the learning rate, each arm "
                "before the others in grey. The ring is the rate taken, chosen by the validation "
                f"{results.section.tuning_metric}; a cross is a run that failed.",
                over_rates(trials, chosen, styles, label),
            )


def _curves(results: Results, styles: Mapping[str, ArmStyle]) -> Iterator[Picture]:
    panels = []
    crowded = len(results.arms) > BANDS
    accuracy = _by_arm(results, "validation_accuracy")
    if all(len(curve.steps) == 1 for curve in accuracy.values()):
        # Evaluated at the end alone, which is no curve.
        accuracy = {}
    if accuracy:
        panels.append(Panel("Validation", "accuracy", accuracy, results.guess))
    losses = _by_arm(results, "loss")
    if losses:
        longest = max(len(curve.steps) for curve in losses.values())
        width = max(1, round(SMOOTHED_SHARE * longest))
        smoothed = {
            name: Curve(curve.steps, smooth(curve.values, width)) for name, curve in losses.items()
        }
        running = f", running mean over {width} steps" if width > 1 else ""
        panels.append(Panel("Training", f"loss (nats{running})", smoothed))
    if panels:
        yield Picture(
            "curves-steps",
            "Learning curves of the reported runs: means over seeds"
            + ("." if crowded else ", with bands from the lowest to the highest seed."),
            over_steps(panels, styles),
        )
    if crowded and panels:
        yield Picture(
            "curves-each",
            f"{panels[0].title} {panels[0].y_label} of each arm before the others in grey: mean "
            "over seeds, and a band from the lowest to the highest seed.",
            one_by_one(panels[0], styles),
        )


def _by_arm(results: Results, metric: str) -> dict[str, Curve]:
    curves = {arm.name: arm.curve(metric) for arm in results.arms}
    return {name: curve for name, curve in curves.items() if curve is not None}


def memory_curves(results: Results) -> tuple[dict[str, Curve], dict[str, Curve]]:
    """Of the memory probe: pairs recalled, and bits per trained parameter, over steps, by arm."""
    recalled = _by_arm(results, "validation_pairs_recalled")
    bits = {
        name: Curve(curve.steps, curve.values / results.arm(name).fact("trained_parameters"))
        for name, curve in _by_arm(results, "validation_bits_recalled").items()
    }
    return recalled, bits


def change_at_end(curve: Curve) -> float | None:
    """Relative change of the mean over the last quarter of the steps; None if not evaluated there.

    A curve that is `FLAT` there has levelled off, as far as its steps can tell.
    """
    start = curve.steps[-1] * 0.75
    earlier = np.flatnonzero(curve.steps <= start)
    if not len(earlier) or curve.mean[-1] <= 0:
        return None
    return float(curve.mean[-1] / max(curve.mean[earlier[-1]], 1e-12) - 1)


def _memory(results: Results, styles: Mapping[str, ArmStyle]) -> Iterator[Picture]:
    if not results.is_memory:
        return
    recalled, bits = memory_curves(results)
    panels = []
    if recalled:
        panels.append(Panel("Recall", "pairs recalled", recalled, from_zero=True))
    if bits:
        panels.append(Panel("Bits", "bits recalled per trained parameter", bits, from_zero=True))
    if panels:
        yield Picture(
            "memory-steps",
            "The memory probe: pairs whose value is the model's greedy answer, and bits of the "
            "values that the adapter holds, over its trained parameters. Mean over seeds, band "
            "from the lowest to the highest. The height is a capacity only where a curve is flat; "
            "before that it tells how fast a method learns.",
            over_steps(panels, styles),
        )
