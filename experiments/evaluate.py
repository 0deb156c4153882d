r"""Evaluates a trained adapter and its base on held-out questions.

python experiments/evaluate.py --adapter=runs/q/adapter
python experiments/evaluate.py --adapter=runs/q/adapter --task=leg_counting --split=validation

Without --task it is the task, and the very test set, that the adapter was trained for. Prints exact
match with its 95% interval and the loss, of the base, of the adapter and of the commonest answer,
and some questions with both answers. An answer is right when all of it is, its end included; tasks
of reasoning-gym that have a scorer of their own are judged by that, on generated answers.

--out has all of it as JSON, and the score of every question. Nothing else is written. The 256
questions of the quickstart take about a minute on 2 CPU cores.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from mos_jax import app

ADAPTER = flags.DEFINE_string("adapter", None, "Folder of the adapter.")
BASE = flags.DEFINE_string("base", None, "Name or path of the base; default: the one trained on.")
DTYPE = flags.DEFINE_string("dtype", "float32", "float32 or bfloat16.")
QUANTIZE = flags.DEFINE_enum(
    "quantize", "as_trained", ["as_trained", "none", "int8", "nf4"], "How to hold the base."
)
TASK = flags.DEFINE_string("task", None, "Another task, by name.")
SPLIT = flags.DEFINE_enum("split", "test", ["train", "validation", "test"], "Which set.")
EXAMPLES = flags.DEFINE_integer("examples", None, "How many questions; default: as trained, 256.")
MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 32, "Longest generated answer.")
OUT = flags.DEFINE_string("out", None, "Also write the result to this JSON file.")


def main(_: Sequence[str]) -> None:
    # Imported here so that --help and mistyped flags answer at once.
    from rich.console import Console

    from mos_jax.evaluation.compare import compare, print_comparison, print_samples
    from mos_jax.finished import load_finished

    finished = load_finished(ADAPTER.value, BASE.value, DTYPE.value, QUANTIZE.value)
    data = finished.data(TASK.value, SPLIT.value, EXAMPLES.value)
    result = compare(finished.base, finished.factors, data, SPLIT.value, MAX_NEW_TOKENS.value)
    console = Console()
    if finished.note:
        console.print(finished.note, highlight=False, markup=False)
    print_comparison(result, finished.method, console)
    print_samples(result, console)
    if OUT.value:
        Path(OUT.value).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    app.run(main)
