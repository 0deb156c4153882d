"""An adapter beside its untouched base on the same questions."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from mos_jax.adapters.low_rank import Factors
from mos_jax.data.examples import commonest_answer
from mos_jax.data.load import Data
from mos_jax.evaluation.answers import Evaluation, evaluate, generate_answers
from mos_jax.models.base import Base

SAMPLES = 3


def compare(
    base: Base,
    factors: Factors | None,
    data: Data,
    split: str,
    max_new_tokens: int,
    *,
    found: Evaluation | None = None,
    with_base: bool = True,
) -> dict[str, Any]:
    """Evaluates base and adapter on a split.

    Args:
      base: the base.
      factors: of the adapter; None evaluates the base alone.
      data: the task, tokenised for this base.
      split: "train", "validation" or "test".
      max_new_tokens: longest generated answer.
      found: what `evaluate` found for these factors, where that is known already.
      with_base: evaluate the base too, and generate the samples.

    Returns:
      JSON values: `task`, `split`; `base` and `adapter`, each `Evaluation.to_dict()`; the
      commonest answer and its rate, what guessing would reach; and three questions as `samples`,
      with the right answer and those generated `before` and `after`.
    """
    everything = getattr(data, split)
    answer, rate = commonest_answer(everything)
    result: dict[str, Any] = {
        "task": data.task.name,
        "split": split,
        "commonest_answer": answer,
        "commonest_answer_rate": rate,
    }
    if factors is not None:
        found = found or evaluate(base, factors, data, split, max_new_tokens)
        result["adapter"] = found.to_dict()
    if not with_base:
        return result
    result["base"] = evaluate(base, None, data, split, max_new_tokens).to_dict()
    examples = everything[:SAMPLES]
    before = generate_answers(base, None, examples, max_new_tokens)
    result["samples"] = [
        {"question": e.question, "right": e.answer, "before": b}
        for e, b in zip(examples, before, strict=True)
    ]
    if factors is not None:
        after = generate_answers(base, factors, examples, max_new_tokens)
        for sample, text in zip(result["samples"], after, strict=True):
            sample["after"] = text
    return result


def print_comparison(result: dict[str, Any], method: str, console: Console) -> None:
    """Prints what `compare` returned: scores and loss; `print_samples` has the answers."""
    rows = {"base": result["base"]} if "base" in result else {}
    if "adapter" in result:
        rows[f"base + {method}"] = result["adapter"]
    count = next(iter(rows.values()))["examples"]
    table = Table(
        "",
        "exact match",
        "95% interval",
        "loss",
        title=f"{result['task']}: {count} questions of the {result['split']} set",
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for name, found in rows.items():
        interval = f"{found['accuracy_low']:.3f} to {found['accuracy_high']:.3f}"
        table.add_row(name, f"{found['accuracy']:.3f}", interval, f"{found['loss']:.4f}")
    table.add_row(
        f"always {result['commonest_answer']!r}", f"{result['commonest_answer_rate']:.3f}", "", ""
    )
    console.print(table)
    for name, found in rows.items():
        if "bits_recalled" in found:
            console.print(
                f"{name} recalls {found['pairs_recalled']:,} pairs, {found['bits_recalled']:,.0f} "
                f"of {found['bits_prior']:,.0f} bits.",
                highlight=False,
            )


def print_samples(result: dict[str, Any], console: Console) -> None:
    """Prints the sample questions with the answers before and after."""
    for sample in result.get("samples", ()):
        console.print(f"\nQ: {sample['question']}", highlight=False, markup=False)
        for label in ("right", "before", "after"):
            if label in sample:
                console.print(f"   {label:7}{sample[label]!r}", highlight=False, markup=False)
