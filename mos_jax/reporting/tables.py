"""The tables of a report, as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mos_jax.analysis.sharing import Sharing, describe_use
from mos_jax.reporting.curves import rate_text
from mos_jax.reporting.results import Arm, Results
from mos_jax.reporting.scores import Difference, Score

NONE = "-"
# Trained parameters, as shares of the budget, of arms that are said to meet it.
EQUAL = (0.7, 1.05)
UNEQUAL = (
    "**Unequal.** The config names these arms unequal: they cannot meet the budget, so the numbers "
    "say less about the method."
)
OTHER = "**Another budget.** For reference: these arms train more or far fewer parameters."
GROUPS = ("", OTHER, UNEQUAL)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> str:
    """A table; the first `words` columns are set left, the others right.

    Whatever stands in a cell stays in it: bars are escaped and line ends become blanks.
    """
    ruler = ["---" if place < words else "---:" for place in range(len(header))]
    lines = [header, ruler, *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines) + "\n"


def _cell(text: str) -> str:
    return " ".join(str(text).split()).replace("|", "\\|")


def number(value: float | None, digits: int = 3) -> str:
    """With `digits` decimals, or a dash for nothing."""
    return NONE if value is None else f"{value:.{digits}f}"


def whole(value: float | None) -> str:
    """With thousands set apart, or a dash for nothing."""
    return NONE if value is None else f"{round(value):,}"


def signed(value: float | None) -> str:
    """With its sign and three decimals."""
    return NONE if value is None else f"{value:+.3f}"


def interval(low: float, high: float, sign: bool = False) -> str:
    """Both ends."""
    return f"{signed(low)} to {signed(high)}" if sign else f"{low:.3f} to {high:.3f}"


def size_tables(results: Results, scores: Mapping[str, Score]) -> str:
    """What each arm reached and what it costs.

    Where the sweep has a budget, arms that do not meet it stand in tables of their own: those that
    the config names unequal, and those that are larger or much smaller.
    """
    lora, budget = results.lora, results.section.budget_rank
    reference = None if lora is None else lora.median("step_seconds")
    header = [
        "arm", "accuracy", "95% interval", "seeds", "trained parameters", "of the budget", "rank",
        "bytes on disk", "bytes per tenant",
        f"step time / {lora.name}" if lora is not None else "step seconds",
        "peak temporary bytes",
    ]  # fmt: skip
    if not budget:
        header.remove("of the budget")
    groups: dict[str, list[Arm]] = {words: [] for words in GROUPS}
    for arm in results.arms:
        groups[_group(arm, bool(budget))].append(arm)
    parts = []
    for words, arms in groups.items():
        rows = [_size_row(arm, scores.get(arm.name), reference, bool(budget)) for arm in arms]
        if rows:
            parts += [f"{words}\n"] if words else []
            parts.append(markdown_table(header, rows))
    return "\n".join(parts)


def _group(arm: Arm, with_budget: bool) -> str:
    """The words above the table that the arm belongs to."""
    ratio = arm.fact("budget_ratio")
    if arm.unequal:
        return UNEQUAL
    if not with_budget or ratio is None or EQUAL[0] <= ratio <= EQUAL[1]:
        return ""
    return OTHER


def _size_row(
    arm: Arm, score: Score | None, reference: float | None, with_budget: bool
) -> list[str]:
    seconds = arm.median("step_seconds")
    if reference and seconds is not None:
        seconds /= reference
    row = [
        arm.name,
        number(score.mean if score else None),
        interval(score.low, score.high) if score else NONE,
        arm.seeds,
        whole(arm.fact("trained_parameters")),
        number(arm.fact("budget_ratio")),
        whole(arm.fact("rank")),
        whole(arm.fact("adapter_bytes")),
        whole(arm.fact("served_bytes")),
        number(seconds, 2),
        whole(arm.fact("temp_bytes")),
    ]
    if not with_budget:
        del row[5]
    return row


def difference_table(found: Sequence[Difference], with_margin: bool) -> str:
    """Differences to one baseline, with the verdicts."""
    header = ["arm", "verdict", "difference", "95% interval", "p, corrected", "paired seeds"]
    rows = []
    for one in found:
        seen = one.mean is not None
        row = [
            one.arm,
            one.verdict,
            signed(one.mean),
            interval(one.low, one.high, sign=True) if seen else NONE,
            NONE if one.p is None else ("< 0.001" if one.p < 0.001 else number(one.p)),
            str(one.pairs),
        ]
        if with_margin:
            row.insert(2, one.non_inferior or NONE)
        rows.append(row)
    if with_margin:
        header.insert(2, "non-inferiority")
    return markdown_table(header, rows, words=3 if with_margin else 2)


def rate_table(results: Results) -> str:
    """What every learning rate reached on validation data, and which one was taken."""
    rows = []
    for arm in results.arms:
        for rate in arm.learning_rates:
            runs = [record for record in arm.tuning if record["learning_rate"] == rate]
            done = [record for record in runs if record["status"] == "finished"]
            means = [
                number(sum(record[name] for record in done) / len(done) if done else None, digits)
                for name, digits in (("validation_loss", 4), ("validation_accuracy", 3))
            ]
            taken = "taken" if done and rate == arm.learning_rate else ""
            if len(arm.learning_rates) == 1:
                taken = "the only one"
            rows.append([arm.name, rate_text(rate), *means, f"{len(done)} of {len(runs)}", taken])
    header = ["arm", "learning rate", "validation loss", "validation accuracy", "runs", ""]
    return markdown_table(header, rows)


def lacking_table(results: Results) -> str:
    """The runs that failed or were never finished."""
    rows = []
    for record in results.lacking:
        rows.append(
            [
                record["arm"],
                record["stage"],
                str(record["seed"]),
                rate_text(record["learning_rate"]),
                record["status"],
                plain_error(results, record["error"] or ""),
            ]
        )
    header = ["arm", "stage", "seed", "learning rate", "status", "error"]
    return markdown_table(header, rows, words=6)


def plain_error(results: Results, text: str) -> str:
    """An error's first words, without the paths of one machine, set so that it is not markup."""
    for folder in results.folders:
        text = text.replace(str(folder.resolve()), folder.resolve().name)
    text = " ".join(text.split()).replace("`", "'")
    short = text if len(text) <= 200 else text[:197] + "..."
    return f"`{short}`" if short else ""


def use_table(sharing: Sharing) -> str:
    """How many layers read the shards of each pool, and how their gradients agree."""
    rows = []
    for path, counts in sharing.counts.items():
        use, pull = describe_use(counts), sharing.pulls[path]
        figures = pull.to_dict()
        rows.append(
            [
                path,
                str(use["shards"]),
                str(use["idle"]),
                str(use["private"]),
                number(use["mean_layers"], 1),
                str(use["most_layers"]),
                number(figures["mean_cosine"]),
                number(figures["agreement"]),
                number(figures["agreement_if_orthogonal"]),
            ]
        )
    header = [
        "pool", "shards", "read by none", "by one layer", "layers a shard, mean", "most",
        "mean cosine", "agreement", "if at right angles",
    ]  # fmt: skip
    return markdown_table(header, rows)
