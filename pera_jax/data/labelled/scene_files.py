"""Files of labeled scenes: finding, reading and checking images and masks."""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence

import numpy as np

from pera_jax.bands import Bands
from pera_jax.common import environment
from pera_jax.common.errors import UserError
from pera_jax.common.text import several
from pera_jax.data.images import foreign
from pera_jax.data.images.foreign import NO_LABEL as IGNORE

MASK_ENDINGS = (".png", ".tif", ".tiff")


class UnreadableScene(UserError):
    """A file of a scene is damaged or cannot be read."""


Seen = Callable[[pathlib.Path, bytes], None]  # called with each file and its content


def _ignore(path: pathlib.Path, content: bytes) -> None:
    pass


@dataclasses.dataclass(frozen=True)
class Scene:
    """
    Attributes:
      key: stem of the file names.
      images: stored values [H, W, C] in the encoder's bands; one, or two dates.
      mask: uint8 [H, W], class indices, IGNORE for unlabeled pixels.
      changes: names from `foreign.CHANGES` of changes on reading.
    """

    key: str
    images: tuple[np.ndarray, ...]
    mask: np.ndarray
    changes: tuple[str, ...] = ()


def files(folder: pathlib.Path, dates: int) -> dict[str, dict[str, pathlib.Path]]:
    """The files of a folder of scenes by kind ("image", or "A" and "B"; last "label") and key, sorted.

    Raises:
      UserError: no such folder, no files, two files with the same key, a file without a counterpart.
    """
    if not folder.is_dir():
        raise UserError(f"the folder {folder} does not exist; give a folder of scenes")
    kinds = ("image",) if dates == 1 else ("A", "B")
    found = {kind: _files(folder / kind, foreign.ENDINGS) for kind in kinds} | {
        "label": _files(folder / "label", MASK_ENDINGS)
    }
    for kind in (*kinds[1:], "label"):
        for one, other in ((kinds[0], kind), (kind, kinds[0])):
            for stem in sorted(found[one].keys() - found[other].keys()):
                raise UserError(f"{found[one][stem]} has no counterpart {stem!r} in {folder / other}; add or remove it")
    return found


def _files(folder: pathlib.Path, suffixes: Sequence[str]) -> dict[str, pathlib.Path]:
    """The images of a folder by stem, sorted."""
    if not folder.is_dir():
        raise UserError(f"the folder {folder} does not exist; put images in image/ (or A/ and B/) and masks in label/")
    found = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in suffixes and not path.name.startswith("."):
            if path.stem in found:
                raise UserError(f"{found[path.stem]} and {path} have the same name; rename or remove one of them")
            found[path.stem] = path
    if not found:
        raise UserError(f"{folder} has no files {', '.join('*' + suffix for suffix in suffixes)}; add some")
    return found


def read(
    found: dict[str, dict[str, pathlib.Path]],
    key: str,
    bands: Bands,
    names: Sequence[str],
    seen: Seen = _ignore,
) -> Scene:
    """Reads a scene.

    Args:
      found: result of `files`.
      bands: of the encoder; images must have the same number of bands and dtype.
      names: class names; () allows any class index.
      seen: called with each file and its content.

    Raises:
      UserError: a file cannot be read or decoded, has wrong bands, an invalid class index, or sizes differ.
    """
    *kinds, last = found
    change = len(kinds) == 2
    pictures = [_image(found[kind][key], bands, seen) for kind in kinds]
    images = tuple(picture.pixels for picture in pictures)
    mask = read_mask(found[last][key], change, names, seen)
    first = found[kinds[0]][key]
    for kind, shape in ((kinds[-1], images[-1].shape[:2]), (last, mask.shape)):
        if shape != images[0].shape[:2]:
            raise UserError(
                f"{found[kind][key]} is {shape[1]} x {shape[0]} px and {first} is {images[0].shape[1]} x "
                f"{images[0].shape[0]} px; they must have the same size"
            )
    changes = dict.fromkeys(change for picture in pictures for change in picture.changes)
    return Scene(key, images, mask, tuple(changes))


def _content(path, seen) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        environment.raise_if_fault(error, f"{path} cannot be read")
        raise UnreadableScene(f"{path} cannot be read: {error.strerror}") from error
    seen(path, content)
    return content


def _image(path, bands, seen) -> foreign.Picture:
    try:
        picture = foreign.read(_content(path, seen), colors=None if bands.is_rgb8() else False)
    except foreign.ImageDecodeError as error:
        raise UnreadableScene(f"{path} cannot be decoded ({error}); replace or remove it") from error
    pixels = picture.pixels
    if pixels.shape[2] != len(bands) or pixels.dtype != bands.dtype:
        raise UserError(
            f"{path} does not fit the encoder: expected {len(bands)} bands of {bands.dtype} "
            f"({several(bands.names, 10)}), got {pixels.shape[2]} of {pixels.dtype}"
        )
    return picture


def read_mask(path: pathlib.Path, change: bool, names: Sequence[str], seen: Seen = _ignore) -> np.ndarray:
    """Reads a mask: uint8 [H, W], class indices and IGNORE; for change, 0 and 1. Arguments and errors as in `read`."""
    try:
        mask = foreign.read_indices(_content(path, seen))
    except foreign.ImageDecodeError as error:
        raise UnreadableScene(f"{path} cannot be decoded as a mask ({error}); replace or remove it") from error
    if mask.shape[2] != 1 or mask.dtype.kind not in "ui":
        raise UserError(f"{path} has {mask.shape[2]} bands of {mask.dtype}; a mask must have one band of class indices")
    mask = mask[..., 0]
    values = np.unique(mask)
    if change:
        if not (set(values.tolist()) <= {0, 1} or set(values.tolist()) <= {0, 255}):
            raise UserError(f"{path} has the values {_listed(values)}; a change mask must have 0 and 255, or 0 and 1")
        return (mask > 0).astype(np.uint8)
    limit = len(names) or IGNORE
    wrong = values[(values != IGNORE) & ((values < 0) | (values >= limit))]
    if len(wrong):
        raise UserError(
            f"{path} has the class {_listed(wrong)}; expected 0 to {limit - 1}, or {IGNORE} for unlabeled pixels"
        )
    return mask.astype(np.uint8)


def _listed(values: np.ndarray) -> str:
    return ", ".join(map(str, values[:5].tolist())) + (", ..." if len(values) > 5 else "")
