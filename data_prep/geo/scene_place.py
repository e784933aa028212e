"""Georeferencing of scenes and tiles by a transform, ground control points or RPCs.

* Control points are fitted by an affine transform if it matches all of them within half a pixel; otherwise by GDAL's
  polynomial, and tiles have bounds but no transform.
* RPCs (rational polynomial coefficients of raw satellite images) are evaluated at their reference height: without a
  terrain model, bounds are off by meters to hundreds of meters.
"""

import dataclasses
import datetime
import functools
import json
import math
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

from data_prep.geo.scene_file import OPEN_SCENES, opened, reasons

_TRUE_SCALE = (
    0.02  # relative difference of projected and true pixel size above which the true size is used
)
_FITS = 0.5  # maximum error of the transform at control points, in pixels
# WGS84: equatorial radius in meters, first eccentricity squared
_EQUATOR, _ECCENTRICITY = 6378137.0, 0.0066943799901413165
_DAY = re.compile(r"(?<!\d)((?:19|20)\d\d)([-_.]?)(\d\d)\2(\d\d)(?!\d)")
_DAY_OF_YEAR = re.compile(r"(?<!\d)((?:19|20)\d{5})T")  # HLS: 2020208T154911


@dataclasses.dataclass(frozen=True)
class Georeference:
    """How the pixels of a scene lie in a CRS.

    Attributes:
      kind: "transform", "gcps" or "rpcs".
      crs: of rasterio; None if the file has none.
      transform: a, b, c, d, e, f of x = a column + b row + c, y = d column + e row + f; None if it is not affine.
      at: maps (column, row) to (x, y).
    """

    kind: str
    crs: Any
    transform: tuple[float, ...] | None
    at: Callable[[float, float], tuple[float, float]]


@functools.lru_cache(maxsize=OPEN_SCENES)
def georeference(path: str) -> Georeference | None:
    """The georeference of a scene; None without one. Raises as `scene_file.reasons`."""
    dataset = opened(path)
    with reasons(path):
        transform = dataset.transform
        if not transform.is_identity:
            return _affine("transform", dataset.crs, transform[:6])
        points, crs = dataset.gcps
        if len(points) >= 3:
            return _of_points(points, crs)
        if dataset.rpcs is not None:
            return _of_rpcs(dataset.rpcs)
    return None


def _affine(kind: str, crs: Any, transform: Sequence[float]) -> Georeference:
    a, b, c, d, e, f = transform
    return Georeference(
        kind, crs, tuple(transform), lambda column, row: (a * column + b * row + c, d * column + e * row + f)
    )


def _of_points(points: list, crs: Any) -> Georeference:
    from rasterio.transform import GCPTransformer, from_gcps

    fitted = from_gcps(points)
    if all(math.isfinite(side) for side in fitted) and fitted.determinant:
        back = ~fitted
        missed = [math.dist(back * (point.x, point.y), (point.col, point.row)) for point in points]
        if max(missed) <= _FITS:
            return _affine("gcps", crs, fitted[:6])
    through = GCPTransformer(points)
    return Georeference("gcps", crs, None, lambda column, row: _pair(through.xy([row], [column], offset="ul")))


def _of_rpcs(rpcs: Any) -> Georeference:
    from rasterio.crs import CRS
    from rasterio.transform import RPCTransformer

    through, height = RPCTransformer(rpcs), [rpcs.height_off]
    return Georeference(
        "rpcs",
        CRS.from_epsg(4326),
        None,
        lambda column, row: _pair(through.xy([row], [column], zs=height, offset="ul")),
    )


def _pair(found: tuple[Sequence[float], Sequence[float]]) -> tuple[float, float]:
    (x,), (y,) = found
    return float(x), float(y)


@functools.lru_cache(maxsize=OPEN_SCENES)
def _crs(path: str) -> str | None:
    crs = georeference(path).crs
    with reasons(path):
        return crs.to_string() if crs else None


@functools.lru_cache(maxsize=OPEN_SCENES)
def meters(path: str) -> tuple[float, float] | None:
    """Width and height in meters of the pixel at the center of a scene; None without a georeference.

    For projected CRSs it follows from the transform, unless the true ground size differs (Web Mercator away from the
    equator). Raises as `scene_file.reasons`.
    """
    from rasterio import warp
    from rasterio.errors import RasterioError

    scene, dataset = georeference(path), opened(path)
    if scene is None:
        return None
    crs, middle = scene.crs, (dataset.width / 2, dataset.height / 2)
    with reasons(path):
        if not crs or not (crs.is_projected or crs.is_geographic):
            return None
        points = [scene.at(middle[0] + right, middle[1] + down) for right, down in ((0, 0), (1, 0), (0, 1))]
        try:
            longitudes, latitudes = warp.transform(crs, "EPSG:4326", *zip(*points, strict=True))[:2]
        except RasterioError:
            longitudes, latitudes = [math.nan] * 3, [math.nan] * 3
        ground = tuple(_distance(longitudes, latitudes, other) for other in (1, 2))
        if crs.is_projected:
            unit = crs.linear_units_factor[1]
            if scene.transform is None:
                sides = tuple(math.dist(points[0], other) * unit for other in points[1:])
            else:
                a, b, _, d, e, _ = scene.transform
                sides = math.hypot(a, d) * unit, math.hypot(b, e) * unit
            known = all(0 < side < math.inf for side in sides)
            if known and not any(
                abs(ours / theirs - 1) > _TRUE_SCALE for ours, theirs in zip(ground, sides, strict=True)
            ):
                return sides
    return ground if all(0 < side < math.inf for side in ground) else None


def _distance(longitudes: list[float], latitudes: list[float], other: int) -> float:
    """Distance in meters on the ellipsoid from point 0 to a nearby one, in degrees."""
    if not all(map(math.isfinite, (*longitudes, *latitudes))):
        return math.nan
    latitude = math.radians(latitudes[0])
    shrink = 1 - _ECCENTRICITY * math.sin(latitude) ** 2
    east = (longitudes[other] - longitudes[0] + 180) % 360 - 180
    along = math.radians(east) * _EQUATOR / math.sqrt(shrink) * math.cos(latitude)
    return math.hypot(
        along, math.radians(latitudes[other] - latitudes[0]) * _EQUATOR * (1 - _ECCENTRICITY) / shrink**1.5
    )


def place(path: str, tile: Any, source: str, no_data: dict | None = None) -> str:
    """Location and source of a tile, as JSON text.

    Args:
      tile: a `scene_reader.Tile`.
      source: name of the scene.
      no_data: result of `scene_reader.no_data` for the tile.

    Returns:
      `source` and `window` [column, row, width, height] in its pixels; `no_data` if there are nodata pixels. If known:
      `crs` (EPSG code or WKT), `bounds` [left, bottom, right, top] and `transform` in that CRS (x = a column + b row +
      c, y = d column + e row + f, in pixels of the tile), `georeference` for ground control points ("gcps") and RPCs
      ("rpcs"), `pixel_metres` [width, height], and the `date` of the scene (2020-08-31), from the file name or else the
      TIFF.
    """
    column, row, width, height = tile.window
    facts = {"source": source, "window": [_whole(side) for side in tile.window]}
    if no_data:
        facts["no_data"] = no_data
    scene = georeference(path)
    with reasons(path):
        if scene is not None:
            across, down = width / tile.columns, height / tile.rows
            xs, ys = zip(*(scene.at(column + i * width, row + j * height) for i in (0, 1) for j in (0, 1)), strict=True)
            if all(map(math.isfinite, (*xs, *ys))):
                facts["bounds"] = [min(xs), min(ys), max(xs), max(ys)]
            if scene.transform is not None:
                a, b, _, d, e, _ = scene.transform
                left, top = scene.at(column, row)
                facts["transform"] = [a * across, b * down, left, d * across, e * down, top]
            if scene.kind != "transform":
                facts["georeference"] = scene.kind
            if crs := _crs(path):
                facts["crs"] = crs
            if sides := meters(path):
                facts["pixel_metres"] = [round(sides[0] * across, 6), round(sides[1] * down, 6)]
        if date := _date(os.path.basename(path), opened(path).tags().get("TIFFTAG_DATETIME", "")):
            facts["date"] = date
        return json.dumps(facts, separators=(",", ":"), allow_nan=False)


def _whole(side: float) -> int | float:
    return int(side) if side == int(side) else round(side, 6)


def _date(name: str, stamp: str) -> str | None:
    """The date of a scene as YYYY-MM-DD, from its file name or the TIFF's DateTime ("2020:08:31 12:00:00")."""
    found = [("".join(match.group(1, 3, 4)), "%Y%m%d") for match in _DAY.finditer(name)]
    found += [(match.group(1), "%Y%j") for match in _DAY_OF_YEAR.finditer(name)]
    found.append((stamp[:10], "%Y:%m:%d"))
    for text, form in found:
        try:
            return datetime.datetime.strptime(text, form).date().isoformat()
        except ValueError:
            continue
    return None
