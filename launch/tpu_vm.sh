#!/usr/bin/env bash
# Pre-training on a TPU slice, from a machine with gcloud: installs pera_jax on all hosts and starts the training on each.
#
#   launch/tpu_vm.sh NAME ZONE configs/pera_vitg16_1024.py /mnt/data/shards /mnt/data/runs/vitg16
#
# The hosts find each other. SHARDS and WORKDIR must be on storage that all hosts share (Filestore, or a bucket mounted with
# gcsfuse). Re-run the same command after a preemption to resume from the newest checkpoint.
set -euo pipefail

name=${1:?usage: launch/tpu_vm.sh NAME ZONE CONFIG SHARDS WORKDIR [--config.FIELD=VALUE ...]}
zone=${2:?the zone of the TPU}
config=${3:?a config, e.g. configs/pera_vitb16.py}
shards=${4:?the dataset folder, the same on all hosts}
workdir=${5:?the run folder, the same on all hosts}
shift 5
repository=$(git -C "$(dirname "$0")/.." remote get-url origin)
revision=$(git -C "$(dirname "$0")/.." rev-parse HEAD)
train=$(printf '%q ' .venv/bin/python -m pera_jax.train --config "$config" --config.data.path="$shards" \
  --workdir "$workdir" "$@")

on_all_hosts() {
  gcloud compute tpus tpu-vm ssh "$name" --zone "$zone" --worker=all --command "$1"
}

on_all_hosts "
  set -e
  test -d pera_jax/.git || git clone --quiet $(printf %q "$repository") pera_jax
  cd pera_jax && git fetch --quiet && git checkout --quiet $revision
  make .venv/ready
  .venv/bin/pip install --quiet \"jax[tpu]==\$(.venv/bin/python -c 'import jax; print(jax.__version__)')\"
"
on_all_hosts "
  cd pera_jax
  $train
"
