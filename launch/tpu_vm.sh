#!/usr/bin/env bash
# Pre-training on a TPU slice, from a machine with gcloud: installs on all of its hosts and starts the run on each.
#
#   launch/tpu_vm.sh NAME ZONE configs/pera_vitg16_1024.py /mnt/data/shards /mnt/data/runs/vitg16
#
# The hosts find each other. The shards and the workdir are on a mount that all hosts share (Filestore, or a bucket through
# gcsfuse). Run it again after a preemption to resume from the newest checkpoint.
set -euo pipefail

name=${1:?usage: launch/tpu_vm.sh NAME ZONE CONFIG SHARDS WORKDIR [--config.FIELD=VALUE ...]}
zone=${2:?the zone of the TPU}
config=${3:?a file of configs/}
shards=${4:?the folder of shards on each host}
workdir=${5:?the folder of the run, the same on each host}
shift 5
repository=$(git -C "$(dirname "$0")/.." remote get-url origin)
revision=$(git -C "$(dirname "$0")/.." rev-parse HEAD)
train=$(printf '%q ' .venv/bin/python -m pera_jax.train --config "$config" --config.data.path="$shards" \
  --workdir "$workdir" "$@")

everywhere() {
  gcloud compute tpus tpu-vm ssh "$name" --zone "$zone" --worker=all --command "$1"
}

everywhere "
  set -e
  test -d pera_jax/.git || git clone --quiet $(printf %q "$repository") pera_jax
  cd pera_jax && git fetch --quiet && git checkout --quiet $revision
  make .venv/ready
  .venv/bin/pip install --quiet \"jax[tpu]==\$(.venv/bin/python -c 'import jax; print(jax.__version__)')\"
"
everywhere "
  cd pera_jax
  $train
"
