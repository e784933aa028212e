"""Exact duplicates: inputs with the same bytes as an earlier input."""

import functools
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from data_prep.convert import pixels, processes
from data_prep.convert.shards import Item
from pera_jax.common.errors import UserError
from pera_jax.common.progress import Progress
from pera_jax.data import codecs

_AT_ONCE = 256  # items per task
_BYTES = 16  # per hash


def find(items: Sequence[Item], read: Callable[[Item], bytes], workers: int) -> list[int]:
    """The ascending indices of items with the same bytes as an earlier item.

    Args:
      read: returns the bytes of an item, or raises ImageDecodeError for an item that is not a duplicate; picklable.
      workers: number of processes that read the items.

    Raises:
      UserError: a worker died, or the search was interrupted.
    """
    hashes = bytearray(_BYTES * len(items))

    def tasks() -> Iterator[tuple[int, list[Item]]]:
        for first in range(0, len(items), _AT_ONCE):
            yield first, items[first : first + _AT_ONCE]

    try:
        with Progress(len(items), "files", "duplicates") as progress:
            for _, _, (first, found) in processes.run(tasks(), functools.partial(_hash, read=read), workers):
                hashes[_BYTES * first : _BYTES * first + len(found)] = found
                progress.update(len(found) // _BYTES)
    except KeyboardInterrupt as error:
        raise UserError(
            "interrupted during the search for duplicates; re-run the same command to start it again"
        ) from error
    except processes.WorkFailed as error:
        raise UserError(f"the search for duplicates failed: {error}; re-run the same command") from error
    return later_equals(bytes(hashes)).tolist()


def _hash(task: tuple[int, list[Item]], send: Callable, read: Callable[[Item], bytes]) -> tuple[int, bytes]:
    first, items = task
    found = bytearray()
    for item in items:
        try:
            content = read(item)
        except codecs.ImageDecodeError:
            content = f"unread {item.path} {item.key}".encode()  # a unique hash
        found += pixels.content_hash(content)
    return first, bytes(found)


def later_equals(hashes: bytes) -> np.ndarray:
    """The ascending indices, int64, of 16-byte hashes that also occur earlier."""
    halves = np.frombuffer(hashes, np.uint64).reshape(-1, 2)
    order = np.lexsort(halves.T)  # stable: the first of equal hashes stays first
    equal = (halves[order[1:]] == halves[order[:-1]]).all(axis=1)
    return np.sort(order[1:][equal])
