r"""Answers a prompt with a trained adapter, beside its base when asked.

python experiments/generate.py --adapter=runs/q/adapter --prompt="Who is my mother's mother?"
python experiments/generate.py --adapter=runs/q/adapter --prompt="..." --compare
python experiments/generate.py --base=smollm2-135m-instruct --prompt="..." --temperature=0.8
"""

import sys
from collections.abc import Sequence

from absl import flags

from mos_jax import app

ADAPTER = flags.DEFINE_string("adapter", None, "Folder of the adapter; none = the base alone.")
BASE = flags.DEFINE_string("base", None, "Name or path of the base; default: the one trained on.")
DTYPE = flags.DEFINE_string("dtype", "float32", "float32 or bfloat16.")
QUANTIZE = flags.DEFINE_enum(
    "quantize", "as_trained", ["as_trained", "none", "int8", "nf4"], "How to hold the base."
)
PROMPT = flags.DEFINE_multi_string("prompt", None, "The user's turn; give it again for more.")
SYSTEM = flags.DEFINE_string("system", None, "A system turn before it.")
RAW = flags.DEFINE_bool("raw", False, "Continue the prompt as it stands, without chat template.")
COMPARE = flags.DEFINE_bool("compare", False, "Show the base's answer too.")
MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 128, "Longest answer, in tokens.")
TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 is greedy.")
TOP_P = flags.DEFINE_float("top_p", 1.0, "Sample from the likeliest tokens up to this mass.")
SEED = flags.DEFINE_integer("seed", 0, "Of the sampling.")


def main(_: Sequence[str]) -> None:
    # Imported here so that --help and mistyped flags answer at once.
    from mos_jax.data import prompt_text
    from mos_jax.errors import InputError
    from mos_jax.finished import load_finished
    from mos_jax.models.generation import Sampling, generate

    if not PROMPT.value:
        raise InputError('--prompt is missing; for example --prompt="Hello"')
    sampling = Sampling.create(MAX_NEW_TOKENS.value, TEMPERATURE.value, TOP_P.value, SEED.value)
    finished = load_finished(ADAPTER.value, BASE.value, DTYPE.value, QUANTIZE.value)
    if finished.note:
        print(finished.note, file=sys.stderr)
    tokenizer, model = finished.base.tokenizer, finished.base.model
    if RAW.value:
        start = tokenizer.text_start
        texts = [text if text.startswith(start) else start + text for text in PROMPT.value]
    else:
        system = [{"role": "system", "content": SYSTEM.value}] if SYSTEM.value else []
        texts = [
            prompt_text([*system, {"role": "user", "content": text}], tokenizer)
            for text in PROMPT.value
        ]
    prompts = [tokenizer.encode(text) for text in texts]
    answers = {}
    if COMPARE.value or finished.factors is None:
        answers["base"] = generate(model, prompts, [tokenizer.end_of_turn], sampling)
    if finished.factors is not None:
        answers[finished.method] = generate(
            model, prompts, [tokenizer.end_of_turn], sampling, finished.factors
        )
    for row in range(len(prompts)):
        for name, rows in answers.items():
            label = f"[{name}] " if len(answers) > 1 else ""
            print(f"{label}{tokenizer.decode(rows[row])}")


if __name__ == "__main__":
    app.run(main)
