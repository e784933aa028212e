"""GeoTIFF scenes, read by windows through rasterio: what they hold, their pixels, and where on the ground these lie.

* A scene is whatever rasterio opens; of a TIFF with several pages, the first. Overviews in a file are never read: many
  were made by leaving pixels out, and would alias.
* Names of bands: the file's descriptions, else the colours that the file gives its bands (red, green, blue, nir, ...),
  else band_1, band_2, ... An alpha band is no band but says where there is data, unless it has a description: programs
  that write four bands often call the fourth alpha, though it is infrared.
* No data: where the file's nodata value, mask or alpha band (0) says so, and where a float is no finite number; each band
  by itself. Such values come out as 0.
* Other pixel sizes: GDAL's `average` where both sides of a pixel grow, which weighs every pixel of the file by the area it
  shares with the new one; else GDAL's `cubic`, which widens with the pixel where one side grows. Neither takes pixels
  without data into account; a new pixel has data where any pixel under it has.
"""

import contextlib
import dataclasses
import datetime
import functools
import json
import math
import os
import re
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from pera_jax.common.text import printable
from pera_jax.data import codecs, tiff_files
from pera_jax.errors import UserError

_OPEN_SCENES = 16  # that a process keeps open
_CACHE = 256  # MB
_NO_NAMES = ("undefined", "gray", "palette")  # "gray" is what GDAL says of the first band where the file says nothing
_TRUE_SCALE = (
    0.02  # where a projection's pixels differ by more than this from their size on the ground, the latter counts
)
_EQUATOR, _ECCENTRICITY = 6378137.0, 0.0066943799901413165  # of WGS84: radius in metres, first eccentricity squared
_DAY = re.compile(r"(?<!\d)((?:19|20)\d\d)([-_.]?)(\d\d)\2(\d\d)(?!\d)")
_DAY_OF_YEAR = re.compile(r"(?<!\d)((?:19|20)\d{5})T")  # HLS: 2020208T154911


class Tile(NamedTuple):
    """A part of a scene: the window [column, row, width, height] in pixels of the file, which may be fractions; the
    columns and rows of the image that is made of it; the bands by GDAL's numbers, which begin at 1; and whether an alpha
    band says where there is data."""

    window: tuple[float, float, float, float]
    columns: int
    rows: int
    bands: tuple[int, ...]
    alpha: bool


@dataclasses.dataclass(frozen=True)
class Scene:
    """What a file holds.

    Attributes:
      sides: width and height in pixels.
      names: of the bands by GDAL's number, in the order of the file.
      alpha: the number of the band that says where there is data, which has no name; None where there is none.
      dtype: of the values.
      metres: width and height of a pixel on the ground, None where the file does not say where it lies.
    """

    sides: tuple[int, int]
    names: dict[int, str]
    alpha: int | None
    dtype: str
    metres: tuple[float, float] | None


def require_rasterio() -> None:
    """Raises UserError where rasterio is not installed."""
    try:
        import rasterio  # noqa: F401
    except ImportError as error:
        raise UserError("scenes need rasterio; pip install pera_jax[scenes], or pip install rasterio") from error


def describe(path: str) -> Scene:
    """What a scene holds.

    Raises:
      ImageDecodeError: the file cannot be read.
      UserError: its values are not of a dtype that is stored, or numbers of a palette; it is stored turned.
    """
    dataset = _open(path).dataset
    if dataset.driver == "GTiff" and (orientation := tiff_files.orientation_of(path)) != 1:
        raise UserError(
            f"{printable(path)} is stored turned or mirrored (orientation {orientation}), which GDAL does not undo; "
            "store it upright"
        )
    colours = [colour.name for colour in dataset.colorinterp]
    described = [(text or "").strip() for text in dataset.descriptions]
    alphas = [
        number
        for number in dataset.indexes
        if colours[number - 1] == "alpha" and described[number - 1].lower() in ("", "alpha")
    ]
    numbers = [number for number in dataset.indexes if number not in alphas]
    if not numbers:
        raise codecs.ImageDecodeError("holds no band")
    dtypes = {dataset.dtypes[number - 1] for number in numbers}
    if not dtypes <= set(codecs.DTYPES) or len(dtypes) > 1:
        raise UserError(
            f"{path} holds {', '.join(sorted(dtypes))}; scenes of {', '.join(codecs.DTYPES)} are read: convert it with "
            "gdal_translate -ot Byte, UInt16 or Float32"
        )
    if "palette" in colours:
        raise UserError(f"{path} holds numbers of a palette, no brightness; convert it with gdal_translate -expand rgb")
    names = {
        number: described[number - 1]
        or (colours[number - 1] if colours[number - 1] not in _NO_NAMES else f"band_{number}")
        for number in numbers
    }
    counts = list(names.values())
    unique = {number: name if counts.count(name) == 1 else f"band_{number}" for number, name in names.items()}
    alpha = alphas[0] if alphas else None
    return Scene((dataset.width, dataset.height), unique, alpha, dtypes.pop(), _metres(path))


def read(path: str, tile: Tile) -> tuple[np.ndarray, np.ndarray]:
    """Reads a tile: (pixels [rows, columns, C] of the file's dtype, bool [rows, columns, C] where there is data).

    Raises ImageDecodeError where the file is damaged.
    """
    from rasterio.enums import MaskFlags, Resampling
    from rasterio.windows import Window

    dataset = _open(path).dataset
    column, row, width, height = tile.window
    options = {"window": Window(column, row, width, height)}
    if (tile.columns, tile.rows) != (width, height):
        grows = tile.columns <= width and tile.rows <= height
        options["out_shape"] = (len(tile.bands), tile.rows, tile.columns)
        options["resampling"] = Resampling.average if grows else Resampling.cubic
    bands = list(tile.bands)
    with _reasons():
        pixels = dataset.read(bands, **options)
        valid = np.ones(pixels.shape, bool)
        flags = {flag for band in bands for flag in dataset.mask_flag_enums[band - 1]}
        if flags != {MaskFlags.all_valid} and (tile.alpha or MaskFlags.alpha not in flags):
            valid = dataset.read_masks(bands, **options) > 0
    if pixels.dtype.kind == "f":
        valid &= np.isfinite(pixels)
    pixels[~valid] = 0
    return np.ascontiguousarray(np.moveaxis(pixels, 0, 2)), np.moveaxis(valid, 0, 2)


def place(path: str, tile: Tile, source: str) -> str:
    """Where on the ground a tile lies, and what it was cut from, as JSON text.

    `source` is the scene's name and `window` [column, row, width, height] in its pixels. Where they are known: `crs` (EPSG
    code or WKT), `bounds` [left, bottom, right, top] and `transform` in that CRS (x = a column + b row + c,
    y = d column + e row + f, of the tile's pixels), `pixel_metres` [width, height], and `date` of the scene
    (2020-08-31): the first one in the name of the file, else that of the TIFF.
    """
    column, row, width, height = tile.window
    facts = {"source": source, "window": [_whole(side) for side in tile.window]}
    scene = _open(path)
    if not scene.transform.is_identity:
        across, down = width / tile.columns, height / tile.rows
        a, b, _, d, e, _ = scene.transform[:6]
        left, top = scene.at(column, row)
        xs, ys = zip(*(scene.at(column + i * width, row + j * height) for i in (0, 1) for j in (0, 1)), strict=True)
        facts["bounds"] = [min(xs), min(ys), max(xs), max(ys)]
        facts["transform"] = [a * across, b * down, left, d * across, e * down, top]
        if crs := _crs(path):
            facts["crs"] = crs
        if metres := _metres(path):
            facts["pixel_metres"] = [round(metres[0] * across, 6), round(metres[1] * down, 6)]
    if date := _date(os.path.basename(path), scene.dataset.tags().get("TIFFTAG_DATETIME", "")):
        facts["date"] = date
    return json.dumps(facts, separators=(",", ":"), allow_nan=False)


def _whole(side: float) -> int | float:
    return int(side) if side == int(side) else round(side, 6)


@dataclasses.dataclass(frozen=True)
class _Opened:
    """An open file, and its transform from (column, row) to (x, y)."""

    dataset: Any
    transform: Any

    def at(self, column: float, row: float) -> tuple[float, float]:
        a, b, c, d, e, f = self.transform[:6]
        return a * column + b * row + c, d * column + e * row + f


@functools.lru_cache(maxsize=_OPEN_SCENES)
def _open(path: str) -> _Opened:
    # GDAL's cache of decoded blocks, of all open scenes: by default a twentieth of the memory, for each process.
    os.environ.setdefault("GDAL_CACHEMAX", str(_CACHE))
    import rasterio

    if os.path.isfile(path) and os.path.getsize(path) == 0:
        raise codecs.ImageDecodeError("is empty")
    with _reasons(), warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        dataset = rasterio.open(path)
        transform = dataset.transform  # opened without overviews, files without a transform give random numbers
        if dataset.count and dataset.overviews(1):
            dataset.close()
            dataset = rasterio.open(path, OVERVIEW_LEVEL="NONE")
        return _Opened(dataset, transform)


@contextlib.contextmanager
def _reasons() -> Iterator[None]:
    """Turns what rasterio raises on files that are missing or damaged into ImageDecodeError, with GDAL's first line, and
    keeps GDAL's warnings from the terminal."""
    import rasterio
    from rasterio._err import CPLE_BaseError
    from rasterio.errors import RasterioError

    try:
        with rasterio.Env():
            yield
    except (RasterioError, CPLE_BaseError, OSError) as error:
        cause = error.__cause__ or error  # rasterio itself says "Read failed. See previous exception for details."
        raise codecs.ImageDecodeError((str(cause) or type(cause).__name__).splitlines()[0]) from error


@functools.lru_cache(maxsize=_OPEN_SCENES)
def _crs(path: str) -> str | None:
    crs = _open(path).dataset.crs
    return crs.to_string() if crs else None


@functools.lru_cache(maxsize=_OPEN_SCENES)
def _metres(path: str) -> tuple[float, float] | None:
    """Width and height of the pixel at the scene's centre in metres; None where it lies nowhere on the ground.

    In a projection it is what the transform says, in the projection's units, unless the ground there is another size
    (Web Mercator away from the equator).
    """
    from rasterio import warp
    from rasterio.errors import RasterioError

    scene = _open(path)
    crs, transform, middle = scene.dataset.crs, scene.transform, (scene.dataset.width / 2, scene.dataset.height / 2)
    if not crs or transform.is_identity or not (crs.is_projected or crs.is_geographic):
        return None
    points = [scene.at(middle[0] + right, middle[1] + down) for right, down in ((0, 0), (1, 0), (0, 1))]
    try:
        longitudes, latitudes = warp.transform(crs, "EPSG:4326", *zip(*points, strict=True))[:2]
    except RasterioError:
        longitudes, latitudes = [math.nan] * 3, [math.nan] * 3
    ground = tuple(_distance(longitudes, latitudes, other) for other in (1, 2))
    if crs.is_projected:
        unit = crs.linear_units_factor[1]
        sides = math.hypot(transform.a, transform.d) * unit, math.hypot(transform.b, transform.e) * unit
        if not any(abs(ours / theirs - 1) > _TRUE_SCALE for ours, theirs in zip(ground, sides, strict=True)):
            return sides
    return ground if all(0 < side < math.inf for side in ground) else None


def _distance(longitudes: list[float], latitudes: list[float], other: int) -> float:
    """Metres on the ellipsoid from point 0 to a near one; degrees."""
    latitude = math.radians(latitudes[0])
    shrink = 1 - _ECCENTRICITY * math.sin(latitude) ** 2
    east = (longitudes[other] - longitudes[0] + 180) % 360 - 180
    along = math.radians(east) * _EQUATOR / math.sqrt(shrink) * math.cos(latitude)
    return math.hypot(
        along, math.radians(latitudes[other] - latitudes[0]) * _EQUATOR * (1 - _ECCENTRICITY) / shrink**1.5
    )


def _date(name: str, stamp: str) -> str | None:
    """The day of a scene as YYYY-MM-DD, from its file's name or the TIFF's DateTime ("2020:08:31 12:00:00")."""
    found = [("".join(match.group(1, 3, 4)), "%Y%m%d") for match in _DAY.finditer(name)]
    found += [(match.group(1), "%Y%j") for match in _DAY_OF_YEAR.finditer(name)]
    found.append((stamp[:10], "%Y:%m:%d"))
    for text, form in found:
        try:
            return datetime.datetime.strptime(text, form).date().isoformat()
        except ValueError:
            continue
    return None
