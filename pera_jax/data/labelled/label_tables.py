"""Tables of labels."""

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

_DELIMITERS = ",;\t"  # spreadsheets write semicolons where numbers have a decimal comma


def read_labels(file: pathlib.Path, keys: Sequence[str]) -> tuple[tuple[str, ...], np.ndarray, str]:
    """A table of labels, for the images of these keys; rows of other images are passed over.

    Tables are read as spreadsheets save them: with a byte order mark, in UTF-16, with semicolons or tabs between cells,
    blank lines, blanks around names, backslashes in keys and letters with accents in one piece or two.

    Returns:
      (class names; int64 [N], or bool [N, classes] where there is a column for each class; SHA-256 of the labels).

    Raises:
      UserError: no such file, no column `key`, an image without a row or a label, a key with two rows, a cell that is not
        0 or 1.
    """
    header, rows = _table(file)
    column = header.index("key")
    by_key, lines, as_written = {}, {}, {}
    for line, row in rows:
        key = row.pop(column)
        if key in by_key:
            raise UserError(f"line {line} of {file} is the second one of {key}; remove one")
        by_key[key], lines[key] = [cell.strip() for cell in row], line
        first = as_written.setdefault(_same(key), key)
        if by_key[first] != by_key[key]:
            raise UserError(f"lines {lines[first]} and {line} of {file} give {printable(key)} other labels; remove one")
    found = [key if key in by_key else as_written.get(_same(key)) for key in keys]
    missing = [key for key, row in zip(keys, found, strict=True) if row is None]
    if missing:
        raise UserError(f"{file} has no label for the images {several(missing)}; add a row whose key is that name")
    names = tuple(name for name in header if name != "key")
    if names == ("label",):
        unlabelled = [row for row in found if not by_key[row][0]]
        if unlabelled:
            raise UserError(
                f"line {lines[unlabelled[0]]} of {file} has an empty label for the image {unlabelled[0]} "
                f"({len(unlabelled):,} such images); fill it in, or remove the image"
            )
        names = tuple(sorted({cells[0] for cells in by_key.values()} - {""}))
        places = {name: number for number, name in enumerate(names)}
        values = np.array([places[by_key[row][0]] for row in found], np.int64)
    else:
        for row in found:
            wrong = [cell for cell in by_key[row] if cell not in ("0", "1")]
            if wrong:
                raise UserError(f"{file} has {printable(wrong[0])!r} for the image {row}, which is neither 0 nor 1; mend it")
        values = np.array([[cell == "1" for cell in by_key[row]] for row in found], bool)
    classes.check(names, file)
    return names, values, hashlib.sha256(repr(names).encode() + values.tobytes()).hexdigest()


def _same(key: str) -> str:
    """What is equal for two spellings of one key: Windows writes backslashes, macOS accents as letters of their own, and
    spreadsheets keep blanks around cells."""
    return unicodedata.normalize("NFC", key.strip().replace("\\", "/"))


def _table(file: pathlib.Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """The header of a table, and each row that is not blank with the number of its line. Raises UserError."""
    try:
        text = decoded(file.read_bytes())
        delimiter = max(_DELIMITERS, key=text.partition("\n")[0].count)
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
        rows = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    except OSError as error:
        raise UserError(f"the table of labels {file} cannot be read: {error.strerror}") from error
    except (ValueError, csv.Error) as error:
        raise UserError(f"the table of labels {file} cannot be read ({error}); give a CSV file") from error
    header = [name.strip() for name in rows[0][1]] if rows else []
    while header and not header[-1]:  # empty columns to the right of a table
        header.pop()
    if len(header) < 2 or "key" not in header or "" in header or len(set(header)) < len(header):
        raise UserError(
            f"{file} must have the column key and a column label, or one for each class, each once; it has "
            f"{several(header, 5) or 'no column'}"
        )
    for place, (line, row) in enumerate(rows):
        if len(row) < len(header) or any(cell.strip() for cell in row[len(header) :]):
            raise UserError(f"line {line} of {file} has {len(row)} cells instead of {len(header)}; mend it")
        rows[place] = line, row[: len(header)]
    return header, rows[1:]
