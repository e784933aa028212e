"""Files that are written whole or not at all."""

import contextlib
import json
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

from pera_jax.common import lease, paths
from pera_jax.common.errors import UserError


def write(path: pathlib.Path, content: bytes) -> None:
    """Writes a file whole or not at all, with its folder. Raises OSError."""
    paths.local(path).parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # nothing where the rename came


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes JSON, as `write`."""
    write(path, (json.dumps(value, indent=1) + "\n").encode("ascii"))


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
        raise UserError(f"{path} is already there; choose another --output, or remove it")
    temporary = path.with_name(path.name + ".tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # of a command that was killed
        temporary.mkdir(parents=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; make room or choose another --output") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
