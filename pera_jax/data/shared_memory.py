"""Shared memory segments through which data workers pass batches: named after their owner, and freed after a kill.

A batch lies in segments of /dev/shm until the training process has taken it. If all processes of a run are killed at
once, nothing removes the segments, and they occupy memory until the machine reboots. So their names contain the
training process, and the next run removes those whose owner is gone.
"""

import contextlib
import os
import pathlib
import secrets
from multiprocessing import shared_memory

from pera_jax.common.errors import UserError

_FOLDER = pathlib.Path("/dev/shm")
_PREFIX = "pera_jax-"


def name_after(pid: int) -> None:
    """Makes this process name its segments after the process `pid`. Does nothing without /proc."""
    owner = _owner(pid)
    if owner is not None:
        # Grain lets Python choose the name, which retries until it is free.
        shared_memory._make_filename = lambda: f"/{_PREFIX}{owner}-{secrets.token_hex(8)}"


def remove_orphans() -> int:
    """Removes the segments of owners that are gone; returns the number of bytes freed.

    Segments from other PID namespaces (containers that share /dev/shm) stay, since their owners cannot be checked.
    """
    here, freed = _namespace(), 0
    if here is None or not _FOLDER.is_dir():
        return 0
    alive = {}
    for segment in _FOLDER.glob(f"{_PREFIX}*"):
        owner = segment.name.removeprefix(_PREFIX).rpartition("-")[0]
        namespace, _, rest = owner.partition("-")
        pid = rest.partition("-")[0]
        if namespace != here or not pid.isdigit():
            continue
        if owner not in alive:
            alive[owner] = _owner(int(pid)) == owner
        if not alive[owner]:
            with contextlib.suppress(OSError):  # of another user, or already removed by another run
                size = segment.stat().st_size
                segment.unlink()
                freed += size
    return freed


def check_room(needed: int, workers: int, batch: int) -> None:
    """Raises UserError if /dev/shm has less than `needed` bytes free: workers would crash without a message."""
    if not _FOLDER.is_dir():
        return
    system = os.statvfs(_FOLDER)
    free = system.f_bavail * system.f_frsize
    if needed > free:
        raise UserError(
            f"{workers} data workers need {needed >> 20} MiB of shared memory for batches of {batch}, and "
            f"{_FOLDER} has {free >> 20} MiB free; increase it (docker: --shm-size), or use fewer data "
            "workers (config.data.workers=0 needs none)"
        )


def _owner(pid: int) -> str | None:
    """NAMESPACE-PID-START of a process, unique until the machine reboots; None if the process is gone."""
    try:
        fields = pathlib.Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    state, start, namespace = fields[0], fields[19].decode("ascii"), _namespace()
    return None if state in (b"Z", b"X") or namespace is None else f"{namespace}-{pid}-{start}"


def _namespace() -> str | None:
    """Id of the PID namespace of this process; None if unknown."""
    try:
        return os.readlink("/proc/self/ns/pid").strip("pid:[]")
    except OSError:
        return None
