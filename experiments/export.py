r"""Hands a trained adapter to another world, exactly.

python experiments/export.py --adapter=runs/q/adapter --format=peft --out=runs/q/peft

Format peft: a LoRA folder with the adapter's own factors (no approximation), as Hugging Face PEFT
loads it. What was written is read back and the largest difference of logits is reported.
"""

from collections.abc import Sequence

from absl import flags

from mos_jax import app

ADAPTER = flags.DEFINE_string("adapter", None, "Folder of the adapter.")
BASE = flags.DEFINE_string("base", None, "Name or path of the base; default: the one trained on.")
FORMAT = flags.DEFINE_enum("format", "peft", ["peft"], "What to write.")
OUT = flags.DEFINE_string("out", None, "Folder to write; must not exist.")
OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace what stands at --out.")


def main(_: Sequence[str]) -> None:
    # Imported here so that --help and mistyped flags answer at once.
    from mos_jax.errors import InputError
    from mos_jax.finished import load_finished

    if not OUT.value:
        raise InputError("--out is missing; for example --out=runs/q/peft")
    finished = load_finished(ADAPTER.value, BASE.value)
    exported = finished.export_peft(OUT.value, OVERWRITE.value)
    print(
        f"wrote {OUT.value}: LoRA of rank {exported.rank}, {exported.bytes:,} bytes; read back, "
        f"the largest difference of logits is {exported.difference:.2g} over {exported.tokens} "
        "tokens"
    )


if __name__ == "__main__":
    app.run(main)
