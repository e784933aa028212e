"""Files that are written whole or not at all."""

import contextlib
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

from pera_jax.common import lease, paths
from pera_jax.common.errors import UserError


@contextlib.contextmanager
def replacing(path: pathlib.Path, temporary: pathlib.Path | None = None) -> Iterator[pathlib.Path]:
    """Yields a temporary path to write a file to; at the end the file is synced to disk and renamed to `path`.

    After an exception `path` is as before.

    Args:
      temporary: on the same file system as `path`; by default `path` with ".tmp" appended, which the next writer of
        `path` overwrites. If several processes may write `path` at once, give each its own.

    Raises:
      OSError: the file cannot be written.
    """
    temporary = temporary or path.with_name(paths.local(path).name + ".tmp")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # already renamed after a success
    sync(path.parent)


def write(path: pathlib.Path, content: bytes, temporary: pathlib.Path | None = None) -> None:
    """Writes a whole file or none, see `replacing`; creates its folder if missing. Raises OSError."""
    paths.local(path).parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, temporary) as place:
        place.write_bytes(content)


def check_writable(path: pathlib.Path) -> None:
    """Raises OSError if `path` could not be written, where its folders may not exist yet; leaves no files behind."""
    there = next(place for place in path.absolute().parents if place.exists())
    with tempfile.TemporaryFile(dir=there):
        pass


def as_json(value: Any) -> bytes:
    """JSON text as this project writes it: ASCII, indented, with a final newline."""
    return (json.dumps(value, indent=1) + "\n").encode("ascii")


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes `value` as JSON, see `write`."""
    write(path, as_json(value))


def sync(path: pathlib.Path) -> None:
    """Waits until a file, or the list of names in a folder, is on disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def whole_folder(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder to write into that becomes `path` when all has gone well, and is removed otherwise.

    Raises:
      UserError: `path` is there and not an empty folder, cannot be written, or another process writes it just now.
    """
    path = paths.local(path).absolute()
    with lease.held(path.parent, "--output", name=f".{path.name}.lease", what=path):
        with _whole_folder(path) as temporary:
            yield temporary


@contextlib.contextmanager
def _whole_folder(path: pathlib.Path) -> Iterator[pathlib.Path]:
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(f"{path} already exists; choose another --output, or remove it")
    temporary = path.with_name(path.name + ".tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # of a command that was killed
        temporary.mkdir(parents=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; free disk space or choose another --output"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
