"""GeoTIFF scenes, read by windows through rasterio: what they hold, and their pixels.

* A scene is whatever rasterio opens; of a TIFF with several pages, the first. A name that ends in tif or tiff must be a
  TIFF. Overviews in a file are never read: many were made by leaving pixels out, and would alias.
* Names of bands: the file's descriptions, else the colours that the file gives its bands (red, green, blue, nir, ...),
  else band_1, band_2, ... An alpha band is no band but says where there is data, unless it has a description: programs
  that write four bands often call the fourth alpha, though it is infrared.
* No data: where the file's nodata value, mask or alpha band (0) says so, where a value is one of `nodata`, and where a
  float is no finite number; each band by itself. Such pixels get the least value of the tile's band, or 0 where all are
  above 0: so they are never brighter than what has data.
* Scale and offset of the file are applied where `scaled` says so; the values then are float32.
* Other pixel sizes: see `scene_resample`.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from data_prep.convert.pixels import Rejected
from data_prep.geo import scene_resample
from data_prep.geo.scene_file import opened, reasons
from data_prep.geo.scene_place import georeference, metres
from pera_jax.common.text import printable, several
from pera_jax.data import codecs
from pera_jax.data.images import tiff_files

_SCALED_DTYPES = (*codecs.DTYPES, "int8", "int16", "uint32", "int32", "float64")  # of files whose scale is applied
_NO_NAMES = ("undefined", "gray", "palette")  # "gray" is what GDAL says of the first band where the file says nothing
_MOST_BLOCK = 1 << 30  # bytes that GDAL takes for one block of a file


class Tile(NamedTuple):
    """A part of a scene: the window [column, row, width, height] in pixels of the file, which may be fractions; the
    columns and rows of the image that is made of it; the bands by GDAL's numbers, which begin at 1; and the number of the
    alpha band that says where there is data, or None."""

    window: tuple[float, float, float, float]
    columns: int
    rows: int
    bands: tuple[int, ...]
    alpha: int | None


@dataclasses.dataclass(frozen=True)
class Scene:
    """What a file holds.

    Attributes:
      sides: width and height in pixels.
      names: of the bands by GDAL's number, in the order of the file.
      alpha: the number of the band that says where there is data, which has no name; None where there is none.
      dtype: of the values as they are read.
      metres: width and height of a pixel on the ground, None where the file does not say where it lies.
      scales: (scale, offset) of the bands by GDAL's number.
      placed: what says where it lies: "transform", "gcps", "rpcs" or None.
      pages: whether the file holds further pictures, which are not read.
    """

    sides: tuple[int, int]
    names: dict[int, str]
    alpha: int | None
    dtype: str
    metres: tuple[float, float] | None
    scales: dict[int, tuple[float, float]]
    placed: str | None
    pages: bool = False


def describe(path: str, scaled: bool = False) -> Scene:
    """What a scene holds.

    Args:
      scaled: its scale and offset will be applied.

    Raises:
      ImageDecodeError: the file cannot be read.
      Rejected: it is sound, but holds no band, values of a dtype that is not stored, of fewer than 8 bits or with 0 for
        white, numbers of a palette, a thumbnail as its first page, or is stored turned.
      EnvironmentFault: the machine failed.
    """
    dataset, head = opened(path), tiff_files.Head()
    if dataset.driver == "GTiff":
        head = tiff_files.head_of(path)
    with reasons(path):
        colours = [colour.name for colour in dataset.colorinterp]
        described = [printable((text or "").strip(), 80) for text in dataset.descriptions]
        indexes, sides, of_band = list(dataset.indexes), (dataset.width, dataset.height), list(dataset.dtypes)
        scales = {number: pair for number, pair in zip(indexes, zip(dataset.scales, dataset.offsets), strict=True)}
        together = len(indexes) if getattr(dataset.interleaving, "name", "") == "pixel" else 1
        block = max((np.prod(shape, dtype=float) for shape in dataset.block_shapes), default=0) * together
        turned = dataset.tags().get("EXIF_Orientation", str(head.orientation))  # the former of JPEG
    if turned in tuple("2345678"):
        raise Rejected(f"is stored turned or mirrored (orientation {turned}), which GDAL does not undo; store it upright")
    if head.beside:
        raise Rejected("has a first page that only shows another one smaller, or its mask, and GDAL reads the first; store the "
                       "picture in a file of its own")  # fmt: skip
    alphas = [n for n in indexes if colours[n - 1] == "alpha" and described[n - 1].lower() in ("", "alpha")]
    numbers = [number for number in indexes if number not in alphas]
    if not numbers:
        raise Rejected("holds no band")
    dtypes = {of_band[number - 1] for number in numbers}
    known = _SCALED_DTYPES if scaled else codecs.DTYPES
    if not dtypes <= set(known) or (len(dtypes) > 1 and not scaled):
        mend = "convert it with gdal_translate -ot Float32"
        if dtypes <= set(_SCALED_DTYPES) and not scaled:
            mend += ", or give --scale apply, which stores float32"
        raise Rejected(f"holds {several(sorted(dtypes))}; scenes of {', '.join(known)} are read: {mend}")
    whole = all(np.dtype(dtype).kind == "u" for dtype in dtypes)
    if head.white_is_zero and whole:
        raise Rejected("is stored with 0 for white, which GDAL does not turn about; store it with 0 for black")
    if "palette" in colours:
        raise Rejected("holds numbers of a palette, no brightness; convert it with gdal_translate -expand rgb")
    if head.depth is not None and 1 < head.depth < 8 and whole and not scaled:
        raise Rejected(
            f"holds values of {head.depth} bits, too dark among those of 8; convert it with gdal_translate -co NBITS=8 -scale 0 "
            f"{(1 << head.depth) - 1} 0 255, or give --scale apply, which stores float32"
        )
    if block * np.dtype(dtypes.copy().pop()).itemsize > _MOST_BLOCK:
        raise Rejected(f"is stored in blocks of over {_MOST_BLOCK >> 30} GiB; rewrite it with gdal_translate -co TILED=YES")
    if scaled and not all(np.isfinite(pair).all() and pair[0] for pair in scales.values()):
        raise Rejected("has a scale that is 0 or no number")
    names = {
        number: described[number - 1]
        or (colours[number - 1] if colours[number - 1] not in _NO_NAMES else f"band_{number}")
        for number in numbers
    }
    counts = list(names.values())
    unique = {number: name if counts.count(name) == 1 else f"band_{number}" for number, name in names.items()}
    alpha, placed = alphas[0] if alphas else None, georeference(path)
    dtype = "float32" if scaled else dtypes.pop()
    return Scene(sides, unique, alpha, dtype, metres(path), scales, placed and placed.kind, head.pages)


def read(
    path: str, tile: Tile, nodata: Sequence[float] = (), scaled: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Reads a tile.

    Args:
      nodata: values of the file that stand for no data, beside the one that it declares.
      scaled: scale and offset of the file are applied.

    Returns:
      (pixels [rows, columns, C] of the file's dtype, or float32 where they are scaled; bool [rows, columns, C]: where there
      is data).

    Raises:
      ImageDecodeError: the file is damaged.
      EnvironmentFault: the machine failed.
    """
    column, row, width, height = tile.window
    sides = opened(path).width, opened(path).height

    def native(*window: int) -> tuple[np.ndarray, np.ndarray]:
        return _native(path, tile, window, nodata, scaled)

    if (tile.columns, tile.rows) == (width, height):
        pixels, valid = native(int(column), int(row), tile.columns, tile.rows)
    else:
        with reasons(path):
            dtype = np.dtype("float32" if scaled else opened(path).dtypes[tile.bands[0] - 1])
        pixels, valid = scene_resample.resample(native, sides, tile.window, tile.columns, tile.rows, dtype)
    if not valid.all():
        _fill(pixels, valid)
    return np.ascontiguousarray(np.moveaxis(pixels, 0, 2)), np.moveaxis(valid, 0, 2)


def _native(
    path: str, tile: Tile, window: tuple[int, int, int, int], nodata: Sequence[float], scaled: bool
) -> tuple[np.ndarray, np.ndarray]:
    """(pixels [C, height, width], bool of the same shape: where there is data) of a window in whole pixels."""
    from rasterio.enums import MaskFlags
    from rasterio.windows import Window

    dataset, bands = opened(path), list(tile.bands)
    with reasons(path):
        part = Window(*window)
        pixels = dataset.read(bands, window=part)
        valid = np.ones(pixels.shape, bool)
        flags = {flag for band in bands for flag in dataset.mask_flag_enums[band - 1]}
        if flags != {MaskFlags.all_valid} and MaskFlags.alpha not in flags:
            valid = dataset.read_masks(bands, window=part) > 0
        if tile.alpha is not None:
            valid &= dataset.read(tile.alpha, window=part) > 0
        declared = [dataset.nodatavals[band - 1] for band in bands]  # a mask of the file hides it from `read_masks`
        scales = [(dataset.scales[band - 1], dataset.offsets[band - 1]) for band in bands]
    if pixels.dtype.kind == "f":
        valid &= np.isfinite(pixels)
    for i, own in enumerate(declared):
        for value in (*nodata, *(() if own is None else (own,))):
            if (mark := stored(value, pixels.dtype)) is not None:
                valid[i] &= pixels[i] != mark
    if scaled:
        factors, offsets = (np.array(column)[:, None, None] for column in zip(*scales, strict=True))
        with np.errstate(over="ignore", invalid="ignore"):
            pixels = (np.where(valid, pixels, 0) * factors + offsets).astype(np.float32)
        valid &= np.isfinite(pixels)
    return pixels, valid


def stored(value: float, dtype: np.dtype) -> np.generic | None:
    """A value as a file of `dtype` holds it, None where it cannot."""
    if dtype.kind == "f":
        with np.errstate(over="ignore"):
            return dtype.type(value)
    limits = np.iinfo(dtype)
    return dtype.type(value) if value == value and limits.min <= value <= limits.max and value == int(value) else None


def _fill(pixels: np.ndarray, valid: np.ndarray) -> None:
    """Sets what has no data to the least value of its band, at most 0, in place; [C, H, W] both."""
    for band, here in zip(pixels, valid, strict=True):
        band[~here] = min(band[here].min(initial=0), 0)


def no_data(pixels: np.ndarray, valid: np.ndarray) -> dict | None:
    """For each band of a tile the number of `pixels` without data and the `values` that they have; None without any."""
    if valid.all():
        return None
    bands = [pixels[..., band][~valid[..., band]] for band in range(pixels.shape[2])]
    return {"pixels": [len(held) for held in bands], "values": [held[0].item() if len(held) else 0 for held in bands]}


def opacities(path: str, tile: Tile) -> np.ndarray:
    """How many pixels of a tile are seen through (0), how many in part (1 to 254), how many not at all (255), by the upper
    8 bits of the alpha band: int64 [256]."""
    from rasterio.windows import Window

    column, row, width, height = (int(side) for side in tile.window)
    with reasons(path):
        values = opened(path).read(tile.alpha, window=Window(column, row, max(1, width), max(1, height)))
    if values.dtype.kind != "u":
        values = np.where(values > 0, 255, 0).astype(np.uint8)
    return np.bincount((values >> 8 * (values.dtype.itemsize - 1)).ravel(), minlength=256)
