"""Where on the ground a scene and its tiles lie: by its transform, its ground control points, or its RPCs.

* Control points are fitted by a transform where that meets each of them to half a pixel; else GDAL's polynomial goes
  through them, and tiles have bounds but no transform of their own.
* RPCs (rational polynomials of raw satellite images) are taken at the height that they are centred on: without a model of
  the terrain, bounds are off by metres to hundreds of metres.
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
    0.02  # where a projection's pixels differ by more than this from their size on the ground, the latter counts
)
_FITS = 0.5  # pixels by which a transform may miss a control point
_EQUATOR, _ECCENTRICITY = 6378137.0, 0.0066943799901413165  # of WGS84: radius in metres, first eccentricity squared
_DAY = re.compile(r"(?<!\d)((?:19|20)\d\d)([-_.]?)(\d\d)\2(\d\d)(?!\d)")
_DAY_OF_YEAR = re.compile(r"(?<!\d)((?:19|20)\d{5})T")  # HLS: 2020208T154911


@dataclasses.dataclass(frozen=True)
class Georeference:
    """How the pixels of a scene lie in a CRS.

    Attributes:
      kind: "transform", "gcps" or "rpcs".
      crs: rasterio's, None where the file names none.
      transform: a, b, c, d, e, f of x = a column + b row + c, y = d column + e row + f; None where no such numbers do.
      at: (x, y) of a (column, row).
    """

    kind: str
    crs: Any
    transform: tuple[float, ...] | None
    at: Callable[[float, float], tuple[float, float]]


@functools.lru_cache(maxsize=OPEN_SCENES)
def georeference(path: str) -> Georeference | None:
    """How a scene lies on the ground, None where the file does not say. Raises as `scene_file.reasons` does."""
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
    return Georeference(kind, crs, tuple(transform), lambda column, row: (a * column + b * row + c, d * column + e * row + f))


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
        "rpcs", CRS.from_epsg(4326), None, lambda column, row: _pair(through.xy([row], [column], zs=height, offset="ul"))
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
def metres(path: str) -> tuple[float, float] | None:
    """Width and height of the pixel at the scene's centre in metres; None where it lies nowhere on the ground.

    In a projection it is what the transform says, in the projection's units, unless the ground there is another size
    (Web Mercator away from the equator). Raises as `scene_file.reasons` does.
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
            if known and not any(abs(ours / theirs - 1) > _TRUE_SCALE for ours, theirs in zip(ground, sides, strict=True)):
                return sides
    return ground if all(0 < side < math.inf for side in ground) else None


def _distance(longitudes: list[float], latitudes: list[float], other: int) -> float:
    """Metres on the ellipsoid from point 0 to a near one; degrees."""
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
    """Where on the ground a tile lies, and what it was cut from, as JSON text.

    Args:
      tile: a `scene_reader.Tile`.
      source: the scene's name.
      no_data: what `scene_reader.no_data` says of the tile.

    Returns:
      `source` and `window` [column, row, width, height] in its pixels; `no_data` where some pixels have none. Where they
      are known: `crs` (EPSG code or WKT), `bounds` [left, bottom, right, top] and `transform` in that CRS (x = a column +
      b row + c, y = d column + e row + f, of the tile's pixels), `georeference` where they come from ground control points
      ("gcps") or RPCs ("rpcs"), `pixel_metres` [width, height], and `date` of the scene (2020-08-31): the first one in the
      name of the file, else that of the TIFF.
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
            if sides := metres(path):
                facts["pixel_metres"] = [round(sides[0] * across, 6), round(sides[1] * down, 6)]
        if date := _date(os.path.basename(path), opened(path).tags().get("TIFFTAG_DATETIME", "")):
            facts["date"] = date
        return json.dumps(facts, separators=(",", ":"), allow_nan=False)


def _whole(side: float) -> int | float:
    return int(side) if side == int(side) else round(side, 6)


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
