#!/usr/bin/env bash
# Trains on several hosts of a SLURM cluster:
#
#   sbatch launch/slurm.sh --config=configs/own_data.py --config.mesh.fsdp=-1 \
#     --config.data.batch_size=16 --config.base.name=/shared/model \
#     --config.data.train_path=/shared/train.jsonl --workdir=/shared/runs/q
#
# The GPUs, nodes times gpus-per-node, share the rows of a batch: 16 of each here.
# One process for each GPU: that is what JAX takes a task of SLURM for. Do not bind GPUs to tasks
# (--gpus-per-task): JAX chooses the task's own by its local number. The number of processes and
# the address of the first come from SLURM. All nodes must see this checkout and the workdir.
#SBATCH --job-name=mos_jax
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail

cd "${SLURM_SUBMIT_DIR:-.}" || exit 1
python=${PYTHON:-.venv/bin/python}
again=${RESTARTS:-3}

while true; do
  srun "$python" experiments/train.py "$@"
  status=$?
  case $status in
    0 | 1 | 2 | 3) exit $status ;; # done; a defect; bad input; the run cannot go on
    130 | 143) exit $status ;; # somebody stopped it, with scancel for example: that holds
    138) # its time was nearly up, so --signal came, and the state is saved: the job goes on later
      scontrol requeue "$SLURM_JOB_ID"
      exit $status
      ;;
  esac
  # 75 or another signal: a process was lost, and the others ended with it.
  if ((again-- == 0)); then exit $status; fi
  echo "launch/slurm.sh: srun ended with status $status; starting again" >&2
  sleep "${PAUSE:-10}"
done
