"""TIFF files as they are: the values of the first picture in their place, and what the tags say of them.

The first picture is the first page that neither shows another one smaller nor says where that has data: cameras and
scanners write a thumbnail first. tifffile and imagecodecs read every layout (strips, tiles, planes, BigTIFF), byte order, compression and predictor that
GDAL writes. Nothing is converted here but what no program stores otherwise: JPEG's YCbCr inside a TIFF comes out as RGB.
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
_REDUCED, _MASK = 1, 4  # bits of NewSubfileType: pages that show another one smaller, or where it has data

# It tells of odd tags in lines of its own, with text from the file; what stops the reading is raised all the same.
logging.getLogger("tifffile").setLevel(logging.CRITICAL + 1)


@dataclasses.dataclass(frozen=True)
class Tiff:
    """The first picture of a file, as it is stored.

    Attributes:
      values: [H, W, C] of the dtype of the file.
      photometric: the tag's number.
      extra: what the tag ExtraSamples says of the last bands, one number for each that it names.
      depth: bits of a value; below 8 and between 8 and 16 the values are unpacked.
      palette: uint16 [3, 2^depth], or None.
      orientation: 1 to 8; not applied to `values`.
      names: of the bands, "" where the file has none.
      pages: whether the file holds further pictures.
      nodata: the value that stands for no data, as GDAL declares it; None without one.
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
    """The values of a page of tifffile in their places, [H, W, C], whatever the layout. Raises nearly anything."""
    height, width = page.imagelength, page.imagewidth
    check_size(height, width, page.samplesperpixel * (page.dtype.itemsize if page.dtype else 1))
    if page.dtype is None or page.imagedepth != 1:
        raise ImageDecodeError(f"holds values that cannot be read: {page.bitspersample} bits, depth {page.imagedepth}")
    segments = math.prod(page.chunked)
    if not len(page.dataoffsets) == len(page.databytecounts) == segments:
        raise ImageDecodeError(f"has {len(page.dataoffsets)} strips or tiles instead of {segments}")
    if any(bool(place) != bool(size) for place, size in zip(page.dataoffsets, page.databytecounts, strict=True)):
        raise ImageDecodeError("has strips or tiles that are not there")  # where both are 0, GDAL left out what is empty
    found = page.asarray(squeeze=False, maxworkers=1)  # [planes, 1, H, W, samples of a plane]
    found = np.moveaxis(found[:, 0], 0, 2).reshape(height, width, -1)
    return np.ascontiguousarray(found, found.dtype.newbyteorder("="))


def read(encoded: bytes) -> Tiff:
    """Reads the first picture of a file. Raises ImageDecodeError, and on damaged bytes nearly anything."""
    import tifffile  # here: data sets of JPEG and PNG do without it

    with tifffile.TiffFile(io.BytesIO(encoded)) as file:
        page = _picture(file)
        photometric = int(page.photometric)
        if photometric == YCBCR:
            if int(page.compression) not in _JPEG:
                return _by_pillow(encoded, page, file)
            photometric = RGB  # which tifffile makes of it
        if photometric == SEPARATED and page.tags.valueof(_INK_SET, _CMYK) != _CMYK:
            raise ImageDecodeError("holds inks other than cyan, magenta, yellow and black")
        depth = page.bitspersample
        if isinstance(depth, tuple):
            raise ImageDecodeError(f"holds bands of {', '.join(map(str, depth))} bits")
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
      beside: whether the page is no picture but shows another one smaller, or says where that has data.
      pages: whether the file holds further pictures.
    """

    orientation: int = 1
    white_is_zero: bool = False
    depth: int | None = None
    beside: bool = False
    pages: bool = False


def head_of(path: str) -> Head:
    """The head of a file; that of a plain one where the tags cannot be read. Raises EnvironmentFault."""
    import tifffile

    try:
        with tifffile.TiffFile(path) as file:
            page, picture = file.pages.first, _picture(file)
            depth = page.bitspersample
            return Head(
                _orientation(page), int(page.photometric) == WHITE_IS_ZERO, depth if isinstance(depth, int) else None,
                page is not picture, _further_pages(file, picture),
            )  # fmt: skip
    except Exception as error:  # on damaged bytes tifffile raises nearly anything
        environment.raise_if_fault(error, f"{printable(path)} cannot be read")
        return Head()


def _picture(file):
    """The page of tifffile's that is the first picture; the first of all where every one is beside another."""
    first = file.pages.first
    if not _beside(first):
        return first
    others = itertools.chain(itertools.islice(file.pages, 1, None), first.pages or ())
    return next((page for page in others if not _beside(page)), first)


def _beside(page) -> bool:
    return bool(int(page.subfiletype) & (_REDUCED | _MASK))


def _by_pillow(encoded: bytes, page, file) -> Tiff:
    """Subsampled colour that is not JPEG's: libtiff makes RGB of it. Pillow has turned it upright."""
    from PIL import TiffImagePlugin

    check_size(page.imagelength, page.imagewidth, 4)
    if page is not file.pages.first:
        raise ImageDecodeError("holds subsampled colour behind a thumbnail, which is not read")
    with TiffImagePlugin.TiffImageFile(io.BytesIO(encoded), "") as image:
        values = np.array(image.convert("RGB"))
    return Tiff(values, RGB, (), 8, None, 1, ("",) * 3, _further_pages(file, page))


def _palette(page, depth: int) -> np.ndarray | None:
    if int(page.photometric) != PALETTE:
        return None
    colours = np.asarray(page.colormap)
    if colours.shape != (3, 1 << depth):
        raise ImageDecodeError(f"has a palette of {colours.shape[-1]} colours for values of {depth} bits")
    return colours if colours.max() > 255 else colours * 256  # some programs write 8 bits for the 16 that are asked


def _orientation(page) -> int:
    found = page.tags.valueof(_ORIENTATION, 1)
    return int(found) if found in range(2, 9) else 1


def _nodata(page) -> float | None:
    try:
        return float(str(page.tags.valueof(_GDAL_NODATA, "")).strip("\0 "))
    except ValueError:
        return None


def _names(page, bands: int) -> tuple[str, ...]:
    """The descriptions that GDAL gives bands."""
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
    """Whether there is a picture beside `picture` among the pages."""
    try:
        return any(page.offset != picture.offset and not _beside(page) for page in file.pages)
    except Exception as error:  # a page that is damaged is no picture that anyone misses
        environment.raise_if_fault(error, "a TIFF cannot be read")
        return False
