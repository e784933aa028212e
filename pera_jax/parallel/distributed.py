"""Many hosts: how a process joins the others, which rows of a batch it supplies, and how it ends when one is lost.

Each host runs the same command. All of them compute the same steps; process 0 alone writes metrics and messages, and
all write the checkpoints, into one folder that every host sees.
"""

import argparse
import contextlib
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from pera_jax.common.errors import CRASH, TRY_AGAIN, UserError
from pera_jax.common.text import printable

JOIN_SECONDS = 300  # that a process waits for the coordinator, and the coordinator for all processes, if not told otherwise
_JOIN_NEWS, _JOIN_GRACE = 30, 60  # seconds between two lines while it waits; that JAX gets more: it ends in C++, status 134
_LAST_WORDS = 2.0  # seconds that process 0 stays: the coordinator is its thread, and cuts off the others as it goes


class OthersMissing(UserError):
    """Another process is not there, or not yet."""

    status = TRY_AGAIN


def cluster_of(
    coordinator: str | None, processes: int | None, process: int | None, environment: Mapping[str, str]
) -> dict[str, Any] | None:
    """The arguments of `jax.distributed.initialize` by flags, SLURM or TPU pod; None for a machine by itself.

    An empty dict leaves everything to JAX, which asks SLURM's variables or the TPU's metadata server.

    Args:
      environment: as it is after `import jax`, which marks machines with TPUs.

    Raises:
      UserError: some of the three flags only, or values that do not fit together.
    """
    given = (coordinator, processes, process)
    if any(value is not None for value in given):
        if None in given:
            raise UserError("--coordinator, --num_processes and --process_id go together; give all three or none")
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isdigit():
            raise UserError(f"--coordinator={coordinator} is not of the form HOST:PORT")
        if not 0 <= process < processes:
            raise UserError(f"--process_id={process} is none of the {processes} processes; they count from 0")
        # Under SLURM JAX would still add what the flags leave open: one device for each task.
        return {
            "coordinator_address": coordinator, "num_processes": processes, "process_id": process,
            "cluster_detection_method": "deactivate",
        }  # fmt: skip
    tasks = int(environment.get("SLURM_NTASKS") or environment.get("SLURM_NPROCS") or 1)
    if tasks > 1 and "SLURM_STEP_NODELIST" in environment:  # else not started by srun, but once in the batch script
        # JAX gives each task one device. A task that has its node for itself takes all: no list of devices.
        alone = environment.get("SLURM_STEP_TASKS_PER_NODE", "").split("(")[0] == "1"
        return {"local_device_ids": []} if alone else {}
    if "TPU_ML_PLATFORM" in environment and not environment.get("JAX_PLATFORMS", "tpu").startswith("cpu"):
        workers = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES")
        if workers:
            many = "," in workers or int(environment.get("MEGASCALE_NUM_SLICES") or 1) > 1
            return {} if many else None
        return None if "TPU_SKIP_MDS_QUERY" in environment else {}
    return None


def add_options(parser: argparse.ArgumentParser) -> None:
    """The three flags, for commands without absl."""
    several = "where several hosts are told"
    parser.add_argument("--coordinator", metavar="HOST:PORT", help=f"of process 0, {several}")
    parser.add_argument("--num_processes", type=int, help=f"processes in all, {several}")
    parser.add_argument("--process_id", type=int, help=f"this process's number, from 0, {several}")
    parser.add_argument(
        "--join_seconds", type=int, default=JOIN_SECONDS, help="to wait for all hosts at the start (default: %(default)s)"
    )


def initialize(arguments: dict[str, Any] | None, timeout: int = JOIN_SECONDS) -> None:
    """Joins the other processes; nothing for None. Must run before anything asks JAX for its devices.

    Says on stderr every half minute that it waits. Where the others cannot be reached within `timeout` seconds, it ends
    the process with one sentence and the status of `OthersMissing`: JAX itself would abort it in C++.

    Raises:
      OthersMissing: what JAX raises.
      UserError: a `timeout` below 1.
    """
    if timeout < 1:
        raise UserError(f"--join_seconds={timeout} must be at least 1")
    if arguments is None:
        return
    where = printable(arguments.get("coordinator_address", "that the cluster names"))
    mend = f"start process 0 there and all the others within {timeout} s of each other (--join_seconds)"
    joined = threading.Event()

    def watch() -> None:
        begun = time.monotonic()
        while (left := begun + timeout - time.monotonic()) > 0:
            if joined.wait(min(_JOIN_NEWS, left)):
                return
            waited = time.monotonic() - begun
            if waited < timeout:
                text = f"waiting for the other processes, through the coordinator {where}: {waited:.0f} of {timeout} s"
                print(text, file=sys.stderr, flush=True)
        if joined.is_set():
            return
        text = f"error: the other processes were not there within {timeout} s, through the coordinator {where}; {mend}"
        print(text, file=sys.stderr, flush=True)
        os._exit(OthersMissing.status)

    threading.Thread(target=watch, name="join", daemon=True).start()
    try:
        jax.distributed.initialize(**arguments, initialization_timeout=timeout + _JOIN_GRACE)
    except (RuntimeError, ValueError, OSError) as error:
        raise OthersMissing(
            f"cannot join the other processes through the coordinator {where} ({_first_line(error)}); {mend}"
        ) from error
    finally:
        joined.set()


def main_host() -> bool:
    """Whether this is the process that writes metrics and messages."""
    return jax.process_index() == 0


def say(text: str) -> None:
    """One printable line on stderr, from one process only; foreign names in `text` are safe."""
    if main_host():
        print(printable(text, limit=2000), file=sys.stderr, flush=True)


def meet(where: str) -> None:
    """Waits until every host has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(where)


def anywhere(fact: bool) -> bool:
    """Whether it is so on any host. All of them must ask."""
    return bool(fact) if jax.process_count() == 1 else bool(np.any(multihost_utils.process_allgather(np.bool_(fact))))


def largest(value: int) -> int:
    """The largest value of any host. All of them must ask."""
    return value if jax.process_count() == 1 else int(np.max(multihost_utils.process_allgather(np.int64(value))))


def of_main_host(value: int) -> int:
    """The first host's value. All of them must ask."""
    return value if jax.process_count() == 1 else int(multihost_utils.broadcast_one_to_all(np.int64(value)))


def raise_anywhere(error: Exception | None) -> None:
    """Raises where any host has an error, on all of them: its own, or one that says that another host failed.

    All of them must ask: a host that ended alone would leave the others waiting for it.
    """
    if anywhere(error is not None):
        raise error or UserError("another host failed; its own message says why")


def on_main_host(function: Callable[[], None]) -> None:
    """The first host calls it, the others wait; where it raises, all do."""
    error = None
    if main_host():
        try:
            function()
        except Exception as wrong:
            error = wrong
    raise_anywhere(error)


def check_same(value: int, message: str) -> None:
    """Raises a UserError with the message on every host, where the hosts' values differ. All of them must ask."""
    if jax.process_count() > 1 and np.unique(multihost_utils.process_allgather(np.int64(value))).size > 1:
        raise UserError(message)


# ---------------------------------------------------------------- the batch


def rows_of(where: jax.sharding.Sharding, batch: int, devices: list | None = None) -> np.ndarray:
    """The rows of a global batch that live on `devices` (this process's by default): places, ascending, each once.

    The mesh's order need not be that of the processes, and several may hold the same rows: where `tensor` spans hosts.
    """
    devices = where.addressable_devices if devices is None else devices
    places = where.devices_indices_map((batch,))
    return np.unique(np.concatenate([np.arange(batch)[places[device]] for device in devices]))


def global_arrays(tree: Any, where: jax.sharding.Sharding, rows: np.ndarray, batch: int) -> Any:
    """Leaves [len(rows), ...], this host's `rows` of a batch, -> global arrays [batch, ...] cut as `where` says."""

    def assemble(local):
        def part(index):
            start, stop, _ = index[0].indices(batch)
            first = int(np.searchsorted(rows, start))  # what one device holds is a run of rows, here as there
            return local[first : first + stop - start]

        return jax.make_array_from_callback((batch, *local.shape[1:]), where, part)

    return jax.tree.map(assemble, tree)


def replicated(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    """NumPy leaves, the same on every host, as arrays that lie whole on every device of the mesh."""
    where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return jax.tree.map(lambda leaf: jax.make_array_from_callback(leaf.shape, where, lambda _: leaf), tree)


# ---------------------------------------------------------------- the end


class SharedStop:
    """SIGTERM to any host asks all of them for an end after the same step; JAX has taken the signal over."""

    asked = None

    def reached(self, step: int) -> bool:
        """Whether to end after `step`. Every host must ask after every step."""
        if multihost_utils.reached_preemption_sync_point(step):
            self.asked = "SIGTERM"
        return self.asked is not None


@contextlib.contextmanager
def ends_alone() -> Iterator[None]:
    """With several hosts, an exception ends this process at once, with one sentence where it can and a status of `errors`.

    Nothing is tidied up: whatever waits for the other hosts might wait for ever, and they wait for this one.
    """
    try:
        yield
    except BaseException as error:
        if jax.process_count() == 1:
            raise
        status = CRASH
        if isinstance(error, UserError):
            status = error.status
            print(f"error: {error}", file=sys.stderr)
        elif isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            status = TRY_AGAIN
            print(
                f"error: process {jax.process_index()} of {jax.process_count()} cannot go on with the others, of which "
                f"one is probably lost ({_first_line(error)}); start all of them again: they go on from the newest "
                "checkpoint",
                file=sys.stderr,
            )
        elif isinstance(error, KeyboardInterrupt):
            status = 128 + signal.SIGINT
            print("error: interrupted", file=sys.stderr)
        elif not isinstance(error, SystemExit):
            traceback.print_exc()
        sys.stderr.flush()
        if main_host():
            time.sleep(_LAST_WORDS)
        os._exit(status)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
