"""One job at a time in one place: a lease, a small file that says who works in a folder.

It is made and taken over atomically by hard links and renames, which also hold on NFS and between hosts; file locks do
not. Its owner writes to it every few seconds for as long as it lives. Whether an owner that has left its lease behind
still lives is asked of the system where it ran on this machine, by its process id and the time at which that process
began; else the lease is watched: one that does not change for a minute, on the clock of the watcher, is dead. The
clocks of two hosts are never compared.
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
from pera_jax.common.owner import Owner, process_began, this_machine

NAME = ".lease"
RENEWAL = 10.0  # seconds between two signs of life
SILENCE = 60.0  # seconds without one after which an owner on another machine is dead
_LOOK = 0.25  # seconds between two looks at a lease that is watched
_SAME_JOB = 900.0  # seconds that a job which the scheduler has started again waits for its predecessor's end


class InUse(UserError):
    """Another job that lives holds the folder."""


class Lease:
    """A lease that this process holds; made by `held`."""

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
        """Whether `check` has found, or this process as it renewed, that another job has taken the folder over."""
        return self._lost is not None

    def check(self) -> None:
        """Raises UserError where another job has taken the folder over, because this process has stood still too long.

        Asks the file system only where this process has not written to its lease for a while.
        """
        if self._lost is None and _clock() - self._seen > 2 * self._renewal:
            self._write()
        if self._lost is not None:
            raise UserError(self._lost)

    def release(self) -> None:
        """Gives the folder up, and removes it if it was made for this and holds nothing else."""
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
            # Through its own descriptor: where another file has taken the place of this one, that is left alone.
            with contextlib.suppress(OSError):
                self._renewals += 1
                os.pwrite(self._descriptor, self._owner.content(self._renewals), 0)
                os.fsync(self._descriptor)
            with contextlib.suppress(OSError):  # a server that does not answer: not lost, and not seen either
                found = _read(self._path)
                if found is None:  # removed by hand
                    with contextlib.suppress(FileExistsError):
                        descriptor = _create(self._path, self._owner.content(self._renewals))
                        os.close(self._descriptor)
                        self._descriptor = descriptor
                    found = _read(self._path)
                if found and found[0].token != self._owner.token:
                    self._lost = (
                        f"{self._path.parent} was taken over by {found[0]}, as this process had stood still; it ends "
                        "without writing more"
                    )
                self._seen = _clock()


@contextlib.contextmanager
def held(
    folder: str | pathlib.Path, choose: str, *, name: str = NAME, what: object = None, wait: float = 0.0,
    renewal: float = RENEWAL, silence: float = SILENCE, say: Callable[[str], None] | None = None,
) -> Iterator[Lease]:  # fmt: skip
    """While entered, no other process that asks holds `folder`, on whatever host.

    The folder is made where it is missing, and removed again if it is empty at the end. A dead owner's lease is taken
    over. A job that SLURM has started again waits for the end of its own predecessor.

    Args:
      choose: what to choose otherwise, for the sentence: "--workdir".
      name: of the lease's file in the folder: jobs with different names do not keep each other out.
      what: is in use, for the sentence; the folder by default.
      wait: seconds to wait for an owner that lives.
      renewal, silence: seconds, see the module.
      say: where to say that a lease is watched; stderr by default.

    Raises:
      InUse: another one that lives holds it. UserError: the folder cannot be written.
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
            raise InUse(f"{what or folder} is in use by {error}; wait for its end, or choose another {choose}") from None
        except OSError as error:
            raise UserError(f"cannot write to {what or folder}: {error.strerror or error}; choose another {choose}") from error
        with interrupts.before_end(lease.release):
            yield lease
    finally:
        if lease:
            lease.release()
        else:
            _remove_empty(made)


def _remove_empty(folders: list[pathlib.Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):  # those that hold something stay
            folder.rmdir()


def _take(path: pathlib.Path, owner: Owner, wait: float, silence: float, say: Callable[[str], None]) -> int:
    """Makes the lease or takes over a dead one; returns its open descriptor. Raises InUse with the owner's description."""
    began = _clock()
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            return _create(path, owner.content(0))
        except FileExistsError:
            pass
        except FileNotFoundError:  # the folder was removed by a job that had made it
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
        # Several may have found the same owner dead: its heir is who holds a lease named after it.
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
    """Removes what processes that were killed as they took this lease have left; one that lives tries again."""
    for stray in path.parent.glob(f"{path.name}.*"):
        if not stray.name.startswith(_heir(path, before).name):
            stray.unlink(missing_ok=True)


def _heir(path: pathlib.Path, owner: Owner) -> pathlib.Path:
    return path.with_name(f"{path.name}.{owner.token}")


@contextlib.contextmanager
def _taken(path: pathlib.Path, silence: float = SILENCE) -> Iterator[None]:
    """A lease for a moment, which is not renewed."""
    descriptor = _take(path, Owner.this_process(), 0.0, silence, lambda text: None)
    os.close(descriptor)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _create(path: pathlib.Path, content: bytes, replace: bool = False) -> int:
    """Makes a file with its content at once; returns a descriptor. Raises FileExistsError, unless it may `replace`."""
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
            # An answer of NFS may be lost and the call be made again: the number of links tells what has happened.
            if os.fstat(descriptor).st_nlink == 2:
                return descriptor
            if isinstance(error, FileExistsError) or path.exists():
                raise FileExistsError from error
            # A file system without hard links: the file is there for a moment without its content.
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
    """A lease's owner and its bytes; None where there is none."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    return Owner.parse(content), content


def _lives(path: pathlib.Path, owner: Owner, content: bytes, silence: float, say: Callable[[str], None]) -> bool | None:
    """Whether the owner of a lease, which was read as `content`, lives; None where it is another's or nobody's by now."""
    if owner.machine and owner.machine == this_machine():
        return process_began(owner.pid) == owner.began
    began, told = _clock(), False
    while _clock() - began < silence:
        time.sleep(min(_LOOK, silence))
        found = _read(path)
        if found is None or found[0].token != owner.token:
            return None
        if found[1] != content:
            return True
        if not told and _clock() - began > 2.0:
            told = True
            say(f"{path.parent} is held by {owner}: waiting for up to {silence:g} s to see whether that lives")
    return False


def _clock() -> float:
    """Seconds that go on while the machine sleeps."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))
