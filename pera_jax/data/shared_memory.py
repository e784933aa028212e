"""The shared memory in which data workers hand batches over: named after its owner, and given back after a kill.

A batch lies in segments of /dev/shm until the training has taken it. Where all processes of a run are killed at once,
nobody is left to remove them, and they fill the memory of the machine until it starts anew. So their names tell the
process that trains, and the next run removes those whose owner is gone.
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
    """From now on this process names its segments after the process `pid`. Nothing where there is no /proc."""
    owner = _owner(pid)
    if owner is not None:
        # Grain leaves the name to Python, which draws it anew until it is free.
        shared_memory._make_filename = lambda: f"/{_PREFIX}{owner}-{secrets.token_hex(8)}"


def remove_orphans() -> int:
    """Removes the segments of owners that are gone; returns their bytes.

    Those of another PID namespace stay, of containers that share /dev/shm: whether their owners live cannot be told.
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
            with contextlib.suppress(OSError):  # of another user, or removed by another run meanwhile
                size = segment.stat().st_size
                segment.unlink()
                freed += size
    return freed


def check_room(needed: int, workers: int, batch: int) -> None:
    """Raises UserError where /dev/shm has less room than `needed` bytes: a full one would end the workers without a word."""
    if not _FOLDER.is_dir():
        return
    system = os.statvfs(_FOLDER)
    free = system.f_bavail * system.f_frsize
    if needed > free:
        raise UserError(
            f"{workers} data workers need {needed >> 20} MiB of shared memory for batches of {batch}, and "
            f"{_FOLDER} has {free >> 20} MiB free; make it larger (docker: --shm-size), or set fewer data "
            "workers (config.data.workers=0 needs none)"
        )


def _owner(pid: int) -> str | None:
    """NAMESPACE-PID-START of a process, which no other has until the machine starts anew; None where it is gone."""
    try:
        fields = pathlib.Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    state, start, namespace = fields[0], fields[19].decode("ascii"), _namespace()
    return None if state in (b"Z", b"X") or namespace is None else f"{namespace}-{pid}-{start}"


def _namespace() -> str | None:
    """The number of this process's PID namespace."""
    try:
        return os.readlink("/proc/self/ns/pid").strip("pid:[]")
    except OSError:
        return None
