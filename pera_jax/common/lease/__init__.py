"""One job per folder at a time: a lease is a small file that names the job that works in a folder.

A lease is created and taken over atomically with hard links and renames, which unlike file locks also work on NFS and
between hosts. Its owner renews it every few seconds. An owner on this machine is checked by its process id and start
time. An owner on another machine is watched: if its lease does not change for a minute, measured by the clock of the
watcher, the owner is dead. Clocks of different hosts are never compared.
"""

import contextlib
import os
import pathlib
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator

from pera_jax.common import interrupts
from pera_jax.common.errors import UserError
from pera_jax.common.lease.owner import Owner, process_began, this_machine

NAME = ".lease"
RENEWAL = 10.0  # seconds between renewals
SILENCE = 60.0  # seconds without a renewal after which an owner on another machine is dead
_LOOK = 0.25  # seconds between checks of a watched lease
_SAME_JOB = 900.0  # seconds that a requeued job waits for its own predecessor to end


class InUse(UserError):
    """Another running job holds the folder."""


class Lease:
    """A lease that this process holds; created by `held`."""

    def __init__(
        self, path: pathlib.Path, owner: Owner, descriptor: int, renewal: float, made: list[pathlib.Path]
    ):
        self._path, self._owner, self._descriptor, self._renewal = path, owner, descriptor, renewal
        self._made = made  # folders, innermost first
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._renewals, self._seen, self._lost = 0, _clock(), None
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    @property
    def lost(self) -> bool:
        """Whether another job has taken over the folder, as noticed by `check` or a renewal."""
        return self._lost is not None

    def check(self) -> None:
        """Raises UserError if another job has taken over the folder because this process was stopped for too long.

        Only accesses the file system if this process has not renewed its lease for a while.
        """
        if self._lost is None and _clock() - self._seen > 2 * self._renewal:
            self._write()
        if self._lost is not None:
            raise UserError(self._lost)

    def release(self) -> None:
        """Releases the folder, and removes it if it was created for the lease and is empty."""
        self._ended.set()
        with self._lock:
            if self._descriptor < 0:
                return
            os.close(self._descriptor)
            self._descriptor = -1
            if self._lost is None:
                with contextlib.suppress(OSError, InUse), _taken(_heir(self._path, self._owner)):
                    found = _read(self._path)
                    if found and found[0].token == self._owner.token:
                        self._path.unlink()
            _remove_empty(self._made)

    def _renew(self) -> None:
        while not self._ended.wait(self._renewal) and self._lost is None:
            self._write()

    def _write(self) -> None:
        with self._lock:
            if self._descriptor < 0 or self._lost is not None:
                return
            # Through its own descriptor, so that a file that replaced this one stays unchanged.
            with contextlib.suppress(OSError):
                self._renewals += 1
                os.pwrite(self._descriptor, self._owner.content(self._renewals), 0)
                os.fsync(self._descriptor)
            with contextlib.suppress(OSError):  # a server that does not respond: neither lost nor confirmed
                found = _read(self._path)
                if found is None:  # removed by hand
                    with contextlib.suppress(FileExistsError):
                        descriptor = _create(self._path, self._owner.content(self._renewals))
                        os.close(self._descriptor)
                        self._descriptor = descriptor
                    found = _read(self._path)
                if found and found[0].token != self._owner.token:
                    self._lost = (
                        f"{self._path.parent} was taken over by {found[0]} while this process was suspended; this "
                        "process stops without further writes"
                    )
                self._seen = _clock()


@contextlib.contextmanager
def held(
    folder: str | pathlib.Path, choose: str, *, name: str = NAME, what: object = None, wait: float = 0.0,
    renewal: float = RENEWAL, silence: float = SILENCE, say: Callable[[str], None] | None = None,
) -> Iterator[Lease]:  # fmt: skip
    """Context in which no other process on any host can hold `folder`.

    The folder is created if missing, and removed at the end if empty. The lease of a dead owner is taken over. A job
    that SLURM has requeued waits for its own predecessor to end.

    Args:
      choose: the option to change, for the message: "--workdir".
      name: file name of the lease; jobs with different names do not exclude each other.
      what: what is in use, for the message; by default the folder.
      wait: seconds to wait for a running owner.
      renewal, silence: seconds; see `RENEWAL` and `SILENCE`.
      say: called with a line of text while a lease is watched; by default it is printed to stderr.

    Raises:
      InUse: another running process holds the folder. UserError: the folder cannot be written.
    """
    folder = pathlib.Path(folder).absolute()
    path, owner = folder / name, Owner.this_process()
    say = say or (lambda text: print(text, file=sys.stderr, flush=True))
    made, lease = [], None
    try:
        try:
            made = [each for each in (folder, *folder.parents) if not each.exists()]  # innermost first
            descriptor = _take(path, owner, wait, silence, say)
            lease = Lease(path, owner, descriptor, renewal, made)
        except InUse as error:
            raise InUse(
                f"{what or folder} is in use by {error}; wait until it ends, or choose another {choose}"
            ) from None
        except OSError as error:
            raise UserError(
                f"cannot write to {what or folder}: {error.strerror or error}; choose another {choose}"
            ) from error
        with interrupts.before_end(lease.release):
            yield lease
    finally:
        if lease:
            lease.release()
        else:
            _remove_empty(made)


def _remove_empty(folders: list[pathlib.Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):  # folders that are not empty stay
            folder.rmdir()


def _take(path: pathlib.Path, owner: Owner, wait: float, silence: float, say: Callable[[str], None]) -> int:
    """Creates the lease or takes over a dead one; returns its open descriptor. Raises InUse with the owner as text."""
    began = _clock()
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            return _create(path, owner.content(0))
        except FileExistsError:
            pass
        except FileNotFoundError:  # the folder was removed by the job that created it
            continue
        found = _read(path)
        if found is None:
            continue
        holder, content = found
        lives = _lives(path, holder, content, silence, say)
        if lives is None:
            continue
        if lives:
            if _clock() - began >= (max(wait, _SAME_JOB) if holder.precedes(owner) else wait):
                raise InUse(str(holder))
            time.sleep(_LOOK)
            continue
        # Several processes may find the same owner dead: the one that holds a lease named after it takes over.
        try:
            with _taken(_heir(path, holder), silence):
                found = _read(path)
                if found and found[0].token == holder.token:
                    descriptor = _create(path, owner.content(0), replace=True)
                    _tidy(path, holder)
                    return descriptor
        except InUse:
            time.sleep(_LOOK)


def _tidy(path: pathlib.Path, before: Owner) -> None:
    """Removes files of processes that were killed while taking this lease; a running one simply retries."""
    for stray in path.parent.glob(f"{path.name}.*"):
        if not stray.name.startswith(_heir(path, before).name):
            stray.unlink(missing_ok=True)


def _heir(path: pathlib.Path, owner: Owner) -> pathlib.Path:
    return path.with_name(f"{path.name}.{owner.token}")


@contextlib.contextmanager
def _taken(path: pathlib.Path, silence: float = SILENCE) -> Iterator[None]:
    """A short lease that is not renewed."""
    descriptor = _take(path, Owner.this_process(), 0.0, silence, lambda text: None)
    os.close(descriptor)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _create(path: pathlib.Path, content: bytes, replace: bool = False) -> int:
    """Creates a file together with its content; returns a descriptor. Raises FileExistsError unless `replace`."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        os.write(descriptor, content)
        os.fsync(descriptor)
        if replace:
            os.replace(temporary, path)
            return descriptor
        try:
            os.link(temporary, path)
        except OSError as error:
            # An NFS reply may get lost and the call be repeated: the link count tells what happened.
            if os.fstat(descriptor).st_nlink == 2:
                return descriptor
            if isinstance(error, FileExistsError) or path.exists():
                raise FileExistsError from error
            # A file system without hard links: the file exists for a moment without content.
            plain = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            os.close(descriptor)
            descriptor = plain
            os.write(descriptor, content)
            os.fsync(descriptor)
        return descriptor
    except BaseException:
        os.close(descriptor)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _read(path: pathlib.Path) -> tuple[Owner, bytes] | None:
    """Owner and content of a lease; None if there is none."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    return Owner.parse(content), content


def _lives(path: pathlib.Path, owner: Owner, content: bytes, silence: float, say: Callable[[str], None]) -> bool | None:
    """Whether the owner of a lease that was read as `content` runs; None if the owner has changed or is gone."""
    if owner.machine and owner.machine == this_machine():
        return process_began(owner.pid) == owner.began
    began, said = _clock(), False
    while _clock() - began < silence:
        time.sleep(min(_LOOK, silence))
        found = _read(path)
        if found is None or found[0].token != owner.token:
            return None
        if found[1] != content:
            return True
        if not said and _clock() - began > 2.0:
            said = True
            say(f"{path.parent} is held by {owner}: waiting up to {silence:g} s to see whether it is still running")
    return False


def _clock() -> float:
    """Seconds of a monotonic clock that also counts while the machine sleeps."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))
