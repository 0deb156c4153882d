r"""Looks for the learning rate of a config: loss against a rising rate, as a picture.

python experiments/lr_find.py --config=configs/quickstart.py --workdir=runs/lr_find
python experiments/lr_find.py --config=configs/quickstart.py:lora --workdir=runs/lr_lora \
  --min_rate=1e-4 --max_rate=0.3 --steps=60

One short run in which the rate rises at each step from --min_rate to --max_rate; it ends early once
the loss explodes. Leaves lr_find.json (rate and loss of each step, the suggestion and its rule) and
lr_find.png (the curve) in --workdir, where an earlier result is replaced, and prints a rate to put
a grid around (--config.sweep.learning_rates) or to train with (--config.training.learning_rate). It
takes as long as --steps training steps: of configs/quickstart.py, 100 take about 5 minutes on 2 CPU
cores.

--config is that of the training run, all its fields included; `:lora` after its name is the method.
On several hosts, the same command on each of them, as for train.py; see docs/many_hosts.md.
"""

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from mos_jax import app

CONFIG = app.define_config("configs/quickstart.py")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the result; made when missing.")
MIN_RATE = flags.DEFINE_float("min_rate", 1e-5, "Learning rate of the first step.")
MAX_RATE = flags.DEFINE_float("max_rate", 1.0, "Learning rate of the last step.")
STEPS = flags.DEFINE_integer("steps", 100, "Steps; the test ends early once the loss explodes.")
app.define_hosts()


def main(_: Sequence[str]) -> None:
    # Imported here so that --help and mistyped flags answer at once.
    from rich.console import Console

    from mos_jax.distributed.agreement import is_first
    from mos_jax.errors import InputError
    from mos_jax.files import write_file
    from mos_jax.reporting.rate_picture import range_test_picture
    from mos_jax.reporting.style import png_bytes, require_matplotlib
    from mos_jax.training.config import RunConfig
    from mos_jax.training.lr_find import find_rate, print_suggestion

    if not WORKDIR.value:
        raise InputError("--workdir is missing; for example --workdir=runs/lr_find")
    require_matplotlib()
    config = RunConfig.from_mapping(CONFIG.value.lock().to_dict())
    console = Console(quiet=not is_first())
    found = find_rate(
        config,
        WORKDIR.value,
        console,
        min_rate=MIN_RATE.value,
        max_rate=MAX_RATE.value,
        steps=STEPS.value,
    )
    title = f"{config.adapter.method} on {config.data.task}: range test of the learning rate"
    picture = Path(WORKDIR.value) / "lr_find.png"
    if is_first():
        write_file(picture, png_bytes(range_test_picture(found, title)))
    print_suggestion(found, console)
    console.print(f"The curve is in {picture}.", highlight=False)


if __name__ == "__main__":
    app.run(main)
