"""TIFF files: the stored values of the first picture, and its tags.

The first picture is the first page that is neither a reduced image nor a mask, since cameras and scanners write a
thumbnail first. tifffile and imagecodecs read every layout (strips, tiles, planes, BigTIFF), byte order, compression
and predictor that GDAL writes. Values are not converted, except that JPEG-compressed YCbCr becomes RGB.
"""

import dataclasses
import io
import itertools
import logging
import math
import xml.etree.ElementTree

import numpy as np

from pera_jax.common import environment
from pera_jax.common.text import printable
from pera_jax.data.images.image_errors import ImageDecodeError, check_size

MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")

WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, PALETTE, SEPARATED, YCBCR = 0, 1, 2, 3, 5, 6  # PhotometricInterpretation
UNSPECIFIED, PREMULTIPLIED, STRAIGHT = 0, 1, 2  # ExtraSamples
_JPEG = (6, 7, 34892, 33007)  # compressions
_INK_SET, _GDAL_METADATA, _GDAL_NODATA, _ORIENTATION, _CMYK = 332, 42112, 42113, 274, 1
_REDUCED, _MASK = 1, 4  # bits of NewSubfileType: a reduced image, a mask

# tifffile logs unusual tags, with text from the file; fatal problems are still raised.
logging.getLogger("tifffile").setLevel(logging.CRITICAL + 1)


@dataclasses.dataclass(frozen=True)
class Tiff:
    """The first picture of a file, as stored.

    Attributes:
      values: [H, W, C] in the dtype of the file.
      photometric: value of the tag PhotometricInterpretation.
      extra: values of the tag ExtraSamples, for the last bands.
      depth: bits per value; depths other than 8, 16 and 32 are unpacked.
      palette: uint16 [3, 2^depth], or None.
      orientation: 1 to 8; not applied to `values`.
      names: band names, "" if unnamed.
      pages: whether the file has further pictures.
      nodata: the nodata value declared by GDAL; None without one.
    """

    values: np.ndarray
    photometric: int
    extra: tuple[int, ...]
    depth: int
    palette: np.ndarray | None
    orientation: int
    names: tuple[str, ...]
    pages: bool
    nodata: float | None = None


def values_of(page) -> np.ndarray:
    """The values of a tifffile page, [H, W, C], for any layout. May raise almost any exception for damaged bytes."""
    height, width = page.imagelength, page.imagewidth
    check_size(height, width, page.samplesperpixel * (page.dtype.itemsize if page.dtype else 1))
    if page.dtype is None or page.imagedepth != 1:
        raise ImageDecodeError(f"has unsupported values: {page.bitspersample} bits, image depth {page.imagedepth}")
    segments = math.prod(page.chunked)
    if not len(page.dataoffsets) == len(page.databytecounts) == segments:
        raise ImageDecodeError(f"is damaged: expected {segments} strips or tiles, got {len(page.dataoffsets)}")
    if any(bool(place) != bool(size) for place, size in zip(page.dataoffsets, page.databytecounts, strict=True)):
        # where both are 0, GDAL omitted an empty block
        raise ImageDecodeError("is damaged: strips or tiles are missing")
    found = page.asarray(squeeze=False, maxworkers=1)  # [planes, 1, H, W, samples of a plane]
    found = np.moveaxis(found[:, 0], 0, 2).reshape(height, width, -1)
    return np.ascontiguousarray(found, found.dtype.newbyteorder("="))


def read(encoded: bytes) -> Tiff:
    """Reads the first picture of a file. Raises ImageDecodeError, and almost any exception for damaged bytes."""
    import tifffile  # imported late: not needed for JPEG and PNG

    with tifffile.TiffFile(io.BytesIO(encoded)) as file:
        page = _picture(file)
        photometric = int(page.photometric)
        if photometric == YCBCR:
            if int(page.compression) not in _JPEG:
                return _by_pillow(encoded, page, file)
            photometric = RGB  # tifffile converts it
        if photometric == SEPARATED and page.tags.valueof(_INK_SET, _CMYK) != _CMYK:
            raise ImageDecodeError("has inks other than cyan, magenta, yellow and black")
        depth = page.bitspersample
        if isinstance(depth, tuple):
            raise ImageDecodeError(f"has bands of different depths: {', '.join(map(str, depth))} bits")
        values = values_of(page)
        return Tiff(
            values.astype(np.uint8) if values.dtype == bool else values, photometric,
            tuple(int(kind) for kind in page.extrasamples), depth, _palette(page, depth),
            _orientation(page), _names(page, values.shape[2]), _further_pages(file, page), _nodata(page),
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Head:
    """What the tags say of the first page of a file, which is what GDAL reads.

    Attributes:
      orientation: 1 to 8.
      white_is_zero: whether the greatest value is the darkest.
      depth: bits of a value; None where bands differ.
      auxiliary: whether the first page is a reduced image or a mask.
      pages: whether the file holds further pictures.
    """

    orientation: int = 1
    white_is_zero: bool = False
    depth: int | None = None
    auxiliary: bool = False
    pages: bool = False


def head_of(path: str) -> Head:
    """The head of a file; the defaults if its tags cannot be read. Raises EnvironmentFault."""
    import tifffile

    try:
        with tifffile.TiffFile(path) as file:
            page, picture = file.pages.first, _picture(file)
            depth = page.bitspersample
            return Head(
                _orientation(page), int(page.photometric) == WHITE_IS_ZERO, depth if isinstance(depth, int) else None,
                page is not picture, _further_pages(file, picture),
            )  # fmt: skip
    except Exception as error:  # for damaged bytes, tifffile raises almost any exception
        environment.raise_if_fault(error, f"{printable(path)} cannot be read")
        return Head()


def _picture(file):
    """The tifffile page of the first picture; the first page if all are reduced images or masks."""
    first = file.pages.first
    if not _auxiliary(first):
        return first
    others = itertools.chain(itertools.islice(file.pages, 1, None), first.pages or ())
    return next((page for page in others if not _auxiliary(page)), first)


def _auxiliary(page) -> bool:
    return bool(int(page.subfiletype) & (_REDUCED | _MASK))


def _by_pillow(encoded: bytes, page, file) -> Tiff:
    """Subsampled color without JPEG compression: libtiff converts it to RGB, and Pillow rotates it upright."""
    from PIL import TiffImagePlugin

    check_size(page.imagelength, page.imagewidth, 4)
    if page is not file.pages.first:
        raise ImageDecodeError("has subsampled color after a thumbnail, which is not supported")
    with TiffImagePlugin.TiffImageFile(io.BytesIO(encoded), "") as image:
        values = np.array(image.convert("RGB"))
    return Tiff(values, RGB, (), 8, None, 1, ("",) * 3, _further_pages(file, page))


def _palette(page, depth: int) -> np.ndarray | None:
    if int(page.photometric) != PALETTE:
        return None
    colors = np.asarray(page.colormap)
    if colors.shape != (3, 1 << depth):
        raise ImageDecodeError(f"is damaged: a palette of {colors.shape[-1]} colors for {depth} bits")
    return colors if colors.max() > 255 else colors * 256  # some programs write 8-bit values instead of 16-bit ones


def _orientation(page) -> int:
    found = page.tags.valueof(_ORIENTATION, 1)
    return int(found) if found in range(2, 9) else 1


def _nodata(page) -> float | None:
    try:
        return float(str(page.tags.valueof(_GDAL_NODATA, "")).strip("\0 "))
    except ValueError:
        return None


def _names(page, bands: int) -> tuple[str, ...]:
    """The band descriptions written by GDAL."""
    names = [""] * bands
    text = page.tags.valueof(_GDAL_METADATA, "")
    try:
        items = xml.etree.ElementTree.fromstring(text) if isinstance(text, str) and text else ()
    except xml.etree.ElementTree.ParseError:
        items = ()
    for item in items:
        sample = item.get("sample", "")
        if item.get("role") == "description" and sample.isdecimal() and int(sample) < bands:
            names[int(sample)] = (item.text or "").strip()
    return tuple(names)


def _further_pages(file, picture) -> bool:
    """Whether the file has a picture other than `picture`."""
    try:
        return any(page.offset != picture.offset and not _auxiliary(page) for page in file.pages)
    except Exception as error:  # a damaged page does not count
        environment.raise_if_fault(error, "a TIFF cannot be read")
        return False
