"""Reading GeoTIFF scenes by windows with rasterio: metadata and pixels.

* Any file that rasterio opens; for a TIFF with several pages, the first page. Names that end in tif or tiff must be
  TIFF. Overviews are never read, since many are decimated and would alias.
* Band names: the band descriptions, else the color interpretation (red, green, blue, nir, ...), else band_1, band_2,
  ... An alpha band without a description is used as data mask; some programs call infrared alpha.
* Nodata: by the file's nodata value, mask or alpha band (0), by the values `nodata`, and for non-finite floats; for
  each band separately. Such pixels get the minimum of the tile's band, at most 0, so they are never brighter than data.
* With `scaled`, scale and offset of the file are applied, giving float32.
* Resampling: see `scene_resample`.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from data_prep.convert.pixels import Rejected
from data_prep.geo import scene_resample
from data_prep.geo.scene_file import opened, reasons
from data_prep.geo.scene_place import georeference, meters
from pera_jax.common.text import printable, several
from pera_jax.data import codecs
from pera_jax.data.images import tiff_files

_SCALED_DTYPES = (*codecs.DTYPES, "int8", "int16", "uint32", "int32", "float64")  # dtypes that can be read with scale
_NO_NAMES = ("undefined", "gray", "palette")  # GDAL calls the first band gray if nothing else is known
_MOST_BLOCK = 1 << 30  # maximum size of a file block in bytes, for which GDAL allocates memory


class Tile(NamedTuple):
    """A tile of a scene.

    Attributes:
      window: (column, row, width, height) in pixels of the file, possibly fractional.
      columns, rows: size of the resulting image.
      bands: GDAL band numbers, from 1.
      alpha: number of the alpha band used as data mask, or None.
    """

    window: tuple[float, float, float, float]
    columns: int
    rows: int
    bands: tuple[int, ...]
    alpha: int | None


@dataclasses.dataclass(frozen=True)
class Scene:
    """Metadata of a scene.

    Attributes:
      sides: width and height in pixels.
      names: band names by GDAL band number, in file order.
      alpha: number of the alpha band used as data mask, which is not in `names`; None without one.
      dtype: of the values as read.
      meters: width and height of a pixel on the ground; None without a georeference.
      scales: (scale, offset) by GDAL band number.
      placed: kind of the georeference: "transform", "gcps", "rpcs" or None.
      pages: whether the file has further pictures, which are not read.
    """

    sides: tuple[int, int]
    names: dict[int, str]
    alpha: int | None
    dtype: str
    meters: tuple[float, float] | None
    scales: dict[int, tuple[float, float]]
    placed: str | None
    pages: bool = False


def describe(path: str, scaled: bool = False) -> Scene:
    """Reads the metadata of a scene.

    Args:
      scaled: whether scale and offset will be applied.

    Raises:
      ImageDecodeError: the file cannot be read.
      Rejected: the file is valid, but not supported: no bands, another dtype, fewer than 8 bits, 0 for white, a
        palette, a thumbnail as first page, or a rotated image.
      EnvironmentFault: the machine failed.
    """
    dataset, head = opened(path), tiff_files.Head()
    if dataset.driver == "GTiff":
        head = tiff_files.head_of(path)
    with reasons(path):
        colors = [color.name for color in dataset.colorinterp]
        described = [printable((text or "").strip(), 80) for text in dataset.descriptions]
        indexes, sides, of_band = list(dataset.indexes), (dataset.width, dataset.height), list(dataset.dtypes)
        scales = {number: pair for number, pair in zip(indexes, zip(dataset.scales, dataset.offsets), strict=True)}
        together = len(indexes) if getattr(dataset.interleaving, "name", "") == "pixel" else 1
        block = max((np.prod(shape, dtype=float) for shape in dataset.block_shapes), default=0) * together
        turned = dataset.tags().get("EXIF_Orientation", str(head.orientation))  # the former is set for JPEG
    if turned in tuple("2345678"):
        raise Rejected(f"is stored rotated or mirrored (orientation {turned}), which GDAL ignores; store it upright")
    if head.auxiliary:
        raise Rejected("has a thumbnail or mask as its first page, which GDAL would read; store the "
                       "picture in a separate file")  # fmt: skip
    alphas = [n for n in indexes if colors[n - 1] == "alpha" and described[n - 1].lower() in ("", "alpha")]
    numbers = [number for number in indexes if number not in alphas]
    if not numbers:
        raise Rejected("has no bands")
    dtypes = {of_band[number - 1] for number in numbers}
    known = _SCALED_DTYPES if scaled else codecs.DTYPES
    if not dtypes <= set(known) or (len(dtypes) > 1 and not scaled):
        fix = "convert it with gdal_translate -ot Float32"
        if dtypes <= set(_SCALED_DTYPES) and not scaled:
            fix += ", or use --scale apply, which stores float32"
        raise Rejected(f"has values of {several(sorted(dtypes))}, expected {', '.join(known)}; {fix}")
    whole = all(np.dtype(dtype).kind == "u" for dtype in dtypes)
    if head.white_is_zero and whole:
        raise Rejected("is stored with 0 for white, which GDAL does not invert; store it with 0 for black")
    if "palette" in colors:
        raise Rejected("has a palette; convert it with gdal_translate -expand rgb")
    if head.depth is not None and 1 < head.depth < 8 and whole and not scaled:
        raise Rejected(
            f"has values of {head.depth} bits, which would be too dark; convert it with gdal_translate -co NBITS=8 "
            f"-scale 0 {(1 << head.depth) - 1} 0 255, or use --scale apply, which stores float32"
        )
    if block * np.dtype(dtypes.copy().pop()).itemsize > _MOST_BLOCK:
        raise Rejected(f"has blocks larger than {_MOST_BLOCK >> 30} GiB; rewrite it with gdal_translate -co TILED=YES")
    if scaled and not all(np.isfinite(pair).all() and pair[0] for pair in scales.values()):
        raise Rejected("has a scale that is 0 or not finite")
    names = {
        number: described[number - 1]
        or (colors[number - 1] if colors[number - 1] not in _NO_NAMES else f"band_{number}")
        for number in numbers
    }
    counts = list(names.values())
    unique = {number: name if counts.count(name) == 1 else f"band_{number}" for number, name in names.items()}
    alpha, placed = alphas[0] if alphas else None, georeference(path)
    dtype = "float32" if scaled else dtypes.pop()
    return Scene(sides, unique, alpha, dtype, meters(path), scales, placed and placed.kind, head.pages)


def read(
    path: str, tile: Tile, nodata: Sequence[float] = (), scaled: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Reads a tile.

    Args:
      nodata: nodata values in addition to the one declared in the file.
      scaled: whether to apply scale and offset of the file.

    Returns:
      (pixels [rows, columns, C] in the dtype of the file, or float32 if scaled; data mask, bool [rows, columns, C]).

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
    """(pixels [C, height, width], data mask of the same shape) of a window in whole pixels."""
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
    """A value converted to `dtype`; None if it cannot be represented."""
    if dtype.kind == "f":
        with np.errstate(over="ignore"):
            return dtype.type(value)
    limits = np.iinfo(dtype)
    return dtype.type(value) if value == value and limits.min <= value <= limits.max and value == int(value) else None


def _fill(pixels: np.ndarray, valid: np.ndarray) -> None:
    """Sets nodata pixels to the minimum of their band, at most 0, in place; both are [C, H, W]."""
    for band, here in zip(pixels, valid, strict=True):
        band[~here] = min(band[here].min(initial=0), 0)


def no_data(pixels: np.ndarray, valid: np.ndarray) -> dict | None:
    """The number of nodata `pixels` per band of a tile, and their `values`; None without any."""
    if valid.all():
        return None
    bands = [pixels[..., band][~valid[..., band]] for band in range(pixels.shape[2])]
    return {"pixels": [len(held) for held in bands], "values": [held[0].item() if len(held) else 0 for held in bands]}


def opacities(path: str, tile: Tile) -> np.ndarray:
    """Histogram of the upper 8 bits of the alpha band of a tile, int64 [256]: 0 is transparent, 255 opaque."""
    from rasterio.windows import Window

    column, row, width, height = (int(side) for side in tile.window)
    with reasons(path):
        values = opened(path).read(tile.alpha, window=Window(column, row, max(1, width), max(1, height)))
    if values.dtype.kind != "u":
        values = np.where(values > 0, 255, 0).astype(np.uint8)
    return np.bincount((values >> 8 * (values.dtype.itemsize - 1)).ravel(), minlength=256)
