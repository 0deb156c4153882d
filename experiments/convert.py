r"""Turns an adapter or a model into another format, exactly, and says how exactly.

  python experiments/convert.py --in=runs/q/adapter --out=runs/q/peft   --format=peft
  python experiments/convert.py --in=runs/q/adapter --out=runs/q/merged --format=merged
  python experiments/convert.py --in=runs/q/adapter --out=runs/q/a.gguf --format=gguf
  python experiments/convert.py --in=peft_folder --out=mine --format=mos_jax --base=model_folder
  python experiments/convert.py --in=model.gguf --out=model_folder --format=merged

What --in is, is found out: an adapter of mos_jax, of PEFT (LoRA, VeRA, VB-LoRA, Uni-LoRA) or of
llama.cpp (GGUF), or a base alone: a GGUF model, a Hugging Face folder, or a known name.

Formats:

  peft         a LoRA folder that Hugging Face PEFT loads, of any method: its own factors, no SVD.
               vLLM wants one rank and one alpha: --pad_rank=16.
  peft-native  a PEFT folder of the method's own type, where PEFT has it: LoRA, VeRA, VB-LoRA,
               Uni-LoRA. Small, and PEFT can train on.
  mos_jax      an adapter that --adapter of the other programs takes, and that train.py trains on
               (--config.training.start=FOLDER).
  gguf         an adapter file for llama.cpp (--lora), beside a GGUF of the same base.
  merged       a Hugging Face model folder with the adapter in its weights, for transformers, vLLM
               and all that reads such folders. Of a base alone: that base as a folder.

What was written is read back, and the largest difference of logits to the input is reported.
Nothing is replaced without --overwrite, and a run that fails leaves nothing behind. --dry_run shows
what was found and what would be written.
"""

from collections.abc import Sequence

from absl import flags

from mos_jax import app

IN = flags.DEFINE_string("in", None, "Adapter or base: a folder, a file, or a base's name.")
OUT = flags.DEFINE_string("out", None, "Folder to write; a file for --format=gguf.")
FORMAT = flags.DEFINE_string("format", None, "peft, peft-native, mos_jax, gguf or merged.")
BASE = flags.DEFINE_string("base", None, "The adapter's base; default: the one that it names.")
QUANTIZE = flags.DEFINE_enum(
    "quantize", "as_trained", ["as_trained", "none", "int8", "nf4"], "How to hold the base."
)
DTYPE = flags.DEFINE_string(
    "dtype", None, "Of a merged model: float32 (default), bfloat16 or float16."
)
MAX_SHARD_BYTES = flags.DEFINE_integer(
    "max_shard_bytes", 5_000_000_000, "Largest file of a merged model."
)
PAD_RANK = flags.DEFINE_integer(
    "pad_rank", None, "One rank for all sites of --format=peft, as vLLM wants it."
)
ALLOW_ROUNDING = flags.DEFINE_bool(
    "allow_rounding", False, "Let --pad_rank round where scales differ."
)
AS_LORA = flags.DEFINE_bool(
    "as_lora", False, "Whatever the method, make a LoRA of its factors first."
)
OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace what stands at --out.")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Show what would be written, and write nothing.")


def main(_: Sequence[str]) -> None:
    # Imported here so that --help and mistyped flags answer at once.
    from mos_jax.conversion.formats import Options, check_request, convert, format_name
    from mos_jax.conversion.source import load_source
    from mos_jax.errors import InputError

    if not IN.value:
        raise InputError("--in is missing; for example --in=runs/q/adapter")
    if not OUT.value:
        raise InputError("--out is missing; for example --out=runs/q/peft")
    kind = format_name(FORMAT.value)
    options = Options(
        DTYPE.value,
        MAX_SHARD_BYTES.value,
        PAD_RANK.value,
        ALLOW_ROUNDING.value,
        OVERWRITE.value,
    )
    source = load_source(IN.value, BASE.value, QUANTIZE.value, AS_LORA.value)
    show(source.rows())
    if source.finished.note:
        print(source.finished.note)
    check_request(source, OUT.value, kind, options)
    converted = convert(source, OUT.value, kind, options, dry_run=DRY_RUN.value)
    print(f"{'would write' if DRY_RUN.value else 'wrote'} {OUT.value} ({kind})")
    show(converted.rows())


def show(rows: list[tuple[str, str]]) -> None:
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        print(f"  {name:{width}}  {text}")


if __name__ == "__main__":
    app.run(main)
