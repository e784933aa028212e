#!/usr/bin/env bash
# Pre-training on several nodes under SLURM: sbatch launch/slurm.sh configs/pera_vitb16.py /data/shards runs/vitb16
#
# One task per node uses all of its GPUs; the tasks find each other through SLURM's variables. Ten minutes before the time
# limit, SLURM sends SIGTERM: all nodes save a checkpoint at the same step and exit with status 0, and the job requeues itself
# and resumes. It also requeues (by the exit statuses in pera_jax/common/errors.py) if a node failed, a step stalled
# (config.stall_seconds) or the program crashed, as long as restarts reach new checkpoints. Invalid input, a non-finite loss, a
# full disk and Ctrl-C end the job.
#SBATCH --job-name=pera
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.out
set -euo pipefail

config=${1:?usage: sbatch launch/slurm.sh CONFIG SHARDS WORKDIR [--config.FIELD=VALUE ...]}
shards=${2:?the dataset folder, on storage that all nodes share}
workdir=${3:?the run folder, on storage that all nodes share}
shift 3

cd "${SLURM_SUBMIT_DIR:-.}"
. .venv/bin/activate
export JAX_COMPILATION_CACHE_DIR="$PWD/.cache/jax" # so that a restarted job does not compile again

# When a task fails, srun kills the others and may return their status, so each task records its own.
export STATUSES="$PWD/.slurm-$SLURM_JOB_ID"
rm -rf "$STATUSES" && mkdir -p "$STATUSES"
newest() { { ls "$workdir/checkpoints" 2>/dev/null || true; } | grep -E '^[0-9]+$' | sort -n | tail -n 1 || true; }
before=$(newest)

status=0
# shellcheck disable=SC2016  # the variables are expanded in the task
srun --kill-on-bad-exit=1 bash -c 'status=0; "$@" || status=$?; echo "$status" > "$STATUSES/$SLURM_PROCID"; exit "$status"' \
  task python -m pera_jax.train --config "$config" --config.data.path="$shards" \
  --config.data.workers=32 --workdir "$workdir" "$@" || status=$?
ended=$(sort -un "$STATUSES"/* 2>/dev/null | tr '\n' ' ')
rm -rf "$STATUSES"

# The training writes FINISHED after its last step.
started=${SLURM_RESTART_COUNT:-0}
if [ -e "$workdir/FINISHED" ] || [[ " $ended$status " =~ \ (1|2|130)\  ]]; then
  again=no
elif [ "$status" = 0 ] || [ "$status" = 143 ] || [ "$(newest)" != "$before" ]; then
  again=yes
else
  again=$([ "$started" -lt 3 ] && echo yes || echo no) # no progress: retry a few times, maybe on another node
fi
if [ "$again" = yes ] && [ "$started" -lt 50 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
