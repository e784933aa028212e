"""Images in class folders, and tables of labels."""

import csv
import dataclasses
import hashlib
import pathlib
from collections.abc import Sequence

import numpy as np

from pera_jax.bands import RGB
from pera_jax.data import codecs
from pera_jax.errors import UserError

ENDINGS = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp")


@dataclasses.dataclass(frozen=True)
class Found:
    """The images of a folder in the order of their keys, paths below the folder of the split."""

    files: list[pathlib.Path]
    keys: list[str]
    labels: np.ndarray  # int64 [N], -1 without classes
    class_names: tuple[str, ...] | None


def list_images(folder: pathlib.Path, split: str, with_classes: bool | None) -> Found:
    """The images of FOLDER/SPLIT/CLASS/..., or of FOLDER/SPLIT/... without classes.

    Args:
      with_classes: None: with classes where each image lies at CLASS/NAME; the split may be "", the folder itself.

    Raises:
      UserError: no such folder, no image, images beside class folders.
    """
    place = folder / split
    if not place.is_dir() or (not split and with_classes is not None):
        held = ", ".join(sorted(path.name for path in folder.iterdir() if path.is_dir())) or "no folder"
        raise UserError(f"{folder} has no folder {split!r} for the split; it has {held}")
    files = sorted(
        path for path in place.rglob("*") if path.suffix.lower() in ENDINGS and path.is_file() and path.name[0] != "."
    )
    if not files:
        raise UserError(f"{place} holds no image (names ending in {' '.join(ENDINGS)}); name the folder above its splits")
    keys = [path.relative_to(place).as_posix() for path in files]
    if with_classes is None:
        with_classes = all(key.count("/") == 1 for key in keys)
    if not with_classes:
        return Found(files, keys, np.full(len(files), -1, np.int64), None)
    loose = next((path for path in files if path.parent == place), None)
    if loose:
        raise UserError(f"{loose} lies in no class folder; move it into one, or give a table with --labels")
    names = tuple(sorted({key.split("/")[0] for key in keys}))
    empty = sorted(path.name for path in place.iterdir() if path.is_dir() and path.name not in names)
    if empty:
        raise UserError(f"the class folder {place / empty[0]} holds no image; fill or remove it")
    places = {name: number for number, name in enumerate(names)}
    return Found(files, keys, np.array([places[key.split("/")[0]] for key in keys], np.int64), names)


def bands_of(file: pathlib.Path) -> tuple[tuple[str, ...], str]:
    """Names of the bands and the dtype of an image: red, green and blue of uint8, else band_1, band_2, ...

    Raises UserError where it cannot be decoded.
    """
    try:
        pixels = codecs.decode_image(file.read_bytes())
    except (OSError, codecs.ImageDecodeError) as error:
        raise UserError(f"{file} cannot be read as an image ({error}); mend or remove it") from error
    if pixels.shape[2] == 3 and pixels.dtype == np.uint8:
        return RGB, "uint8"
    return tuple(f"band_{number + 1}" for number in range(pixels.shape[2])), pixels.dtype.name


def fingerprint(found: Found) -> str:
    """SHA-256 over keys, classes and the bytes of the files, in hexadecimal."""
    digest = hashlib.sha256()
    for file, key, label in zip(found.files, found.keys, found.labels, strict=True):
        try:
            content = hashlib.sha256(file.read_bytes()).hexdigest()
        except OSError as error:
            raise UserError(f"{file} cannot be read: {error.strerror}; mend or remove it") from error
        digest.update(f"{key}\0{label}\0{content}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def read_labels(file: pathlib.Path, keys: Sequence[str]) -> tuple[tuple[str, ...], np.ndarray, str]:
    """A table of labels, for the images of these keys; rows of other images are passed over.

    Returns:
      (class names; int64 [N], or bool [N, classes] where there is a column for each class; SHA-256 of the labels).

    Raises:
      UserError: no such file, no column `key`, an image without a row, a key with two rows, a cell that is not 0 or 1.
    """
    try:
        with open(file, newline="", encoding="utf-8") as opened:
            header, *rows = list(csv.reader(opened)) or [[]]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"the table of labels {file} cannot be read ({error}); give a CSV file") from error
    if len(header) < 2 or "key" not in header or len(set(header)) < len(header):
        raise UserError(f"{file} must have the column key and a column label, or one for each class, each once")
    column = header.index("key")
    by_key = {}
    for number, row in enumerate(rows, start=2):
        if len(row) != len(header):
            raise UserError(f"line {number} of {file} has {len(row)} cells instead of {len(header)}; mend it")
        if row[column] in by_key:
            raise UserError(f"line {number} of {file} is the second one of {row[column]}; remove one")
        by_key[row[column]] = [cell for place, cell in enumerate(row) if place != column]
    missing = [key for key in keys if key not in by_key]
    if missing:
        more = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
        raise UserError(f"{file} has no label for the image {missing[0]}{more}; add a row whose key is that name")
    names = tuple(name for name in header if name != "key")
    if names == ("label",):
        names = tuple(sorted({cells[0] for cells in by_key.values()}))
        places = {name: number for number, name in enumerate(names)}
        values = np.array([places[by_key[key][0]] for key in keys], np.int64)
    else:
        for key in keys:
            wrong = [cell for cell in by_key[key] if cell not in ("0", "1")]
            if wrong:
                raise UserError(f"{file} has {wrong[0]!r} for the image {key}, which is neither 0 nor 1; mend it")
        values = np.array([[cell == "1" for cell in by_key[key]] for key in keys], bool)
    return names, values, hashlib.sha256(repr(names).encode() + values.tobytes()).hexdigest()
