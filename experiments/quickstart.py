r"""The main job from end to end: train, evaluate, export, and show what came out.

python experiments/quickstart.py --config=configs/quickstart.py --workdir=runs/quickstart

Called again, it shows the finished result at once; stopped half-way, it goes on. 4 minutes on 2 CPU
cores. Prints a table of base and adapter on held-out questions, sizes, sample answers, and what to
try next. In --workdir are then adapter/, the trained adapter; peft/, the same as a LoRA of PEFT;
and what every run leaves (docs/own_data.md). experiments/train.py does the same without the export.

Another config or method: --config=configs/own_data.py, or a word after the name, as in
--config=configs/quickstart.py:lora (lora, mos, prolora, rasa, share_lora, tied_lora, uni_lora,
vb_lora, vera). A finished run goes on with a larger --config.training.steps; another method or rank
needs another --workdir.
"""

import os
from collections.abc import Sequence

from absl import flags

from mos_jax import app

CONFIG = app.define_config("configs/quickstart.py")
WORKDIR = flags.DEFINE_string("workdir", "runs/quickstart", "Folder of the run.")


def main(_: Sequence[str]) -> None:
    # Imported here so that --help and mistyped flags answer at once.
    from rich.console import Console

    from mos_jax.training.config import RunConfig
    from mos_jax.training.loop import train
    from mos_jax.training.report import print_summary

    config = RunConfig.from_mapping(CONFIG.value.lock().to_dict())
    console = Console()
    summary = train(config, WORKDIR.value, console)
    print_summary(summary, WORKDIR.value, console)
    adapter, peft = (os.path.join(WORKDIR.value, name) for name in ("adapter", "peft"))
    # A run that was extended has a newer adapter than the export beside it.
    if not os.path.exists(peft) or os.path.getmtime(peft) < os.path.getmtime(adapter):
        from mos_jax.finished import load_finished

        exported = load_finished(adapter).export_peft(peft, overwrite=True)
        console.print(f"Largest logit difference of the export: {exported.difference:.2g}.")
    console.print(f"As a PEFT LoRA it is in {peft}.", highlight=False)
    question = 'What is Ann to Bob? Answer with one word."'
    console.print(
        "Try next:\n"
        f"  .venv/bin/python experiments/generate.py --adapter={adapter} --compare \\\n"
        f'    --prompt="Ann is married to Tom. They have a child called Bob. {question}\n'
        f"  .venv/bin/python experiments/convert.py --in={adapter} --format=merged \\\n"
        f"    --out={os.path.join(WORKDIR.value, 'merged')}",
        highlight=False,
        markup=False,
        soft_wrap=True,  # a command to copy must not be broken up
    )


if __name__ == "__main__":
    app.run(main)
