"""The summary that a training run prints before its first step: devices, data, durations and model size."""

import logging
import sys
from typing import Any

import jax

from pera_jax.common.progress import write
from pera_jax.common.text import printable, several
from pera_jax.data.mixture import Mixture
from pera_jax.objectives.base import Objective
from pera_jax.parallel import sharding

_BACKENDS = "jax._src.xla_bridge"  # the logger of JAX's choice of devices


class _PrintWarning(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        write(sys.stderr, f"warning: {' '.join(record.getMessage().split())}\n")


def show_device_warnings() -> None:
    """Prints JAX's warning that it did not find this machine's accelerator, whatever the log level elsewhere."""
    logger = logging.getLogger(_BACKENDS)
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    if not any(isinstance(handler, _PrintWarning) for handler in logger.handlers):
        logger.addHandler(_PrintWarning())


def lines(
    config,
    objective: Objective,
    mesh: jax.sharding.Mesh,
    data: Mixture,
    params: Any,
    *,
    total: int,
    steps_per_epoch: int,
    hosts: int,
) -> list[str]:
    """One line each for devices, data, durations and model.

    Args:
      params: the student's parameters, arrays or their shapes.
      total: number of steps of the run. hosts: number of processes.
    """
    device, batch = mesh.devices.flat[0], config.batch_size
    shape = ", ".join(f"{name} {size}" for name, size in mesh.shape.items())
    on_hosts = f" on {hosts} hosts" if hosts > 1 else ""
    local = batch // sharding.batch_shards(mesh)
    parts = f", {config.accumulate} microbatches of {local // config.accumulate}" if config.accumulate > 1 else ""
    sets = [
        f"{printable(name)} ({len(source):,} images)" for name, source in zip(data.names(), data.sources, strict=True)
    ]
    bands = f"{several(data.bands.names, 13)} of {data.bands.dtype}"
    number = sum(leaf.size for leaf in jax.tree.leaves(params))
    backbone = sum(leaf.size for leaf in jax.tree.leaves(params["backbone"]))
    model = objective.encoder
    return [
        f"devices: {mesh.size} x {device.device_kind} ({device.platform}){on_hosts}; mesh: {shape}",
        f"data: {several(sets, 5)}, split {printable(config.data.split)}; bands {bands}",
        f"training: {total:,} steps of {batch:,} images, {total / steps_per_epoch:,.4g} epochs of {steps_per_epoch:,} "
        f"steps; {local:,} images on each device{parts}",
        f"model: {number:,} parameters, {backbone:,} of them in the backbone (width {model.width}, depth "
        f"{model.depth}, patches of {model.patch} px); {config.precision} products",
    ]
