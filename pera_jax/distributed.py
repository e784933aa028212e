"""Many hosts: how they find each other, which rows of a batch each supplies, and how they end together.

One process per host. Every host runs the same program; what differs is which rows of the batch it reads, and that the
first host alone writes logs.
"""

import contextlib
import importlib.util
import os
import pathlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from pera_jax.errors import UserError

_START_SECONDS = 300  # that hosts wait for one another at the start


def arguments(
    environment: Mapping[str, str], on_tpu: bool, coordinator: str | None, processes: int | None, process: int | None
) -> dict[str, Any] | None:
    """What `jax.distributed.initialize` wants here; None: this is one process and wants nothing.

    Explicit flags come first; SLURM (a step of several tasks) and TPU machines are found by JAX itself.

    Args:
      coordinator: HOST:PORT of process 0; processes: how many; process: the number of this one. All or none of them.

    Raises:
      UserError: some of the three, or numbers that do not fit.
    """
    given = (coordinator, processes, process)
    if any(flag is not None for flag in given):
        if any(flag is None for flag in given):
            raise UserError("--coordinator, --num_processes and --process_id go together: give all three or none")
        if not 0 <= process < processes or ":" not in coordinator:
            raise UserError(
                f"--coordinator={coordinator} --num_processes={processes} --process_id={process} do not fit: "
                "HOST:PORT, and a process number from 0 to one less than their number"
            )
        return dict(coordinator_address=coordinator, num_processes=processes, process_id=process)
    if int(environment.get("SLURM_STEP_NUM_TASKS", 1)) > 1 or on_tpu:
        return {}
    return None


def start(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Joins the hosts of a run; nothing where there is one. Must come before anything else asks JAX for devices.

    Raises:
      UserError: flags that do not fit, or hosts that do not find each other.
    """
    on_tpu = importlib.util.find_spec("libtpu") is not None and any(
        pathlib.Path(device).exists() for device in ("/dev/accel0", "/dev/vfio/0")
    )
    wanted = arguments(os.environ, on_tpu, coordinator, processes, process)
    if wanted is None:
        return
    try:
        jax.distributed.initialize(**wanted, initialization_timeout=_START_SECONDS)
    except (RuntimeError, ValueError) as error:
        reason = (str(error).splitlines() or ["?"])[0]
        raise UserError(
            f"the hosts of this run do not find each other ({reason}); start one process on each, all with the same "
            "--coordinator HOST:PORT of process 0 and --num_processes"
        ) from error


def first() -> bool:
    """Whether this host is the one that writes logs."""
    return jax.process_index() == 0


def say(text: str) -> None:
    """Prints a line to stderr, once for all hosts."""
    if first():
        print(text, file=sys.stderr, flush=True)


def everywhere(fact: bool) -> bool:
    """Whether `fact` holds on every host."""
    return fact if jax.process_count() == 1 else bool(np.all(multihost_utils.process_allgather(np.array(fact))))


def rows_here(where: NamedSharding, batch: int) -> np.ndarray:
    """int64, ascending: the rows of a global batch that this host's devices hold.

    Read from the sharding, because the order of a mesh need not be that of hosts, and hosts that the axis `tensor`
    spans hold the same rows.
    """
    parts = {index[0].indices(batch)[:2] for index in where.addressable_devices_indices_map((batch,)).values()}
    return np.concatenate([np.arange(*part) for part in sorted(parts)])


def global_batch(local: Any, where: NamedSharding, batch: int, rows: np.ndarray) -> Any:
    """Global arrays [batch, ...], laid out as `where` says, from a tree of this host's `rows` of them."""
    parts = where.addressable_devices_indices_map((batch,))

    def join(array: np.ndarray) -> jax.Array:
        on_devices = []
        for device, index in parts.items():
            start, stop, _ = index[0].indices(batch)
            place = int(np.searchsorted(rows, start))
            on_devices.append(jax.device_put(array[place : place + stop - start], device))
        return jax.make_array_from_single_device_arrays((batch, *array.shape[1:]), where, on_devices)

    return jax.tree.map(join, local)


@contextlib.contextmanager
def end_at_once() -> Iterator[None]:
    """With several hosts, ends the process on an error without tidying up: the others wait for it in vain meanwhile, and
    what tidying up waits for may be a host that is gone."""
    try:
        yield
    except BaseException as error:
        if jax.process_count() == 1:
            raise
        lost = isinstance(error, jax.errors.JaxRuntimeError)
        reason = (str(error).splitlines() or [type(error).__name__])[0][:300]
        text = f"a host of this run is lost ({reason}); start all again to go on from the last checkpoint" if lost else error
        print(f"error: host {jax.process_index()}: {text}", file=sys.stderr, flush=True)
        os._exit(1)
