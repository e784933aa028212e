"""Label tables."""

import csv
import hashlib
import io
import pathlib
import unicodedata
from collections.abc import Sequence

import numpy as np

from pera_jax.common import classes
from pera_jax.common.errors import UserError
from pera_jax.common.text import decoded, printable, several

_DELIMITERS = ",;\t"  # spreadsheets use semicolons in locales with a decimal comma


def read_labels(file: pathlib.Path, keys: Sequence[str]) -> tuple[tuple[str, ...], np.ndarray, str]:
    """Reads the labels of the images `keys` from a CSV table; rows of other images are ignored.

    Accepts what spreadsheets write: byte order marks, UTF-16, semicolons or tabs as separators, blank lines, whitespace
    around names, backslashes in keys and any Unicode normalization.

    Returns:
      (class names; int64 [N], or bool [N, classes] if there is one column per class; SHA-256 of the labels).

    Raises:
      UserError: no such file, no column `key`, an image without a row or label, a repeated key, a cell other than 0 and
        1.
    """
    header, rows = _table(file)
    column = header.index("key")
    by_key, lines, as_written = {}, {}, {}
    for line, row in rows:
        key = row.pop(column)
        if key in by_key:
            raise UserError(f"line {line} of {file} repeats the key {key}; remove one of the lines")
        by_key[key], lines[key] = [cell.strip() for cell in row], line
        first = as_written.setdefault(_same(key), key)
        if by_key[first] != by_key[key]:
            raise UserError(
                f"lines {lines[first]} and {line} of {file} give different labels for {printable(key)}; remove one of "
                "the lines"
            )
    found = [key if key in by_key else as_written.get(_same(key)) for key in keys]
    missing = [key for key, row in zip(keys, found, strict=True) if row is None]
    if missing:
        raise UserError(f"{file} has no label for the images {several(missing)}; add a row for each key")
    names = tuple(name for name in header if name != "key")
    if names == ("label",):
        unlabeled = [row for row in found if not by_key[row][0]]
        if unlabeled:
            raise UserError(
                f"line {lines[unlabeled[0]]} of {file} has an empty label for the image {unlabeled[0]} "
                f"({len(unlabeled):,} such images); add the label, or remove the image"
            )
        names = tuple(sorted({cells[0] for cells in by_key.values()} - {""}))
        places = {name: number for number, name in enumerate(names)}
        values = np.array([places[by_key[row][0]] for row in found], np.int64)
    else:
        for row in found:
            wrong = [cell for cell in by_key[row] if cell not in ("0", "1")]
            if wrong:
                raise UserError(f"{file} has {printable(wrong[0])!r} for the image {row}; expected 0 or 1")
        values = np.array([[cell == "1" for cell in by_key[row]] for row in found], bool)
    classes.check(names, file)
    return names, values, hashlib.sha256(repr(names).encode() + values.tobytes()).hexdigest()


def _same(key: str) -> str:
    """A canonical form of a key: Windows writes backslashes, macOS decomposed accents, spreadsheets extra
    whitespace."""
    return unicodedata.normalize("NFC", key.strip().replace("\\", "/"))


def _table(file: pathlib.Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """The header of a table, and (line number, cells) of each row that is not blank. Raises UserError."""
    try:
        text = decoded(file.read_bytes())
        delimiter = max(_DELIMITERS, key=text.partition("\n")[0].count)
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
        rows = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    except OSError as error:
        raise UserError(f"the label table {file} cannot be read: {error.strerror}") from error
    except (ValueError, csv.Error) as error:
        raise UserError(f"the label table {file} cannot be read ({error}); expected a CSV file") from error
    header = [name.strip() for name in rows[0][1]] if rows else []
    while header and not header[-1]:  # trailing empty columns
        header.pop()
    if len(header) < 2 or "key" not in header or "" in header or len(set(header)) < len(header):
        raise UserError(
            f"{file} must have a column key and a column label, or one column per class, without repeats; it has "
            f"{several(header, 5) or 'no columns'}"
        )
    for place, (line, row) in enumerate(rows):
        if len(row) < len(header) or any(cell.strip() for cell in row[len(header) :]):
            raise UserError(f"line {line} of {file} is invalid: expected {len(header)} cells, got {len(row)}")
        rows[place] = line, row[: len(header)]
    return header, rows[1:]
