"""Reading JSON, validated against a type before use.

The type is a dataclass (or a TypedDict, `dict[str, Finite]`, ...). Unknown fields are ignored, so files of later
versions can be read. A mismatch is reported in one sentence that names the field.
"""

import json
import pathlib
import re
from typing import Annotated, Any, TypeVar

import msgspec

from pera_jax.common.errors import UserError
from pera_jax.common.text import printable

T = TypeVar("T")

_MOST = 1e300
Finite = Annotated[float, msgspec.Meta(ge=-_MOST, le=_MOST)]
"""A float that is neither NaN nor infinite."""
Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 53)]
Positive = Annotated[int, msgspec.Meta(ge=1, le=1 << 53)]
Name = Annotated[str, msgspec.Meta(min_length=1)]
FileName = Annotated[str, msgspec.Meta(max_length=255, pattern=r"\A(?!\.{1,2}\Z)[^/\x00]+\Z")]
"""The name of a file in the same folder: never a path that leads out of it."""

_PLACE = re.compile(r" - at (`key` in )?`\$(.*)`\Z", re.DOTALL)
_NUMBER_BOUND = re.compile(r"Expected `float` [<>]= -?1e\+300")
_NAME_PATTERN = re.compile(r"Expected `str` matching regex .*", re.DOTALL)


class Invalid(ValueError):
    """The text is not valid JSON, or does not match the type; the message names the field."""


def loads(content: bytes | str) -> Any:
    """Parses a JSON text. Raises Invalid."""
    try:
        value = json.loads(content)
        if "\\ud" in (content if isinstance(content, str) else content.decode("ascii", "replace")).lower():
            # escapes of undecodable bytes in file names are allowed
            json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogateescape")
    except UnicodeError as error:
        raise Invalid("it contains bytes or escapes that are not valid UTF-8") from error
    except RecursionError as error:
        raise Invalid("it is nested too deeply") from error
    except ValueError as error:
        raise Invalid(f"it is not valid JSON ({printable(error)})") from error
    return value


def convert(value: Any, kind: type[T]) -> T:
    """Converts a value from `loads` to type `kind`. Raises Invalid."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise Invalid(_sentence(str(error))) from error
    except UnicodeEncodeError as error:  # msgspec tries to parse a string that is not valid UTF-8 as a number
        raise Invalid("a field contains a string that is not valid UTF-8") from error
    except RecursionError as error:
        raise Invalid("it is nested too deeply") from error


def parse(content: bytes | str, kind: type[T]) -> T:
    """Parses a JSON text as type `kind`. Raises Invalid."""
    return convert(loads(content), kind)


def read(file: pathlib.Path, kind: type[T], fix: str) -> T:
    """Reads a JSON file as type `kind`.

    Args:
        fix: how to fix an invalid file, the end of the message.

    Raises:
        UserError: the file cannot be read, is not valid JSON, or does not match the type; the message names the field.
    """
    try:
        return parse(file.read_bytes(), kind)
    except OSError as error:
        raise UserError(f"{printable(file)} cannot be read ({error.strerror or error}); {fix}") from error
    except Invalid as error:
        raise UserError(f"{printable(file)} is damaged: {error}; {fix}") from error


def _sentence(error: str) -> str:
    """msgspec's message, with the field first: "splits[...].records: expected int, got str"."""
    found = _PLACE.search(error)
    place = found[2].lstrip(".") if found else ""
    said = error[: found.start()] if found else error
    said = _NUMBER_BOUND.sub("Expected a finite number", said)
    said = _NAME_PATTERN.sub("Expected the name of a file in this folder", said)
    said = (
        said.replace("Object missing required field", "Missing field")
        .replace("`", "")
        .replace("Invalid enum value", "Unknown value")
    )
    said = said[:1].lower() + said[1:]
    return printable(f"{place}: {said}" if place else said)
