"""Exact duplicates: inputs with the same bytes as one before them."""

import functools
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from data_prep.convert import pixels, processes
from data_prep.convert.shards import Item
from pera_jax.common.errors import UserError
from pera_jax.common.progress import Progress
from pera_jax.data import codecs

_AT_ONCE = 256  # items that a worker hashes before it asks for more
_BYTES = 16  # of a hash


def find(items: Sequence[Item], read: Callable[[Item], bytes], workers: int) -> list[int]:
    """The places, in order, of items with the same bytes as one before them; all are read, on `workers` processes.

    `read` gives the bytes of an item, or raises ImageDecodeError: such an item is no duplicate. It must be picklable.
    Raises UserError when a worker dies, or the search is interrupted.
    """
    hashes = bytearray(_BYTES * len(items))

    def tasks() -> Iterator[tuple[int, list[Item]]]:
        for first in range(0, len(items), _AT_ONCE):
            yield first, items[first : first + _AT_ONCE]

    try:
        with Progress(len(items), "files", "duplicates") as progress:
            for _, (first, found) in processes.run(tasks(), functools.partial(_hash, read=read), workers):
                hashes[_BYTES * first : _BYTES * first + len(found)] = found
                progress.update(len(found) // _BYTES)
    except KeyboardInterrupt as error:
        raise UserError("interrupted while looking for duplicates; the same command begins with that again") from error
    except processes.WorkFailed as error:
        raise UserError(f"looking for duplicates failed: {error}; give the same command again") from error
    return later_equals(bytes(hashes)).tolist()


def _hash(task: tuple[int, list[Item]], say: Callable, read: Callable[[Item], bytes]) -> tuple[int, bytes]:
    first, items = task
    found = bytearray()
    for item in items:
        try:
            content = read(item)
        except codecs.ImageDecodeError:
            content = f"unread {item.path} {item.key}".encode()  # a hash of its own
        found += pixels.content_hash(content)
    return first, bytes(found)


def later_equals(hashes: bytes) -> np.ndarray:
    """The places, in order, of those hashes of 16 bytes that stand at an earlier place, too: int64."""
    halves = np.frombuffer(hashes, np.uint64).reshape(-1, 2)
    order = np.lexsort(halves.T)  # stable: of equal ones the first stays first
    equal = (halves[order[1:]] == halves[order[:-1]]).all(axis=1)
    return np.sort(order[1:][equal])
