r"""Answers a prompt with trained adapters, beside their base when asked, in one batch.

python experiments/generate.py --adapter=runs/q/adapter --prompt="Who is my mother's mother?"
python experiments/generate.py --adapter=runs/q/adapter --prompt="..." --compare
python experiments/generate.py --adapter=mos=runs/a/adapter --adapter=lora=runs/b/peft --prompt=...
python experiments/generate.py --base=smollm2-135m-instruct --prompt="..." --temperature=0.8
"""

import sys
from collections.abc import Sequence

from absl import flags

from mos_jax import app

ADAPTER = flags.DEFINE_multi_string(
    "adapter",
    None,
    "Folder of an adapter, ours or PEFT's, or NAME=FOLDER; give it again for more, one row each. "
    "None = the base alone.",
)
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
    from mos_jax.adapters.bank import BASE_NAME
    from mos_jax.errors import InputError
    from mos_jax.models.generation import Sampling
    from mos_jax.several import load_several

    if not PROMPT.value:
        raise InputError('--prompt is missing; for example --prompt="Hello"')
    sampling = Sampling.create(MAX_NEW_TOKENS.value, TEMPERATURE.value, TOP_P.value, SEED.value)
    several = load_several(ADAPTER.value or [], BASE.value, DTYPE.value, QUANTIZE.value)
    for note in several.notes:
        print(note, file=sys.stderr)
    names = list(several.factors)
    if COMPARE.value or not names:
        names = [BASE_NAME, *names]
    answers = several.ask(
        PROMPT.value, names, system=SYSTEM.value or None, raw=RAW.value, sampling=sampling
    )
    for by_name in answers:
        for name, answer in by_name.items():
            label = f"[{'base' if name == BASE_NAME else name}] " if len(names) > 1 else ""
            print(f"{label}{answer}")


if __name__ == "__main__":
    app.run(main)
