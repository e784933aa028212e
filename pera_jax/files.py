"""Files that are written whole or not at all."""

import json
import os
import pathlib
from typing import Any


def write(path: pathlib.Path, content: bytes) -> None:
    """Writes a file whole or not at all, with its folder. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
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
