"""Paths from the command line: only local files and folders, mounted file systems included."""

import os
import pathlib
import re
from typing import TypeVar

from pera_jax.common.errors import UserError
from pera_jax.common.text import printable

P = TypeVar("P", bound=str | os.PathLike)

# One slash is enough, since pathlib collapses "gs://" to "gs:/"; a drive letter is not a scheme.
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+:/", re.IGNORECASE)
_NAMED = "tfds:"  # followed by the name or the folder of a TFDS dataset


def local(path: P, name: str = "") -> P:
    """Returns `path` unchanged.

    Args:
      path: one path, or several separated by commas; "" is accepted.
      name: the option or config field that holds it, for the message.

    Raises:
      UserError: the path is a URL (gs://, s3://, https://, ...).
    """
    for part in str(os.fspath(path)).split(","):
        if _ADDRESS.match(part.strip().removeprefix(_NAMED)):
            said = f"{name}={printable(part)}" if name else printable(part)
            raise UserError(f"{said} is a URL, and only local paths are supported; mount or copy it, and pass the "
                            "local folder")  # fmt: skip
    return path


def local_path(text: str) -> pathlib.Path:
    """`local` as a `pathlib.Path`, for the `type` of a command line option. Raises UserError."""
    return pathlib.Path(local(text))
