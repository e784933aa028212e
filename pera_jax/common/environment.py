"""Errors of the machine, told apart from damaged data: too many open files, missing memory, a disk that does not answer.

`environment_fault` says of any exception whether it, or what it came from, is of that kind, and what mends it. Nothing
is called damaged, left out or moved aside for such an error: it is tried again for a while (`patiently`), and then the
command ends with `EnvironmentFault`, one sentence.
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
PAUSES = (0.05, 0.2, 0.5, 1.0, 2.0, 4.0)  # seconds between tries, about 8 in all: a server that restarts takes longer
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
# Libraries in C++ put the system's error into the text of one of their own, as a number or in the system's words.
_NUMBERS = re.compile(r"(?:os_error_code='|\[Errno |\[OS error |errno[=: ]+)(\d+)")
_WORDS = {os.strerror(number): kind for number, kind in _KIND_OF.items()} | {
    "can't start new thread": _THREADS, "std::bad_alloc": _MEMORY, "RESOURCE_EXHAUSTED: Out of memory": _MEMORY,
}  # fmt: skip
_WRAPPERS = (RuntimeError, ValueError, ImportError, EOFError)  # whose text is searched: they carry other libraries' errors


_MENDS = {
    _FILES: "raise it with ulimit -n",
    _MEMORY: "give the job more memory, or fewer workers or a smaller batch",
    _THREADS: "raise the limits on memory and on their number (ulimit -v, ulimit -u, or the container's)",
    _FULL: "make room",
    _STORAGE: "see that the disk or the shared file system is well",
    _DENIED: "allow access to it",
}


class EnvironmentFault(UserError):
    """The machine failed, not the data; the message is one sentence that says what to mend.

    Its status is that of bad input where time mends nothing: a full disk, denied access.
    """

    status = TRY_AGAIN

    @classmethod
    def of(cls, error: BaseException, message: str) -> "EnvironmentFault":
        """That of an exception which `environment_fault` knows."""
        fault = cls(message)
        fault.status = TRY_AGAIN if passing(error) else INPUT
        return fault


def environment_fault(error: BaseException) -> str | None:
    """Why an exception is a fault of the machine, or None where it may be one of the data.

    Looked at are the exception, what it was raised from or while handling, the members of groups, and the texts in which
    TensorStore, Orbax, ArrayRecord and JAX wrap errors of the system. A request for more memory than the machine has is
    no such fault: it comes from a damaged or hostile header.

    Returns:
      "REASON; MEND" for the middle of a sentence, as "too many files are open (the limit is 1024); raise it with ulimit
      -n", to follow "FILE cannot be read: ".
    """
    kind, reason = _find(error)
    return None if kind is None else f"{reason}; {_MENDS[kind]}"


def passing(error: BaseException) -> bool:
    """Whether it is a fault of the machine that may be over in a moment: no full disk, and no denied access."""
    return _find(error)[0] not in (None, _FULL, _DENIED)


def raise_if_fault(error: BaseException, what: str) -> None:
    """Raises EnvironmentFault, "WHAT: REASON; MEND ...", where an exception is a fault of the machine."""
    if isinstance(error, EnvironmentFault):
        raise error
    fault = environment_fault(error)
    if fault is not None:
        message = f"{what}: {fault}, and start again; the data are not damaged"
        raise EnvironmentFault.of(error, message) from error


def patiently(action: Callable[[], _T], what: str, relieve: Callable[[], None] = lambda: None) -> _T:
    """Calls `action`, which reads something, again for some seconds while it raises faults of the machine that may pass.

    Args:
      what: "shard shards/aid/x cannot be read", for the sentence.
      relieve: called before each new try, to let go of what may be short.

    Raises:
      EnvironmentFault: a fault of the machine that stays. Other errors pass at once.
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
    """Lets this process open as many files as the system allows it; returns how many that is."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (ValueError, OSError):  # macOS reports a limit that it does not grant
            return soft
    return hard


def check_threads(number: int) -> None:
    """Starts so many threads, which end at once. Raises RuntimeError, a fault of the machine, where it cannot.

    For libraries that wait for ever for threads of their own that could not be started.
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
    """Takes so many bytes of address space and gives them back. Raises OSError, a fault of the machine, where it cannot.

    For libraries that abort the process where they get no memory.
    """
    mmap.mmap(-1, size).close()


def _find(error: BaseException) -> tuple[int | None, str]:
    """The kind and the reason of the first fault of the machine in a chain of exceptions."""
    return next((found for found in map(_judge, _chain(error)) if found[0] is not None), (None, ""))


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The exception and everything that it came from, each once."""
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
    """The kind of a single exception, None where it is none of the machine's, and the reason in words."""
    if isinstance(error, MemoryError):
        wanted = getattr(error, "_total_size", 0)  # bytes, of NumPy's
        absurd = wanted > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return (None, "") if absurd else (_MEMORY, "there is not enough memory")
    if isinstance(error, OSError) and error.errno is not None:
        kind = _KIND_OF.get(error.errno)
        return kind, _reason(kind, os.strerror(error.errno))
    if isinstance(error, TimeoutError):  # of a wait in a library, also where the clock has jumped
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
