r"""Trains an adapter as a config says, going on where an earlier call stopped.

python experiments/train.py --config=configs/quickstart.py --workdir=runs/q
python experiments/train.py --config=configs/quickstart.py --workdir=runs/q --dry_run
python experiments/train.py --config=configs/quickstart.py --workdir=runs/q2 \
  --config.training.steps=200 --config.adapter.rank=16

Configs: configs/quickstart.py (4 minutes on 2 CPU cores), configs/own_data.py (your own JSONL file:
--config.data.train_path=mine.jsonl), configs/smoke.py (seconds; a random base). A word after the
name is the method, as in --config=configs/quickstart.py:lora: lora, mos, prolora, rasa, share_lora,
tied_lora, uni_lora, vb_lora or vera. Any field can be set; docs/reference/config.md lists them.

In --workdir are then:

  adapter/         the adapter, for evaluate.py, generate.py, convert.py and serve.py
  summary.json     scores on held-out questions, sizes, times; marks the run as finished
  scores.json      the score of every question
  metrics.jsonl    a line for each step; tensorboard/ has the same for TensorBoard
  config.json      every field as it was used
  checkpoints/     where the same command goes on after Ctrl-C, SIGTERM or a power cut

A finished run goes on with a larger --config.training.steps; another method or rank needs another
--workdir.

On several hosts, the same command on each of them; see docs/many_hosts.md:
python experiments/train.py --config=configs/quickstart.py --workdir=/shared/q \
  --config.mesh.fsdp=-1 --config.data.batch_size=16 \
  --coordinator=10.0.0.1:8476 --processes=2 --process_id=0
"""

from collections.abc import Sequence

from absl import flags

from mos_jax import app

CONFIG = app.define_config("configs/quickstart.py")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; made when missing.")
app.define_hosts()
DRY_RUN = flags.DEFINE_bool(
    "dry_run", False, "Print parameters and memory from the compiled step, then stop."
)


def main(_: Sequence[str]) -> None:
    # Imported here so that --help and mistyped flags answer at once.
    from rich.console import Console

    from mos_jax.distributed.agreement import is_first
    from mos_jax.errors import InputError
    from mos_jax.training.config import RunConfig
    from mos_jax.training.loop import train
    from mos_jax.training.plan import print_plan
    from mos_jax.training.report import print_summary

    config = RunConfig.from_mapping(CONFIG.value.lock().to_dict())
    console = Console(quiet=not is_first())
    if DRY_RUN.value:
        print_plan(config, console)
        return
    if not WORKDIR.value:
        raise InputError("--workdir is missing; for example --workdir=runs/q")
    summary = train(config, WORKDIR.value, console)
    print_summary(summary, WORKDIR.value, console)


if __name__ == "__main__":
    app.run(main)
