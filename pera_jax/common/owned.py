"""Output files that a command may overwrite: only files that this program wrote itself."""

import io
import json
import pathlib
from collections.abc import Callable
from typing import Any

from PIL import Image, PngImagePlugin

from pera_jax.common.errors import UserError
from pera_jax.common.text import printable

_BY = "pera_jax"
_HEAD = 1 << 16  # bytes that are searched for a marker
_MARKS = (
    # the content security policy of every page from `html`
    b"default-src 'none'; img-src data:; style-src 'unsafe-inline'",
    b"tEXtSoftware\0" + _BY.encode(),  # `png`
    b'{\n "written_by": "' + _BY.encode() + b'"',  # `json_text`
    b"band,pixels,minimum,",  # the tables of `data_prep.stats`
    b"name,task,score,value,",  # and of `pera_jax.probe`
)


def png(image: Image.Image, **options) -> bytes:
    """Encodes an image as a PNG with a marker of this program; `options` are passed to Pillow."""
    content, said = io.BytesIO(), PngImagePlugin.PngInfo()
    said.add_text("Software", _BY)
    image.save(content, "PNG", pnginfo=said, **options)
    return content.getvalue()


def json_text(value: dict[str, Any]) -> bytes:
    """Encodes a dict as JSON with a marker of this program."""
    return (json.dumps({"written_by": _BY, **value}, indent=1) + "\n").encode("ascii")


def marked(file: pathlib.Path) -> bool:
    """Whether a file is a page, picture, table or JSON file that this program wrote."""
    with open(file, "rb") as opened:
        head = opened.read(_HEAD)
    return any(mark in head for mark in _MARKS)


def check(file: pathlib.Path, own: Callable[[pathlib.Path], bool] = marked, fix: str = "--output") -> None:
    """Raises UserError if `file` exists and this program did not write it; empty files may be overwritten.

    Args:
      own: returns whether a file was written by this program.
      fix: the option that sets the file, for the message.
    """
    try:
        foreign = file.is_file() and file.stat().st_size > 0 and not own(file)
    except OSError as error:
        raise UserError(f"cannot write {printable(file)}: {error.strerror}; choose another {fix}") from error
    if foreign:
        raise UserError(
            f"{printable(file)} already exists and was not written by this command; choose another {fix}, or move the "
            "file away"
        )
