"""Failures of the machine, as opposed to damaged data: too many open files, out of memory, a disk that does not
respond.

`environment_fault` tells whether an exception, or its cause, is such a failure, and how to fix it. Data is never
reported as damaged, skipped or moved because of one: the operation is retried for a few seconds (`patiently`), then the
command ends with an `EnvironmentFault`.
"""

import errno
import mmap
import os
import re
import resource
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from pera_jax.common.errors import INPUT, TRY_AGAIN, UserError

_T = TypeVar("_T")
# seconds between retries, about 8 in total; a server that restarts takes longer
PAUSES = (0.05, 0.2, 0.5, 1.0, 2.0, 4.0)
_FILES, _MEMORY, _THREADS, _FULL, _STORAGE, _DENIED = range(6)
_KIND_OF = {
    errno.EMFILE: _FILES, errno.ENFILE: _FILES,
    errno.ENOMEM: _MEMORY,
    errno.EAGAIN: _THREADS,  # of fork and clone; a read of a regular file never raises it
    errno.ENOSPC: _FULL, errno.EDQUOT: _FULL, errno.EFBIG: _FULL,
    errno.EIO: _STORAGE, errno.ESTALE: _STORAGE, errno.ETIMEDOUT: _STORAGE, errno.ENOTCONN: _STORAGE,
    errno.ECONNRESET: _STORAGE, errno.ECONNABORTED: _STORAGE, errno.ECONNREFUSED: _STORAGE, errno.EHOSTDOWN: _STORAGE,
    errno.EHOSTUNREACH: _STORAGE, errno.ENETDOWN: _STORAGE, errno.ENETUNREACH: _STORAGE, errno.EREMOTEIO: _STORAGE,
    errno.ENODEV: _STORAGE, errno.ENXIO: _STORAGE, errno.ENOLCK: _STORAGE, errno.ESHUTDOWN: _STORAGE,
    errno.EACCES: _DENIED, errno.EPERM: _DENIED, errno.EROFS: _DENIED,
}  # fmt: skip
# C++ libraries put the system's error into their own messages, as a number or as text.
_NUMBERS = re.compile(r"(?:os_error_code='|\[Errno |\[OS error |errno[=: ]+)(\d+)")
_WORDS = {os.strerror(number): kind for number, kind in _KIND_OF.items()} | {
    "can't start new thread": _THREADS, "std::bad_alloc": _MEMORY, "RESOURCE_EXHAUSTED: Out of memory": _MEMORY,
}  # fmt: skip
# exception types whose text is searched, since they wrap errors of other libraries
_WRAPPERS = (RuntimeError, ValueError, ImportError, EOFError)


_FIXES = {
    _FILES: "raise it with ulimit -n",
    _MEMORY: "give the job more memory, or fewer workers or a smaller batch",
    _THREADS: "raise the limits on memory and on their number (ulimit -v, ulimit -u, or the container's)",
    _FULL: "free disk space",
    _STORAGE: "check the disk or the shared file system",
    _DENIED: "grant access to it",
}


class EnvironmentFault(UserError):
    """The machine failed, not the data; the message says how to fix it.

    The status is that of wrong input if waiting does not help: a full disk, denied access.
    """

    status = TRY_AGAIN

    @classmethod
    def from_error(cls, error: BaseException, message: str) -> "EnvironmentFault":
        """From an exception that `environment_fault` recognizes."""
        fault = cls(message)
        fault.status = TRY_AGAIN if passing(error) else INPUT
        return fault


def environment_fault(error: BaseException) -> str | None:
    """Why an exception is a failure of the machine; None if the data may be at fault.

    Considers the exception, its causes and contexts, the members of exception groups, and the messages in which
    TensorStore, Orbax, ArrayRecord and JAX wrap system errors. A request for more memory than the machine has does not
    count: it comes from a damaged or malicious header.

    Returns:
      "REASON; FIX" to follow "FILE cannot be read: ", for example "too many files are open (the limit is 1024); raise
      it with ulimit -n".
    """
    kind, reason = _find(error)
    return None if kind is None else f"{reason}; {_FIXES[kind]}"


def passing(error: BaseException) -> bool:
    """Whether it is a failure of the machine that may be temporary; a full disk and denied access are not."""
    return _find(error)[0] not in (None, _FULL, _DENIED)


def raise_if_fault(error: BaseException, what: str) -> None:
    """Raises EnvironmentFault "WHAT: REASON; FIX ..." if an exception is a failure of the machine."""
    if isinstance(error, EnvironmentFault):
        raise error
    fault = environment_fault(error)
    if fault is not None:
        message = f"{what}: {fault}, and re-run the same command; the data is not damaged"
        raise EnvironmentFault.from_error(error, message) from error


def patiently(action: Callable[[], _T], what: str, relieve: Callable[[], None] = lambda: None) -> _T:
    """Calls `action`, which reads something, and retries for some seconds on temporary failures of the machine.

    Args:
      what: for the message, for example "shard shards/aid/x cannot be read".
      relieve: called before each retry to release resources that may be scarce.

    Raises:
      EnvironmentFault: a failure of the machine that persists. Other errors are raised immediately.
    """
    pauses = iter(PAUSES)
    while True:
        try:
            return action()
        except Exception as error:
            pause = next(pauses, None) if passing(error) and not isinstance(error, EnvironmentFault) else None
            if pause is None:
                raise_if_fault(error, what)
                raise
        relieve()
        time.sleep(pause)


def raise_file_limit() -> int:
    """Raises the limit of open files of this process to the maximum; returns the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (ValueError, OSError):  # macOS reports a limit that it does not grant
            return soft
    return hard


def check_threads(number: int) -> None:
    """Checks that `number` more threads can be started; raises RuntimeError, a failure of the machine, if not.

    For libraries that hang if their own threads cannot be started.
    """
    end, started = threading.Event(), []
    try:
        for _ in range(number):
            started.append(threading.Thread(target=end.wait, daemon=True))
            started[-1].start()
    except RuntimeError:
        started.pop()
        raise
    finally:
        end.set()
        for thread in started:
            thread.join()


def check_memory(size: int) -> None:
    """Checks that `size` bytes can be allocated; raises OSError, a failure of the machine, if not.

    For libraries that abort the process if an allocation fails.
    """
    mmap.mmap(-1, size).close()


def _find(error: BaseException) -> tuple[int | None, str]:
    """Kind and reason of the first failure of the machine in a chain of exceptions."""
    return next((found for found in map(_judge, _chain(error)) if found[0] is not None), (None, ""))


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The exception with its causes, contexts and group members, each once."""
    waiting, seen = [error], set()
    while waiting:
        each = waiting.pop(0)
        if id(each) in seen:
            continue
        seen.add(id(each))
        yield each
        waiting += each.exceptions if isinstance(each, BaseExceptionGroup) else ()
        waiting += [inner for inner in each.args if isinstance(inner, BaseException)]
        origin = each.__cause__ or (None if each.__suppress_context__ else each.__context__)
        waiting += [origin] if origin is not None else []


def _judge(error: BaseException) -> tuple[int | None, str]:
    """Kind of a single exception (None if it is not a failure of the machine) and the reason as text."""
    if isinstance(error, MemoryError):
        wanted = getattr(error, "_total_size", 0)  # bytes, of NumPy's
        absurd = wanted > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return (None, "") if absurd else (_MEMORY, "there is not enough memory")
    if isinstance(error, OSError) and error.errno is not None:
        kind = _KIND_OF.get(error.errno)
        return kind, _reason(kind, os.strerror(error.errno))
    if isinstance(error, TimeoutError):  # a wait in a library; also after a jump of the clock
        return _STORAGE, "something took too long"
    if not isinstance(error, (OSError, *_WRAPPERS)):
        return None, ""
    text = str(error)
    for number in _NUMBERS.findall(text):
        if int(number) in _KIND_OF:
            return _KIND_OF[int(number)], _reason(_KIND_OF[int(number)], os.strerror(int(number)))
    for words, kind in _WORDS.items():
        if words in text:
            return kind, _reason(kind, words)
    return None, ""


def _reason(kind: int | None, words: str) -> str:
    if kind == _FILES:
        return f"too many files are open (the limit is {resource.getrlimit(resource.RLIMIT_NOFILE)[0]})"
    if kind == _MEMORY:
        return "there is not enough memory"
    if kind == _THREADS:
        return "the system starts no more threads or processes"
    return words[:1].lower() + words[1:]
