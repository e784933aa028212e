"""JSON that the program reads, checked against a type before anything uses it.

The type is a dataclass (or a TypedDict, `dict[str, Finite]`, ...); fields that it does not name are passed over, so that
a file of a later version can be read. What does not fit is told in one sentence that names the field.
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
"""A number that is not NaN and not infinite."""
Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 53)]
Positive = Annotated[int, msgspec.Meta(ge=1, le=1 << 53)]
Name = Annotated[str, msgspec.Meta(min_length=1)]
FileName = Annotated[str, msgspec.Meta(max_length=255, pattern=r"\A(?!\.{1,2}\Z)[^/\x00]+\Z")]
"""The name of a file in the folder that says so: never a path that leads out of it."""

_PLACE = re.compile(r" - at (`key` in )?`\$(.*)`\Z", re.DOTALL)
_NUMBER_BOUND = re.compile(r"Expected `float` [<>]= -?1e\+300")
_NAME_PATTERN = re.compile(r"Expected `str` matching regex .*", re.DOTALL)


class Invalid(ValueError):
    """JSON that is none, or of another type; the message names the field."""


def loads(content: bytes | str) -> Any:
    """The value that a JSON text holds. Raises Invalid."""
    try:
        value = json.loads(content)
        if "\\ud" in (content if isinstance(content, str) else content.decode("ascii", "replace")).lower():
            json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogateescape")  # undecodable bytes of names may stay
    except UnicodeError as error:
        raise Invalid("it holds bytes or escapes that are no text in UTF-8") from error
    except RecursionError as error:
        raise Invalid("it is nested too deeply") from error
    except ValueError as error:
        raise Invalid(f"it is no JSON ({printable(error)})") from error
    return value


def convert(value: Any, kind: type[T]) -> T:
    """`value`, as `loads` gives it, as a `kind`. Raises Invalid."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise Invalid(_sentence(str(error))) from error
    except UnicodeEncodeError as error:  # msgspec looks whether a text that is none in UTF-8 is a number
        raise Invalid("a field that is no text holds one that is not UTF-8") from error
    except RecursionError as error:
        raise Invalid("it is nested too deeply") from error


def parse(content: bytes | str, kind: type[T]) -> T:
    """A JSON text as a `kind`. Raises Invalid."""
    return convert(loads(content), kind)


def read(file: pathlib.Path, kind: type[T], fix: str) -> T:
    """A JSON file as a `kind`.

    Args:
        fix: what the user can do about a file that does not fit, the end of the sentence.

    Raises:
        UserError: the file cannot be read, holds no JSON, or JSON of another type; names the field.
    """
    try:
        return parse(file.read_bytes(), kind)
    except OSError as error:
        raise UserError(f"{printable(file)} cannot be read ({error.strerror or error}); {fix}") from error
    except Invalid as error:
        raise UserError(f"{printable(file)} is damaged: {error}; {fix}") from error


def _sentence(error: str) -> str:
    """msgspec's message with the field in front: "splits[...].records: expected int, got str"."""
    found = _PLACE.search(error)
    place = found[2].lstrip(".") if found else ""
    said = error[: found.start()] if found else error
    said = _NUMBER_BOUND.sub("Expected a finite number", said)
    said = _NAME_PATTERN.sub("Expected the name of a file in this folder", said)
    said = said.replace("Object missing required field", "Missing field").replace("`", "").replace("Invalid enum value", "Unknown value")
    said = said[:1].lower() + said[1:]
    return printable(f"{place}: {said}" if place else said)
