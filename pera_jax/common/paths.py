"""Paths that the program takes: files and folders of this machine, and of what is mounted there."""

import os
import pathlib
import re
from typing import TypeVar

from pera_jax.common.errors import UserError
from pera_jax.common.text import printable

P = TypeVar("P", bound=str | os.PathLike)

# pathlib makes one slash of the two of "gs://", so that one is enough; a drive's letter is no scheme.
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+:/", re.IGNORECASE)
_NAMED = "tfds:"  # a data set's name, or its folder behind the colon


def local(path: P, name: str = "") -> P:
    """`path` as it is.

    Args:
      path: what a user gave; of several with commas between each is looked at. "" is no path, and passes.
      name: of the option or field it came from, for the message.

    Raises:
      UserError: it is an address (gs://, s3://, https://, ...), which would be taken for a folder of that name here.
    """
    for part in str(os.fspath(path)).split(","):
        if _ADDRESS.match(part.strip().removeprefix(_NAMED)):
            said = f"{name}={printable(part)}" if name else printable(part)
            raise UserError(f"{said} is an address, and only local paths are read and written; mount it or copy it, "
                            "and name the folder")  # fmt: skip
    return path


def local_path(text: str) -> pathlib.Path:
    """`local` as a path: the `type` of an option that takes one. Raises UserError."""
    return pathlib.Path(local(text))
