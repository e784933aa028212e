"""How a process joins the other processes of a run that uses several hosts."""

import argparse
import os
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

import jax

from pera_jax.common.errors import TRY_AGAIN, UserError
from pera_jax.common.text import first_line, printable

JOIN_SECONDS = 300  # how long a process waits for the coordinator, and the coordinator for all processes, by default
_REPORT_SECONDS = 30  # between two progress lines while waiting
_GRACE_SECONDS = 60  # JAX's own timeout is this much longer: when it expires, JAX aborts in C++ with status 134


class HostsMissing(UserError):
    """The other processes cannot be reached, or not yet."""

    status = TRY_AGAIN


def from_flags(
    coordinator: str | None, num_processes: int | None, process_id: int | None, environment: Mapping[str, str]
) -> dict[str, Any] | None:
    """The arguments of `jax.distributed.initialize` from flags, SLURM or a TPU pod; None for a single process.

    An empty dict leaves everything to JAX, which reads SLURM's variables or the TPU's metadata server.

    Args:
      environment: environment variables as they are after `import jax`, which marks machines with TPUs.

    Raises:
      UserError: only some of the three flags are given, or their values are inconsistent.
    """
    given = (coordinator, num_processes, process_id)
    if any(value is not None for value in given):
        if None in given:
            raise UserError("--coordinator, --num_processes and --process_id go together; give all three or none")
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isdigit():
            raise UserError(f"--coordinator={coordinator} is invalid; expected HOST:PORT")
        if not 0 <= process_id < num_processes:
            raise UserError(
                f"--process_id={process_id} is out of range for --num_processes={num_processes}; expected 0 to "
                f"{num_processes - 1}"
            )
        # Under SLURM, JAX would still fill in what the flags leave open: one device per task.
        return {
            "coordinator_address": coordinator, "num_processes": num_processes, "process_id": process_id,
            "cluster_detection_method": "deactivate",
        }  # fmt: skip
    tasks = int(environment.get("SLURM_NTASKS") or environment.get("SLURM_NPROCS") or 1)
    if tasks > 1 and "SLURM_STEP_NODELIST" in environment:  # absent in a batch script, which srun did not start
        # JAX assigns one device to each task. The only task of a node takes all of its devices: an empty list.
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
    """Adds the flags of `from_flags` and `initialize`, for commands that use argparse."""
    note = "only needed if SLURM or TPU detection does not apply"
    parser.add_argument("--coordinator", metavar="HOST:PORT", help=f"address of process 0; {note}")
    parser.add_argument("--num_processes", type=int, help=f"total number of processes; {note}")
    parser.add_argument("--process_id", type=int, help=f"index of this process, from 0; {note}")
    parser.add_argument(
        "--join_seconds",
        type=int,
        default=JOIN_SECONDS,
        help="how long to wait for all hosts at startup (default: %(default)s)",
    )


def initialize(arguments: dict[str, Any] | None, timeout: int = JOIN_SECONDS) -> None:
    """Joins the other processes; does nothing if `arguments` is None. Call it before anything queries JAX's devices.

    Prints a progress line on stderr every half minute. If the others cannot be reached within `timeout` seconds, the
    process exits with one sentence and the status of `HostsMissing`; JAX itself would abort in C++.

    Raises:
      HostsMissing: JAX failed to connect.
      UserError: `timeout` is below 1.
    """
    if timeout < 1:
        raise UserError(f"--join_seconds={timeout} must be >= 1")
    if arguments is None:
        return
    address = printable(arguments.get("coordinator_address", "set by the cluster"))
    fix = f"start process 0 there and all other processes within {timeout} s of each other (--join_seconds)"
    joined = threading.Event()

    def watch() -> None:
        start = time.monotonic()
        while (left := start + timeout - time.monotonic()) > 0:
            if joined.wait(min(_REPORT_SECONDS, left)):
                return
            waited = time.monotonic() - start
            if waited < timeout:
                text = f"waiting for the other processes at the coordinator {address}: {waited:.0f} of {timeout} s"
                print(text, file=sys.stderr, flush=True)
        if joined.is_set():
            return
        text = f"error: the other processes did not join within {timeout} s at the coordinator {address}; {fix}"
        print(text, file=sys.stderr, flush=True)
        os._exit(HostsMissing.status)

    threading.Thread(target=watch, name="join", daemon=True).start()
    try:
        jax.distributed.initialize(**arguments, initialization_timeout=timeout + _GRACE_SECONDS)
    except (RuntimeError, ValueError, OSError) as error:
        reason = first_line(error)
        raise HostsMissing(f"cannot join the other processes at the coordinator {address} ({reason}); {fix}") from error
    finally:
        joined.set()
