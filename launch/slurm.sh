#!/usr/bin/env bash
# Pre-training on several nodes under SLURM: sbatch launch/slurm.sh configs/pera_vitb16.py /data/shards runs/vitb16
#
# One task per node holds all of its GPUs; the tasks find each other by SLURM's own variables. Ten minutes before the
# time is up SLURM sends SIGTERM: all nodes save at the same step, end with status 0, and the job queues itself again.
# A node that dies, or a step that hangs (config.stall_seconds), ends the job with another status; it queues again, too,
# and goes on from the newest checkpoint.
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
shards=${2:?the folder of shards, on a file system that all nodes see}
workdir=${3:?the folder of the run, on a file system that all nodes see}
shift 3

cd "${SLURM_SUBMIT_DIR:-.}"
. .venv/bin/activate
export JAX_COMPILATION_CACHE_DIR="$PWD/.cache/jax" # a job that starts again compiles nothing again

status=0
srun --kill-on-bad-exit=1 python -m pera_jax.train --config "$config" --config.data.path="$shards" \
  --config.data.workers=32 --workdir "$workdir" "$@" || status=$?

# The run writes FINISHED once it has come to its end; until then, however it ended, there is something left to do.
# A job that was started fifty times does not get there.
if [ ! -e "$workdir/FINISHED" ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 50 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
