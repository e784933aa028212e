"""Arrays that are made once and kept in a folder, by what they are made of."""

import hashlib
import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from pera_jax.parallel import distributed

LARGEST = 16 * 2**30  # bytes that a folder holds
_VERSION = 1  # of how features are computed; another one makes them anew


def digest(tree: Any) -> str:
    """SHA-256 over names and values of a tree of nested dicts of arrays, in hexadecimal."""
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
    """A folder of arrays, a file for each set; its name is a hash of what the arrays are made of, which it holds too.

    An aid: what cannot be kept is made anew.
    """

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self._used: set[pathlib.Path] = set()  # by this object: another job may write beside it

    def arrays(self, described: dict[str, Any], make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """The arrays of this description (JSON): those in the folder, else those that `make` gives, which are kept.

        With several hosts all must call it; the first one writes.
        """
        text = json.dumps(described | {"version": _VERSION}, sort_keys=True, indent=1)
        place = self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.npz"
        found = _read(place, text)
        self._used.add(place)
        if not distributed.any_host(found is None):
            return found
        made = make()
        if distributed.main_host():
            self._write(place, text, made)
        return made

    def clear(self) -> None:
        """Takes away what this object has read or made."""
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
            with open(temporary, "wb") as file:
                np.savez(file, of=np.array(text), **arrays)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, place)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            distributed.say(f"features are not kept in {self.folder}: {error.strerror}")


def _read(place: pathlib.Path, text: str) -> dict[str, np.ndarray] | None:
    """The arrays of a file; None where there is none, it is damaged, or they are of something else than `text`."""
    try:
        with np.load(place) as found:
            arrays = {name: found[name] for name in found.files}  # zip's checksum of each is compared
    except Exception:  # on damaged bytes NumPy and zipfile raise nearly anything; what they held is made anew
        return None
    return arrays if str(arrays.pop("of", "")) == text else None
