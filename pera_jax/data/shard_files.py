"""Shards as files: checked, opened for random access, and kept open up to a bound.

A data set may have more shards than a process may open files. Each process keeps at most `MOST_OPEN` shards open, of all
data sets together, or half as many as the files that it may open where those are fewer; the one that was read least
recently is closed for the next. A shard that cannot be opened or read because the machine fails (too many open files, a
disk that does not answer) is no damaged one: see `environment.patiently`.
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
_READER_THREADS = 64  # that ArrayRecord starts with the first shard of a process; if it cannot, it waits for ever


class OpenShards:
    """The shards that a process keeps open. Any number of threads may read."""

    def __init__(self):
        self._readers = collections.OrderedDict()  # (owner, file) -> reader, the one read last at the end
        self._lock = threading.Lock()
        self._owners = itertools.count()
        self._gone = collections.deque()  # owners that were collected: at any moment, so that no lock can be taken then

    def owner(self, holder: Any) -> int:
        """A number under which `holder` opens shards; they are closed when it is collected."""
        number = next(self._owners)
        weakref.finalize(holder, self._gone.append, number).atexit = False
        return number

    def read(self, owner: int, file: pathlib.Path, place: int) -> bytes:
        """Record `place` of a shard. Raises RuntimeError for a damaged shard or record, EnvironmentFault."""

        def attempt() -> bytes:
            try:
                return self._reader(owner, file).read([place])[0]
            except Exception as error:
                if environment.environment_fault(error):  # the reader stays in that state
                    self._forget((owner, file))
                raise

        return environment.patiently(attempt, _unread(file), self.relieve)

    def close(self, owner: int) -> None:
        """Closes the shards of an owner; a later read opens them again."""
        self._gone.append(owner)
        with self._lock:
            self._close_gone()

    def relieve(self) -> None:
        """Closes half of the shards: what holds the rest of the files, or of the memory, is not known."""
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
            del self._readers[key]  # closes the file; `.close()` would raise what is wrong with a damaged one

    def _shrink(self, most: int) -> None:
        while len(self._readers) > most:
            self._readers.popitem(last=False)  # closes the file, once no thread reads from it any more

    def _forget(self, key: tuple[int, pathlib.Path]) -> None:
        with self._lock:
            self._readers.pop(key, None)


OPEN = OpenShards()


@functools.cache
def prepare() -> int:
    """What a process needs before it opens its first shard; returns how many files it may open.

    Raises RuntimeError, a fault of the machine, where there is no memory for the threads of ArrayRecord.
    """
    environment.check_threads(_READER_THREADS)
    return environment.raise_file_limit()


def open_shard(file: pathlib.Path) -> array_record_module.ArrayRecordReader:
    """A reader for random access. Raises RuntimeError for a shard that is missing or damaged, EnvironmentFault."""
    return environment.patiently(lambda: _opened(file), _unread(file), OPEN.relieve)


def check_shard(file: pathlib.Path, records: int, size: int | None = None) -> None:
    """Raises UserError if the shard is missing, truncated, or holds another number of records or bytes.

    It is an EnvironmentFault where nobody can tell, because the machine fails.
    """
    found = size_of(file)
    if found is None:
        raise UserError(f"shard {printable(file)} is missing; copy the data set folder whole, or convert it anew")
    if size is not None and found != size:
        raise UserError(
            f"shard {printable(file)} is damaged: it has {found} bytes instead of {size}; copy or convert it anew"
        )
    try:
        reader = open_shard(file)
    except RuntimeError as error:
        raise UserError(f"shard {printable(file)} is truncated or damaged; copy or convert it anew") from error
    held = reader.num_records()
    reader.close()
    if held != records:
        raise UserError(
            f"shard {printable(file)} holds {held} records instead of {records}; copy or convert it anew"
        )


def size_of(file: pathlib.Path) -> int | None:
    """The bytes of a shard, None where there is no such file. Raises EnvironmentFault."""
    return environment.patiently(lambda: file.stat().st_size if file.is_file() else None, _unread(file))


def _unread(file: pathlib.Path) -> str:
    return f"shard {printable(file)} cannot be read"


def _opened(file: pathlib.Path) -> array_record_module.ArrayRecordReader:
    prepare()
    # Read-ahead and threads serve sequential reading, and each open shard would hold 16 MB of buffer for it.
    reader = array_record_module.ArrayRecordReader(str(file), "readahead_buffer_size:0,max_parallelism:0")
    if not reader.ok():
        reader.close()  # raises what is wrong
    return reader
