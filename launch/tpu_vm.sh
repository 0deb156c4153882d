#!/usr/bin/env bash
# Trains on all hosts of a Cloud TPU slice, through ssh from any machine with gcloud:
#
#   TPU=my-slice ZONE=us-west4-a launch/tpu_vm.sh --config=configs/own_data.py \
#     --config.mesh.fsdp=-1 --config.data.batch_size=16 --config.base.name=/mnt/shared/model \
#     --config.data.train_path=/mnt/shared/train.jsonl --workdir=/mnt/shared/runs/q
#
# The chips share the rows of a batch: 16 rows are for a slice of 8 or 16 chips, such as v5e 4x4.
# Before that, once: the checkout at ~/mos_jax on every host with its virtual environment
# (INSTALL=1 does it from REPOSITORY), and the workdir on a file system that all hosts have mounted.
# JAX finds the hosts and the number of each from the metadata of the TPU VM.
set -euo pipefail

: "${TPU:?name of the slice}" "${ZONE:?its zone}"
again=${RESTARTS:-3}

everywhere() {
  gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command="$1"
}

if [[ ${INSTALL:-} ]]; then
  : "${REPOSITORY:?address to clone from}"
  everywhere "git clone $(printf %q "$REPOSITORY") mos_jax && cd mos_jax &&
    python3 -m venv .venv && .venv/bin/pip install -c constraints.txt -e '.[tpu]'"
fi

command="cd mos_jax && .venv/bin/python experiments/train.py --coordinator=auto"
for word in "$@"; do command+=" $(printf %q "$word")"; done

# gcloud tells only that a host failed, not how: start again, and stop at the same failure.
until everywhere "$command"; do
  if ((again-- == 0)); then exit 1; fi
  sleep "${PAUSE:-10}"
done
