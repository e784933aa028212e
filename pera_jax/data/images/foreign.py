"""The reader for arbitrary image files, shared by conversions, probes and exports.

The format is detected from the content, not from the file name: JPEG, PNG, TIFF, WebP, BMP, GIF. Images are rotated
upright by their EXIF orientation, and can be read in two ways:

As colors, 8-bit red, green and blue:

| in the file                          | becomes                                                               |
|--------------------------------------|-----------------------------------------------------------------------|
| RGB, 8 bits                          | unchanged; color profiles and gamma are not applied                   |
| gray, 1 to 8 bits                    | three equal bands, 0 to 255                                           |
| palette                              | the colors of the palette                                            |
| 9 to 16 bits                         | the upper 8 bits, or a range chosen by the caller. 16-bit files with  |
|                                      | values below 4096 are rejected without such a range                   |
| alpha, or a transparent color        | color times opacity: transparent pixels become black                  |
| alpha of a TIFF that is not opacity  | dropped: some programs store infrared as alpha                        |
| an unspecified fourth band           | dropped                                                               |
| nodata values (TIFF)                 | black                                                                 |
| white is zero (TIFF)                 | inverted                                                              |
| CMYK, YCbCr                          | Pillow's conversion to RGB                                            |
| several pages or frames              | the first; thumbnails, overviews and masks in a TIFF do not count     |
| other numbers of bands, floats, 32   | rejected                                                              |
| bits, signed, CIELAB                 |                                                                       |

As values: the stored bands, uint8, uint16 or float32; for palettes, the colors. Nodata values of a TIFF and non-finite
values become the minimum of their band, at most 0, as in `data_prep.scenes`.
"""

import dataclasses

import numpy as np
from PIL import Image

from pera_jax.data.images import picture_files, tiff_files
from pera_jax.data.images.image_errors import ImageDecodeError, decoding

VERSION = b"pera_jax.data.foreign 2"  # of these rules; part of the fingerprints of images read by them
ENDINGS = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp")
# Possible changes of pixel values, and how they are reported: "N images ...".
CHANGES = {
    "16 bit": "of 9 to 16 bits, reduced to the upper 8 bits",
    "range": "of 9 to 16 bits, mapped by --range",
    "alpha": "with alpha, multiplied by it: transparent pixels became black",
    "alpha left out": "with an alpha band that is not opacity (infrared, perhaps), which was dropped",
    "band left out": "with a fourth band, which was dropped",
    "no data": "with nodata values or NaN, which became black or the minimum of the band",
    "transparent color": "with a transparent color, which became black",
    "white is 0": "with 0 for white, which were inverted",
    "mode CMYK": "in CMYK, converted without a color profile",
    "orientation": "rotated upright by their EXIF orientation",
    "several frames": "with several pages or frames, of which the first was used",
    "reduced": "downsized",
}
NO_LABEL = 255  # value of unlabeled pixels in masks
RGB = ("red", "green", "blue")
DTYPES = ("uint8", "uint16", "float32")
_NARROW = 1 << 12  # 16-bit values below this come from a 12-bit sensor, or are reflectances
_HALF_TONES = 0.05  # largest fraction of partly transparent pixels in an opacity band (edges of cutouts)


@dataclasses.dataclass(frozen=True)
class Picture:
    """An image that was read, upright.

    Attributes:
      pixels: [H, W, C], contiguous, writable: uint8 RGB, or values of one of `DTYPES`.
      bands: names of the C bands.
      changes: what differs from the file: pixel values (see `CHANGES`), format, bit depth.
    """

    pixels: np.ndarray
    bands: tuple[str, ...]
    changes: tuple[str, ...]


@dataclasses.dataclass
class _Stored:
    """The uninterpreted content of a file.

    Attributes:
      values: [H, W, C].
      base: number of color bands: 1 gray, 3 RGB, 4 CMYK; 0 if the bands are not colors.
      alpha: meaning of band `base` if there is one: `tiff_files.STRAIGHT`, ...
      depth: bits per value.
    """

    values: np.ndarray
    base: int
    depth: int
    changes: list[str]
    alpha: int = tiff_files.STRAIGHT
    inverted: bool = False
    names: tuple[str, ...] = ()
    trusted: bool = True  # whether an alpha band is certainly opacity
    void: np.ndarray | None = None  # bool [H, W, C]: nodata and non-finite values; None without any


def read(encoded: bytes, colors: bool | None = None, span: tuple[int, int] | None = None) -> Picture:
    """Reads an image file.

    Args:
      encoded: its bytes.
      colors: True: read as RGB uint8; False: read the stored values; None: read as colors if it has any.
      span: (low, high): for 9 to 16 bits, the values mapped to 0 and 255; only for colors.

    Raises:
      ImageDecodeError: the bytes cannot be decoded, the image cannot be read in the requested way, or it would take
        more than `image_errors.MOST_BYTES` in memory.
    """
    with decoding(Exception, said=""):  # for damaged bytes, Pillow, tifffile and its codecs raise almost any exception
        stored = _stored(encoded)
        if colors is None:
            colors = _has_colors(stored)
        return _as_colors(stored, span) if colors else _as_values(stored)


def readings(encoded: bytes) -> dict[bool | None, Picture | ImageDecodeError]:
    """The result or the error of `read` for `colors` None and False, decoding the file only once.

    Raises ImageDecodeError if the bytes cannot be decoded.
    """
    with decoding(Exception, said=""):
        stored = _stored(encoded)
        found = {}
        for colors in (None, False):
            try:
                found[colors] = (
                    _as_colors(stored, None) if colors is None and _has_colors(stored) else _as_values(stored)
                )
            except ImageDecodeError as error:
                found[colors] = error
        return found


def read_indices(encoded: bytes) -> np.ndarray:
    """Reads a mask, upright: [H, W, C] with the exact values of the file, for palettes the indices.

    Raises ImageDecodeError: it cannot be decoded, its format does not preserve values, or a TIFF has nodata pixels
    other than `NO_LABEL`.
    """
    with decoding(Exception, said=""):
        if encoded[:4] not in tiff_files.MAGIC:
            return np.ascontiguousarray(picture_files.read_indices(encoded))
        tiff = tiff_files.read(encoded)
        if tiff.nodata not in (None, NO_LABEL) and (tiff.values == tiff.nodata).any():
            raise ImageDecodeError(
                f"has pixels with its nodata value {tiff.nodata:g}; store {NO_LABEL} there or, if it is a class, "
                "remove the nodata value with gdal_edit.py -unsetnodata"
            )
        return np.ascontiguousarray(picture_files.upright(tiff.values, tiff.orientation))


def is_opacity(alpha: np.ndarray, full: int) -> bool:
    """Whether an alpha band of a raster is opacity: all or nothing except at edges. Infrared is not."""
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
    gray = tiff.photometric in (tiff_files.WHITE_IS_ZERO, tiff_files.BLACK_IS_ZERO)
    if gray:
        base = 3 if count == 3 else 1 if count == 1 or (count == 2 and alpha != tiff_files.UNSPECIFIED) else 0
    if not base and not gray:
        raise ImageDecodeError(f"unsupported TIFF: photometric interpretation {tiff.photometric}")
    if tiff.photometric == tiff_files.PALETTE:
        if values.dtype.kind != "u":
            raise ImageDecodeError(f"unsupported TIFF: palette indices of {values.dtype}")
        changes.append("mode P")
        colors = (tiff.palette >> 8).astype(np.uint8).T[values[..., 0]]  # [H, W, 3]
        values, base, depth, names = np.concatenate([colors, values[..., 1:].astype(np.uint8)], axis=2), 3, 8, ()
        void = None if void is None else np.broadcast_to(void[..., :1], values.shape)
    if values.shape[2] < base:
        raise ImageDecodeError(f"damaged TIFF: {count} bands for {base} colors")
    return _Stored(
        picture_files.upright(values, tiff.orientation), base, depth, changes, alpha,
        tiff.photometric == tiff_files.WHITE_IS_ZERO, names,
        trusted=False, void=None if void is None else picture_files.upright(void, tiff.orientation),
    )  # fmt: skip


def _void(values: np.ndarray, nodata: float | None) -> np.ndarray | None:
    """Where values [H, W, C] are nodata or not finite: bool of the same shape, or None."""
    void = np.zeros(values.shape, bool) if values.dtype.kind != "f" else ~np.isfinite(values)
    if nodata is not None:
        with np.errstate(over="ignore"):
            void |= values == (values.dtype.type(nodata) if values.dtype.kind == "f" else nodata)
    return void if void.any() else None


# ---------------------------------------------------------------- its readings


def _has_colors(stored: _Stored) -> bool:
    return bool(stored.base) and stored.values.dtype.kind == "u" and stored.values.shape[2] <= stored.base + 1


def _as_colors(stored: _Stored, span: tuple[int, int] | None) -> Picture:
    values, changes, count = stored.values, list(stored.changes), stored.values.shape[2]
    if values.dtype not in (np.uint8, np.uint16):
        known = "stores float32" if values.dtype == np.float32 else "may read it with --scale apply"
        raise ImageDecodeError(f"has values of {values.dtype} with unknown range; pera-jax prep-scenes {known}")
    if not _has_colors(stored):
        raise ImageDecodeError(f"has {count} bands, which are not colors; pera-jax prep-scenes reads any bands")
    if stored.depth > 8:
        changes.append("range" if span else "16 bit")
        most = int(values[..., : stored.base].max())
        if span is None and stored.depth == 16 and 0 < most < _NARROW:
            raise ImageDecodeError(
                f"has a maximum of {most} of 65535 and would become dark; convert with pera-jax prep-images "
                f"--range 0,{most}, or another range for all images, or with pera-jax prep-scenes"
            )
    elif stored.depth < 8:
        changes.append(f"{stored.depth} bit")
    colors = _bytes(values[..., : stored.base], stored.depth, span)
    if stored.inverted:
        changes.append("white is 0")
        colors = 255 - colors
    if count > stored.base:
        colors = _with_alpha(colors, values[..., stored.base], stored, changes)
    if stored.base == 4:
        changes.append("mode CMYK")
        height, width = colors.shape[:2]
        colors = np.asarray(Image.frombytes("CMYK", (width, height), colors.tobytes()).convert("RGB"))
    if stored.base == 1:
        colors = np.repeat(colors, 3, axis=2)
    if stored.void is not None:
        void = stored.void[..., : stored.base]
        black = np.where(void.any(axis=2, keepdims=True) if stored.base == 4 else void, 0, colors).astype(np.uint8)
        if (black != colors).any():
            colors = black
            changes.append("no data")
    return Picture(np.require(colors, requirements="CW"), RGB, tuple(dict.fromkeys(changes)))


def _bytes(values: np.ndarray, depth: int, span: tuple[int, int] | None) -> np.ndarray:
    """Values of `depth` bits mapped to uint8."""
    if depth > 8 and span:
        low, high = span
        clipped = values.astype(np.int64).clip(low, high) - low
        return ((2 * 255 * clipped + (high - low)) // (2 * (high - low))).astype(np.uint8)  # rounded
    if depth > 8:
        return (values >> (depth - 8)).astype(np.uint8)
    full = (1 << depth) - 1
    return values if depth == 8 else ((values.astype(np.uint16) * 510 + full) // (2 * full)).astype(np.uint8)


def _with_alpha(colors: np.ndarray, alpha: np.ndarray, stored: _Stored, changes: list[str]) -> np.ndarray:
    if stored.alpha == tiff_files.UNSPECIFIED:
        changes.append("band left out")
        return colors
    if not stored.trusted and not is_opacity(alpha, (1 << stored.depth) - 1):
        changes.append("alpha left out")
        return colors
    if "transparent color" not in changes and alpha.min() < (1 << stored.depth) - 1:
        changes.append("alpha")
    if stored.alpha == tiff_files.PREMULTIPLIED:
        return colors
    opacity = _bytes(alpha, stored.depth, None).astype(np.uint16)[..., None]
    return ((colors * opacity + 127) // 255).astype(np.uint8)


def _as_values(stored: _Stored) -> Picture:
    values, count = stored.values, stored.values.shape[2]
    if values.dtype.name not in DTYPES:
        raise ImageDecodeError(f"has values of {values.dtype}; expected one of {', '.join(DTYPES)}")
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
