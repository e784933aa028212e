"""Files that a command may replace: those that this program wrote. What anyone else has put there stays."""

import io
import json
import pathlib
from collections.abc import Callable
from typing import Any

from PIL import Image, PngImagePlugin

from pera_jax.common.errors import UserError
from pera_jax.common.text import printable

_BY = "pera_jax"
_HEAD = 1 << 16  # bytes in which a mark is looked for
_MARKS = (
    b"default-src 'none'; img-src data:; style-src 'unsafe-inline'",  # the policy of each page that `html` writes
    b"tEXtSoftware\0" + _BY.encode(),  # `png`
    b'{\n "written_by": "' + _BY.encode() + b'"',  # `json_text`
    b"band,pixels,minimum,",  # the tables of `data_prep.stats`
    b"name,task,score,value,",  # and of the probes
)


def png(image: Image.Image, **options) -> bytes:
    """The image as a PNG that says who wrote it; `options` of Pillow."""
    content, said = io.BytesIO(), PngImagePlugin.PngInfo()
    said.add_text("Software", _BY)
    image.save(content, "PNG", pnginfo=said, **options)
    return content.getvalue()


def json_text(value: dict[str, Any]) -> bytes:
    """The value as JSON that says who wrote it."""
    return (json.dumps({"written_by": _BY, **value}, indent=1) + "\n").encode("ascii")


def marked(file: pathlib.Path) -> bool:
    """Whether a page, picture, table or JSON of this program is in a file."""
    with open(file, "rb") as opened:
        head = opened.read(_HEAD)
    return any(mark in head for mark in _MARKS)


def check(file: pathlib.Path, own: Callable[[pathlib.Path], bool] = marked, fix: str = "--output") -> None:
    """Raises UserError where a file is there that this program did not write; an empty one is no loss.

    Args:
      own: tells whether it is a file of this program.
      fix: the option that names another file.
    """
    try:
        foreign = file.is_file() and file.stat().st_size > 0 and not own(file)
    except OSError as error:
        raise UserError(f"cannot write {printable(file)}: {error.strerror}; choose another {fix}") from error
    if foreign:
        raise UserError(
            f"{printable(file)} is there, and this command did not write it; choose another {fix}, or move the file away"
        )
