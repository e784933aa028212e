"""Shard files: checked, opened for random access, and kept open up to a limit.

A dataset may have more shards than a process may open files. Each process keeps at most `MOST_OPEN` shards open over
all datasets, or half its limit of open files if that is lower; the least recently read shard is closed first. A shard
that cannot be read because the machine fails (too many open files, a disk that does not respond) is not reported as
damaged: see `environment.patiently`.
"""

import collections
import functools
import itertools
import pathlib
import threading
import weakref
from typing import Any

from array_record.python import array_record_module

from pera_jax.common import environment
from pera_jax.common.errors import UserError
from pera_jax.common.text import printable

MOST_OPEN = 4096  # an open shard takes about 10 kB
_READER_THREADS = 64  # started by ArrayRecord with the first shard of a process; it hangs if that fails


class OpenShards:
    """The open shards of a process. Thread-safe."""

    def __init__(self):
        self._readers = collections.OrderedDict()  # (owner, file) -> reader, most recently read last
        self._lock = threading.Lock()
        self._owners = itertools.count()
        self._gone = collections.deque()  # garbage collected owners; a finalizer must not take a lock

    def owner(self, holder: Any) -> int:
        """An id for the shards that `holder` opens; they are closed when `holder` is garbage collected."""
        number = next(self._owners)
        weakref.finalize(holder, self._gone.append, number).atexit = False
        return number

    def read(self, owner: int, file: pathlib.Path, index: int) -> bytes:
        """Record `index` of a shard. Raises RuntimeError for a damaged shard or record, EnvironmentFault."""

        def attempt() -> bytes:
            try:
                return self._reader(owner, file).read([index])[0]
            except Exception as error:
                if environment.environment_fault(error):  # the reader stays in that state
                    self._forget((owner, file))
                raise

        return environment.patiently(attempt, _unread(file), self.relieve)

    def close(self, owner: int) -> None:
        """Closes the shards of an owner; a later read reopens them."""
        self._gone.append(owner)
        with self._lock:
            self._close_gone()

    def relieve(self) -> None:
        """Closes half of the shards, to free files and memory."""
        with self._lock:
            self._shrink(len(self._readers) // 2)

    def _reader(self, owner: int, file: pathlib.Path):
        most = max(min(MOST_OPEN, prepare() // 2), 1)
        with self._lock:
            if (owner, file) in self._readers:
                self._readers.move_to_end((owner, file))
                return self._readers[owner, file]
            self._close_gone()
        reader = _opened(file)
        with self._lock:
            self._readers[owner, file] = reader
            self._shrink(most)
        return reader

    def _close_gone(self) -> None:
        gone = {self._gone.popleft() for _ in range(len(self._gone))}
        for key in [key for key in self._readers if key[0] in gone] if gone else ():
            del self._readers[key]  # closes the file; `.close()` would raise for a damaged one

    def _shrink(self, most: int) -> None:
        while len(self._readers) > most:
            self._readers.popitem(last=False)  # closes the file once no thread reads from it

    def _forget(self, key: tuple[int, pathlib.Path]) -> None:
        with self._lock:
            self._readers.pop(key, None)


OPEN = OpenShards()


@functools.cache
def prepare() -> int:
    """Prepares a process for its first shard; returns its limit of open files.

    Raises RuntimeError, a failure of the machine, if there is no memory for the threads of ArrayRecord.
    """
    environment.check_threads(_READER_THREADS)
    return environment.raise_file_limit()


def open_shard(file: pathlib.Path) -> array_record_module.ArrayRecordReader:
    """A reader for random access. Raises RuntimeError for a missing or damaged shard, EnvironmentFault."""
    return environment.patiently(lambda: _opened(file), _unread(file), OPEN.relieve)


def check_shard(file: pathlib.Path, records: int, size: int | None = None) -> None:
    """Raises UserError if the shard is missing, truncated, or has an unexpected number of records or bytes.

    Raises EnvironmentFault if the machine fails.
    """
    found = size_of(file)
    if found is None:
        raise UserError(f"shard {printable(file)} is missing; copy the whole dataset folder again, or convert it again")
    if size is not None and found != size:
        raise UserError(
            f"shard {printable(file)} is damaged: expected {size} bytes, got {found}; copy or convert it again"
        )
    try:
        reader = open_shard(file)
    except RuntimeError as error:
        raise UserError(f"shard {printable(file)} is truncated or damaged; copy or convert it again") from error
    held = reader.num_records()
    reader.close()
    if held != records:
        raise UserError(
            f"shard {printable(file)} is damaged: expected {records} records, got {held}; copy or convert it again"
        )


def size_of(file: pathlib.Path) -> int | None:
    """Size of a shard in bytes, None if there is no such file. Raises EnvironmentFault."""
    return environment.patiently(lambda: file.stat().st_size if file.is_file() else None, _unread(file))


def _unread(file: pathlib.Path) -> str:
    return f"shard {printable(file)} cannot be read"


def _opened(file: pathlib.Path) -> array_record_module.ArrayRecordReader:
    prepare()
    # Read-ahead is for sequential reading and would cost 16 MB of buffer per open shard.
    reader = array_record_module.ArrayRecordReader(str(file), "readahead_buffer_size:0,max_parallelism:0")
    if not reader.ok():
        reader.close()  # raises the reason
    return reader
