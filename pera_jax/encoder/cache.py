"""An on-disk cache of arrays, keyed by a hash of their inputs."""

import hashlib
import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from pera_jax.common import files
from pera_jax.parallel import distributed

LARGEST = 16 * 2**30  # bytes per cache folder
_VERSION = 1  # of the computation of features; raise it to invalidate cached arrays


def digest(tree: Any) -> str:
    """SHA-256 of the names and values of nested dicts of arrays, as hexadecimal digits."""
    found = hashlib.sha256()

    def add(node, path):
        if isinstance(node, dict):
            for name in sorted(node):
                add(node[name], f"{path}/{name}")
        else:
            values = np.ascontiguousarray(node)
            found.update(f"{path} {values.dtype} {values.shape}\n".encode())
            found.update(values)

    add(tree, "")
    return found.hexdigest()


class Cache:
    """A folder with one file per set of arrays; the file name is a hash of the key, and the file stores the key too.

    Best effort: arrays that cannot be cached are computed again.
    """

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self._used: set[pathlib.Path] = set()  # by this object; other jobs may use the same folder

    def arrays(self, key: dict[str, Any], compute: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """The cached arrays of `key`, or else the result of `compute()`, which is cached.

        A collective: all processes must call it; only the main process writes.

        Args:
          key: what the arrays depend on, as JSON values.
        """
        text = json.dumps(key | {"version": _VERSION}, sort_keys=True, indent=1)
        place = self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.npz"
        found = _read(place, text)
        self._used.add(place)
        if not distributed.any_host(found is None):
            return found
        made = compute()
        if distributed.main_host():
            self._write(place, text, made)
        return made

    def clear(self) -> None:
        """Deletes the files that this object has read or written."""
        for place in self._used:
            place.unlink(missing_ok=True)
        self._used = set()

    def _write(self, place: pathlib.Path, text: str, arrays: dict[str, np.ndarray]) -> None:
        temporary = place.with_name(f"{place.name}.{os.getpid()}.tmp")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            size = sum(values.nbytes for values in arrays.values())
            if size + sum(file.stat().st_size for file in self.folder.glob("*.npz")) > LARGEST:
                return
            with files.replacing(place, temporary), open(temporary, "wb") as file:  # savez would append .npz to a name
                np.savez(file, of=np.array(text), **arrays)
        except OSError as error:
            distributed.say(f"warning: cannot cache features in {self.folder}: {error.strerror}")


def _read(place: pathlib.Path, text: str) -> dict[str, np.ndarray] | None:
    """The arrays of a file; None if it does not exist, is damaged, or has another key than `text`."""
    try:
        with np.load(place) as found:
            arrays = {name: found[name] for name in found.files}  # zipfile checks the CRC of each
    except Exception:  # NumPy and zipfile raise nearly anything on damaged files; recompute then
        return None
    return arrays if str(arrays.pop("of", "")) == text else None
