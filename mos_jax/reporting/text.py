"""The words of a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mos_jax.analysis.sharing import KINDS, Sharing
from mos_jax.reporting.curves import rate_text
from mos_jax.reporting.results import Results
from mos_jax.reporting.scores import LEAST_PAIRS, Difference, Score
from mos_jax.reporting.tables import lacking_table, number, whole

HELD_OUT = "The test set was used once, after everything was chosen."
RECALL = (
    "All sets of the memory probe are its training set, so rates were chosen on these pairs too, "
    "with other seeds."
)
HOW_TO_READ = """\
- **Accuracy** is the mean score on the test set, over items and over the seeds that finished.
  {test_set}
- **95% interval** carries the spread between seeds and between items: another set of seeds and
  another set of items of the same kind would be expected to land there. Overlapping intervals of
  two arms do not say that the arms are alike; the paired differences do, because all arms answer
  the same items.
- **p, corrected** is Holm's, over the arms compared with one baseline: with many arms, some would
  differ from it by luck alone. Several baselines are not corrected for. Verdicts follow it (better
  or worse where it is below 0.05); the intervals are not corrected, so one may exclude 0 where the
  verdict sees no difference.
- **Would have seen one of d**: a true difference of d would have been found in 8 of 10 such sweeps.
- **Of the budget** is trained parameters divided by those of LoRA of rank {budget_rank}; the first
  table has the arms from 0.7 to 1.05.
- **Bytes on disk** is the adapter's folder: arrays, tables and card. **Bytes per tenant** is what
  one more adapter of the same configuration adds to a server in fp32.
- **Step time** is the median over steps, then over runs. It holds for the machine the runs were on
  and for what else ran there; differences of a few percent mean nothing.
- **Peak temporary bytes** is what the compiled training step needs beside its inputs and outputs.
- An arm that lacks seeds is marked "n of m"; its numbers are from the n alone."""


def how_to_read(results: Results) -> str:
    """What the columns and pictures mean."""
    budget = results.section.budget_rank
    text = HOW_TO_READ.replace("{budget_rank}", str(budget))
    text = text.replace("{test_set}", RECALL if results.is_memory else HELD_OUT)
    lines = text.split("\n- ")
    return "\n- ".join(line for line in lines if budget or not line.startswith("**Of the budget"))


def plural(count: int, word: str) -> str:
    """The count with its word, as in 1 run and 2 runs."""
    return f"{count:,} {word}" if count == 1 else f"{count:,} {word}s"


def listed(words: Sequence[Any]) -> str:
    """The words with commas, and "and" before the last."""
    texts = [str(word) for word in words]
    return " and ".join([", ".join(texts[:-1]), texts[-1]] if len(texts) > 1 else texts)


def opening(results: Results) -> str:
    """What this report is, for someone who was not there."""
    count = len(results.arms)
    measure = (
        "how many of its random pairs a finished adapter recalls"
        if results.is_memory
        else "the accuracy on test questions that were used once, at the end"
    )
    if scored_in_parts(results):
        measure += " (the mean mark of the task's own scorer, which gives parts of a mark too)"
    rates = any(len(arm.learning_rates) > 1 for arm in results.arms)
    return (
        f"{plural(count, 'arm')}, each one way of fine-tuning the frozen base "
        f"{listed(results.common('base'))} for {listed(results.common('task'))}, "
        + ("each at the learning rate that suited it best, " if rates else "")
        + f"repeated with {plural(results.section.seeds, 'seed')}. Compared is {measure}. What the "
        "columns mean stands at the end.\n"
    )


def scored_in_parts(results: Results) -> bool:
    """Whether the task's own scorer judges, so that scores are not exact match."""
    return (results.fact("data_report") or {}).get("scoring") == "scorer"


def what_was_run(results: Results) -> str:
    """Base, task, steps, seeds, rates, hours and versions."""
    records = results.records
    done = [record for record in records if record["status"] == "finished"]
    section, data = results.section, results.fact("data_report") or {}
    config = records[0]["config"]
    hours = sum(record["total_seconds"] or 0 for record in done) / 3600
    items = len(next((r["test_scores"] for r in done if r["test_scores"] is not None), ()))
    rates = sorted({rate for arm in results.arms for rate in arm.learning_rates})
    lines = [
        f"- Base: {listed(results.common('base'))}, {config['base.dtype']}, frozen. "
        f"Adapted: {config['sites.include']}.",
        f"- Task: {listed(results.common('task'))}, {whole(data.get('train_examples'))} training, "
        f"{whole(data.get('validation_examples'))} validation and {whole(items or None)} test "
        "items.",
        f"- Training: {listed(results.common('steps'))} steps with "
        f"{number(data.get('examples_per_batch'), 1)} examples a batch on average, "
        f"{config['training.schedule']} schedule.",
        f"- Learning rates: {listed([rate_text(rate) for rate in rates])}"
        + (
            f", chosen for each arm by the validation {section.tuning_metric} of "
            f"{plural(section.tuning_seeds, 'run')} at each rate, on seeds that are not reported."
            if len(rates) > 1
            else "."
        ),
        f"- Seeds: {section.seeds} for each arm. A seed decides initialisation, order of the data, "
        "dropout and, for routed methods, the tables.",
        f"- Runs: {len(done):,} of {len(records):,} finished, {hours:.1f} hours together; of a run "
        "that was interrupted, the time since it went on.",
    ]
    if results.is_memory:
        lines.insert(
            2,
            f"- The probe: {whole(data.get('pairs'))} random pairs of "
            f"{number(data.get('bits_per_pair'), 1)} bits each. All sets are the training set, on "
            "purpose: this measures what was memorised.",
        )
    elif results.guess is not None:
        lines.insert(2, f"- Always giving the commonest answer would reach {results.guess[0]:.3f}.")
    versions = results.fact("versions")
    if versions:
        lines.append("- Versions: " + ", ".join(f"{k} {v}" for k, v in versions.items()) + ".")
    return "\n".join(lines) + "\n"


def in_words(results: Results, baseline: str, found: Sequence[Difference]) -> str:
    """One line for each arm: what can be said of it against the baseline."""
    if not found:
        return "There is no other arm to compare.\n"
    lines = []
    if baseline not in results.planned:
        lines += [
            f"The config plans the comparison with {listed(results.planned)}; this one was asked "
            "for when the report was written.",
            "",
        ]
    for one in found:
        words = f"- **{one.arm}**: {one.verdict}"
        if one.non_inferior:
            words += f"; {one.non_inferior}"
        if one.mean is not None:
            words += f". Difference {one.mean:+.3f} ({one.low:+.3f} to {one.high:+.3f})"
        lines.append(words + ".")
    return "\n".join(lines) + "\n"


def what_is_missing(results: Results) -> str:
    """Missing and failed runs, and what follows for the arms."""
    if not results.lacking:
        return "Nothing: every run of the sweep is finished.\n"
    failed = sum(record["status"] == "failed" for record in results.lacking)
    missing = len(results.lacking) - failed
    short = [arm for arm in results.arms if len(arm.scores) < len(arm.final)]
    words = [f"{plural(failed, 'run')} failed and {plural(missing, 'run')} never finished."]
    if short:
        words.append(
            "Computed from the seeds that are there, never filled in: "
            + listed([f"{arm.name} ({arm.seeds} seeds)" for arm in short])
            + f". An arm is compared with a baseline only where at least {LEAST_PAIRS} seeds pair."
        )
    return "\n\n".join([" ".join(words), lacking_table(results)])


def about_scores(scores: Mapping[str, Score]) -> str:
    """What must be said before the table of sizes."""
    lone = [name for name, score in scores.items() if score.over_items_only]
    words = ["Intervals are over seeds and items."] if len(lone) < len(scores) else []
    if lone:
        words.append(
            f"With one seed the interval of {listed(lone)} is over items alone and says nothing of "
            "the spread between seeds."
        )
    return " ".join(words) + "\n"


def about_sharing(sharing: Sharing, arm: str, seed: int) -> str:
    """What was computed of the pools' gradients, and what it shows."""
    lines = [
        f"From the finished adapter of **{arm}**, seed {seed}, and {sharing.targets:,} target "
        f"tokens of its training set (loss {sharing.loss:.4f}). The gradient of the mean loss with "
        "respect to the assembled A and B is taken once; the part of each layer is then sent back "
        "through the assembly alone, so the parts sum to the gradient of the pool. The cosine of "
        "two layers is taken over the shards that both read; private shards, read by one layer, "
        "enter no cosine. Agreement is the norm of the sum of the layers' gradients over the sum "
        "of their norms, on shared shards: 1 when all pull alike, 0 when they cancel.",
        "",
    ]
    for kind in KINDS:
        lines.append("- " + pull_in_words(sharing, kind))
    return "\n".join(lines) + "\n"


def pull_in_words(sharing: Sharing, kind: str) -> str:
    """Whether layers pull the shards of A or of B apart."""
    name, figures = kind[-1].upper(), sharing.pulls[kind].to_dict()
    if not figures["pairs"] or figures["mean_cosine"] is None:
        return f"Pools of {name}: no two layers share a shard with a gradient."
    together = sharing.pulls[kind].agreement / sharing.pulls[kind].orthogonal
    if together > 1.1:
        words = "layers pull shared shards more together than chance would"
    elif together < 0.9:
        words = "layers pull shared shards apart: their gradients cancel more than chance would"
    else:
        words = "layers pull shared shards about at right angles: neither together nor apart"
    return (
        f"Pools of {name}: {words}. Mean cosine {figures['mean_cosine']:+.3f} over "
        f"{plural(len(sharing.pulls[kind].pairs()), 'pair')} of layers, "
        f"{figures['share_below_0']:.0%} of them below 0; "
        f"agreement {figures['agreement']:.3f}, at right angles it would be "
        f"{figures['agreement_if_orthogonal']:.3f}."
    )
