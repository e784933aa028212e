"""The one reader of image files that others have written: conversion, probes and exports see the same pixels.

A file is judged by its content, not by the ending of its name: JPEG, PNG, TIFF, WebP, BMP, GIF. Turned upright by its
EXIF orientation, it has two readings, of which the caller chooses:

Colours, red, green and blue of 8 bits:

| in the file                          | becomes                                                               |
|--------------------------------------|-----------------------------------------------------------------------|
| RGB, 8 bits                          | as it is; what profiles and gamma say is not applied                  |
| grey, 1 to 8 bits                    | three equal bands, 0 to 255                                           |
| palette                              | the colours of the palette                                            |
| 9 to 16 bits                         | the upper 8 of them, or a range that the caller names. 16 bits of     |
|                                      | which no more than 12 are used are not read without one               |
| alpha, or a transparent colour       | the colour times its opacity: what is transparent is black            |
| alpha of a TIFF that is no opacity   | left out: many a program that writes infrared calls it alpha          |
| a fourth band without a meaning      | left out                                                              |
| declared to be no data (TIFF)        | black                                                                 |
| white is 0 (TIFF)                    | turned about, so that white is bright                                 |
| CMYK, YCbCr                          | Pillow's conversion to RGB                                            |
| several pages or frames              | the first; thumbnails, overviews and masks in a TIFF are none         |
| other numbers of bands, floats, 32   | not read                                                              |
| bits, signed, CIELAB                 |                                                                       |

Values: the bands of the file as they are stored, uint8, uint16 or float32; of a palette its colours. What a TIFF declares to
be no data, and what is no finite number, becomes the least value of its band, at most 0, as in `data_prep.scenes`.
"""

import dataclasses

import numpy as np
from PIL import Image

from pera_jax.data.images import picture_files, tiff_files
from pera_jax.data.images.image_errors import ImageDecodeError, decoding

VERSION = b"pera_jax.data.foreign 2"  # of these rules: what is derived from files of others is known by it, too
ENDINGS = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp")
# What may be done to the values of pixels, and how it is told.
CHANGES = {
    "16 bit": "of 9 to 16 bits, the upper 8 were kept",
    "range": "of 9 to 16 bits, mapped as --range says",
    "alpha": "with alpha, colours were multiplied by it: what is transparent is black",
    "alpha left out": "with a band called alpha that is no opacity, infrared perhaps, which was left out",
    "band left out": "with a fourth band, which was left out",
    "no data": "with values that they declare to be no data, or no numbers, which became black or the least value",
    "transparent colour": "with a transparent colour, which became black",
    "white is 0": "with 0 for white, which were turned about",
    "mode CMYK": "of CMYK, converted without a colour profile",
    "orientation": "turned upright as their EXIF data say",
    "several frames": "with several pages or frames, of which the first was taken",
    "reduced": "made smaller",
}
NO_LABEL = 255  # in a mask
RGB = ("red", "green", "blue")
DTYPES = ("uint8", "uint16", "float32")
_NARROW = 1 << 12  # values of 16 bits below this are those of a sensor of 12 bits, or reflectances
_HALF_TONES = 0.05  # the largest part of an opacity that lies between none and full: the edges of what is cut out


@dataclasses.dataclass(frozen=True)
class Picture:
    """An image of somebody's, upright.

    Attributes:
      pixels: [H, W, C], contiguous, writable: uint8 of red, green, blue, or values of one of `DTYPES`.
      bands: names of the C bands.
      changes: names of what became other than in the file: pixels (see `CHANGES`), format, bits.
    """

    pixels: np.ndarray
    bands: tuple[str, ...]
    changes: tuple[str, ...]


@dataclasses.dataclass
class _Stored:
    """What a file holds, before it is given a meaning.

    Attributes:
      values: [H, W, C].
      base: number of bands of its colours: 1 grey, 3 RGB, 4 CMYK; 0: the bands are no colours.
      alpha: how band number `base` is meant, where there is one more: `tiff_files.STRAIGHT` and so on.
      depth: bits of a value.
    """

    values: np.ndarray
    base: int
    depth: int
    changes: list[str]
    alpha: int = tiff_files.STRAIGHT
    inverted: bool = False
    names: tuple[str, ...] = ()
    trusted: bool = True  # an alpha is one
    void: np.ndarray | None = None  # bool [H, W, C]: what is declared to be no data, or no finite number; None: nothing


def read(encoded: bytes, colours: bool | None = None, span: tuple[int, int] | None = None) -> Picture:
    """Reads an image file.

    Args:
      encoded: its bytes.
      colours: True: as red, green, blue of uint8; False: as the values that it holds; None: as colours where it has any.
      span: (low, high): the values of 9 to 16 bits that become 0 and 255; only for colours.

    Raises:
      ImageDecodeError: bytes that cannot be decoded, or another kind of image than is asked for; more than
        `image_errors.MOST_BYTES` in memory.
    """
    with decoding(Exception, said=""):  # on damaged bytes Pillow's readers, tifffile and its codecs raise nearly anything
        stored = _stored(encoded)
        if colours is None:
            colours = _has_colours(stored)
        return _as_colours(stored, span) if colours else _as_values(stored)


def readings(encoded: bytes) -> dict[bool | None, Picture | ImageDecodeError]:
    """What `read` returns or raises of a file for `colours` None and False, from decoding it once.

    Raises ImageDecodeError where the bytes cannot be decoded.
    """
    with decoding(Exception, said=""):
        stored = _stored(encoded)
        found = {}
        for colours in (None, False):
            try:
                found[colours] = _as_colours(stored, None) if colours is None and _has_colours(stored) else _as_values(stored)
            except ImageDecodeError as error:
                found[colours] = error
        return found


def read_indices(encoded: bytes) -> np.ndarray:
    """Reads a mask, upright: [H, W, C] of the very values that the file holds, of a palette the indices.

    Raises ImageDecodeError: undecodable, or of a format that does not keep values; pixels that a TIFF declares to be no data
    and that are not `NO_LABEL`.
    """
    with decoding(Exception, said=""):
        if encoded[:4] not in tiff_files.MAGIC:
            return np.ascontiguousarray(picture_files.read_indices(encoded))
        tiff = tiff_files.read(encoded)
        if tiff.nodata not in (None, NO_LABEL) and (tiff.values == tiff.nodata).any():
            raise ImageDecodeError(
                f"declares {tiff.nodata:g} to be no data, and holds it; store {NO_LABEL} there, or remove the declaration with "
                "gdal_edit.py -unsetnodata where it is a class"
            )
        return np.ascontiguousarray(picture_files.upright(tiff.values, tiff.orientation))


def is_opacity(alpha: np.ndarray, full: int) -> bool:
    """Whether a band that a raster calls alpha is one: it says all or nothing but for some edges. Infrared does not."""
    return np.count_nonzero((alpha != 0) & (alpha != full)) <= _HALF_TONES * alpha.size


# ---------------------------------------------------------------- what a file holds


def _stored(encoded: bytes) -> _Stored:
    if encoded[:4] in tiff_files.MAGIC:
        return _of_tiff(tiff_files.read(encoded))
    values, depth, changes = picture_files.read(encoded)
    return _Stored(values, 1 if values.shape[2] < 3 else 3, depth, changes)


def _of_tiff(tiff: tiff_files.Tiff) -> _Stored:
    changes = (["several frames"] if tiff.pages else []) + ["format TIFF"]
    if tiff.orientation != 1:
        changes.append("orientation")
    values, depth, names, count = tiff.values, tiff.depth, tiff.names, tiff.values.shape[2]
    alpha = tiff.extra[0] if tiff.extra else tiff_files.UNSPECIFIED
    base = {tiff_files.RGB: 3, tiff_files.SEPARATED: 4, tiff_files.PALETTE: 1}.get(tiff.photometric, 0)
    void = _void(values, tiff.nodata)
    grey = tiff.photometric in (tiff_files.WHITE_IS_ZERO, tiff_files.BLACK_IS_ZERO)
    if grey:
        base = 3 if count == 3 else 1 if count == 1 or (count == 2 and alpha != tiff_files.UNSPECIFIED) else 0
    if not base and not grey:
        raise ImageDecodeError(f"a TIFF of photometric interpretation {tiff.photometric}, which is not read")
    if tiff.photometric == tiff_files.PALETTE:
        if values.dtype.kind != "u":
            raise ImageDecodeError(f"numbers of a palette that are {values.dtype}")
        changes.append("mode P")
        colours = (tiff.palette >> 8).astype(np.uint8).T[values[..., 0]]  # [H, W, 3]
        values, base, depth, names = np.concatenate([colours, values[..., 1:].astype(np.uint8)], axis=2), 3, 8, ()
        void = None if void is None else np.broadcast_to(void[..., :1], values.shape)
    if values.shape[2] < base:
        raise ImageDecodeError(f"a TIFF of {count} bands for {base} colours")
    return _Stored(
        picture_files.upright(values, tiff.orientation), base, depth, changes, alpha, tiff.photometric == tiff_files.WHITE_IS_ZERO,
        names, trusted=False, void=None if void is None else picture_files.upright(void, tiff.orientation),
    )  # fmt: skip


def _void(values: np.ndarray, nodata: float | None) -> np.ndarray | None:
    """Where values [H, W, C] are no data: bool of the same shape, or None."""
    void = np.zeros(values.shape, bool) if values.dtype.kind != "f" else ~np.isfinite(values)
    if nodata is not None:
        with np.errstate(over="ignore"):
            void |= values == (values.dtype.type(nodata) if values.dtype.kind == "f" else nodata)
    return void if void.any() else None


# ---------------------------------------------------------------- its readings


def _has_colours(stored: _Stored) -> bool:
    return bool(stored.base) and stored.values.dtype.kind == "u" and stored.values.shape[2] <= stored.base + 1


def _as_colours(stored: _Stored, span: tuple[int, int] | None) -> Picture:
    values, changes, count = stored.values, list(stored.changes), stored.values.shape[2]
    if values.dtype not in (np.uint8, np.uint16):
        known = "keeps float32" if values.dtype == np.float32 else "--scale apply may take it"
        raise ImageDecodeError(f"holds {values.dtype}, whose range is not known; python -m data_prep.scenes {known}")
    if not _has_colours(stored):
        raise ImageDecodeError(f"holds {count} bands, which are no colours; python -m data_prep.scenes takes any bands")
    if stored.depth > 8:
        changes.append("range" if span else "16 bit")
        most = int(values[..., : stored.base].max())
        if span is None and stored.depth == 16 and 0 < most < _NARROW:
            raise ImageDecodeError(
                f"its values of 16 bits end at {most} of 65535 and would come out dark; convert with python -m "
                f"data_prep.images --range 0,{most}, or what is black and white in all images, or by data_prep.scenes"
            )
    elif stored.depth < 8:
        changes.append(f"{stored.depth} bit")
    colours = _bytes(values[..., : stored.base], stored.depth, span)
    if stored.inverted:
        changes.append("white is 0")
        colours = 255 - colours
    if count > stored.base:
        colours = _with_alpha(colours, values[..., stored.base], stored, changes)
    if stored.base == 4:
        changes.append("mode CMYK")
        height, width = colours.shape[:2]
        colours = np.asarray(Image.frombytes("CMYK", (width, height), colours.tobytes()).convert("RGB"))
    if stored.base == 1:
        colours = np.repeat(colours, 3, axis=2)
    if stored.void is not None:
        void = stored.void[..., : stored.base]
        black = np.where(void.any(axis=2, keepdims=True) if stored.base == 4 else void, 0, colours).astype(np.uint8)
        if (black != colours).any():
            colours = black
            changes.append("no data")
    return Picture(np.require(colours, requirements="CW"), RGB, tuple(dict.fromkeys(changes)))


def _bytes(values: np.ndarray, depth: int, span: tuple[int, int] | None) -> np.ndarray:
    """Values of `depth` bits as uint8."""
    if depth > 8 and span:
        low, high = span
        clipped = values.astype(np.int64).clip(low, high) - low
        return ((2 * 255 * clipped + (high - low)) // (2 * (high - low))).astype(np.uint8)  # rounded
    if depth > 8:
        return (values >> (depth - 8)).astype(np.uint8)
    full = (1 << depth) - 1
    return values if depth == 8 else ((values.astype(np.uint16) * 510 + full) // (2 * full)).astype(np.uint8)


def _with_alpha(colours: np.ndarray, alpha: np.ndarray, stored: _Stored, changes: list[str]) -> np.ndarray:
    if stored.alpha == tiff_files.UNSPECIFIED:
        changes.append("band left out")
        return colours
    if not stored.trusted and not is_opacity(alpha, (1 << stored.depth) - 1):
        changes.append("alpha left out")
        return colours
    if "transparent colour" not in changes and alpha.min() < (1 << stored.depth) - 1:
        changes.append("alpha")
    if stored.alpha == tiff_files.PREMULTIPLIED:
        return colours
    opacity = _bytes(alpha, stored.depth, None).astype(np.uint16)[..., None]
    return ((colours * opacity + 127) // 255).astype(np.uint8)


def _as_values(stored: _Stored) -> Picture:
    values, count = stored.values, stored.values.shape[2]
    if values.dtype.name not in DTYPES:
        raise ImageDecodeError(f"holds {values.dtype}; {', '.join(DTYPES)} are read")
    names = stored.names or ("",) * count
    plain = (*RGB, *(f"band_{number}" for number in range(4, count + 1))) if stored.base == 3 else ()
    plain = plain or tuple(f"band_{number}" for number in range(1, count + 1))
    named = tuple(name or other for name, other in zip(names, plain, strict=True))
    changes = tuple(name for name in stored.changes if name in ("orientation", "several frames"))
    if stored.void is not None:
        filled = values.copy()
        for band, void in zip(np.moveaxis(filled, 2, 0), np.moveaxis(stored.void, 2, 0), strict=True):
            band[void] = min(band[~void].min(initial=0), 0)
        if not np.array_equal(filled, values):
            values, changes = filled, (*changes, "no data")
    return Picture(np.require(values, requirements="CW"), named if len(set(named)) == count else plain, changes)
