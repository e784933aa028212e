"""Arrays that are made once and kept in a folder, by what they are made of."""

import hashlib
import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np

from pera_jax import distributed, files
from pera_jax.errors import UserError

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
    """A folder of arrays; each set lies in a folder of its own, beside the description that names it."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder

    def arrays(self, described: dict[str, Any], make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """The arrays of this description (JSON): those in the folder, else those that `make` gives, which are kept.

        With several hosts all must call it; the first one writes. Raises UserError where that fails.
        """
        text = json.dumps(described | {"version": _VERSION}, sort_keys=True, indent=1)
        place = self.folder / hashlib.sha256(text.encode()).hexdigest()[:24]
        try:
            found = None if not place.is_dir() else {
                file.stem: np.load(file) for file in sorted(place.glob("*.npy"))
            }
        except (OSError, ValueError):
            found = None  # a file that is cut off or was taken away is made anew
        if not distributed.anywhere(not found):
            return found
        made = make()
        if distributed.main_host():
            self._write(place, text, made)
        return made

    def clear(self) -> None:
        """Takes the folder away; the first host does."""
        if distributed.main_host():
            shutil.rmtree(self.folder, ignore_errors=True)

    def _write(self, place: pathlib.Path, text: str, arrays: dict[str, np.ndarray]) -> None:
        staging = place.with_name(f"{place.name}.tmp")
        try:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
            for name, values in arrays.items():
                np.save(staging / f"{name}.npy", values)
            files.write(staging / "of.json", text.encode() + b"\n")
            shutil.rmtree(place, ignore_errors=True)
            staging.rename(place)
        except OSError as error:
            shutil.rmtree(staging, ignore_errors=True)
            raise UserError(f"cannot write to {self.folder}: {error.strerror}; make room or choose another --output") from error
