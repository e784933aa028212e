"""Small GeoTIFFs, and their conversion to tiles without shards."""

import dataclasses
import json
import pathlib

import numpy as np
import rasterio

from data_prep import scenes
from data_prep.convert.pixels import Rejected
from data_prep.geo import scene_plan, scene_tiles
from data_prep.geo.scene_grid import length
from pera_jax.data import codecs

NORTH_UP = rasterio.Affine(10, 0, 500_000, 0, -10, 4_000_000)


def values(shape, dtype="uint16", seed=0):
    """Pixels [C, H, W] without a 0."""
    drawn = np.random.default_rng(seed).integers(1, 250 if dtype == "uint8" else 9000, shape)
    return drawn.astype(dtype)


def write(path, pixels, names=(), crs="EPSG:32633", transform=NORTH_UP, tags=None, **options):
    """A GeoTIFF of pixels [C, H, W]."""
    path.parent.mkdir(parents=True, exist_ok=True)
    count, height, width = pixels.shape
    options = {"photometric": "minisblack", **options}  # else GDAL makes the fourth band of uint8 an alpha band
    with rasterio.open(path, "w", driver=options.pop("driver", "GTiff"), width=width, height=height, count=count,
                       dtype=pixels.dtype, crs=crs, transform=transform, **options) as file:  # fmt: skip
        file.write(pixels)
        for number, name in enumerate(names, 1):
            file.set_band_description(number, name)
        if tags:  # else they would move the directory of the file to its end
            file.update_tags(**tags)
    return path


@dataclasses.dataclass
class Cut:
    """What a tile became; `stored` is None where it was rejected."""

    stored: object
    pixels: np.ndarray | None
    place: dict | None


def cut(paths, tile="32", stride=None, gsd=None, bands=None, names=None, max_nodata=0.1, nodata=(), scaled=False):
    """The conversion without its shards: ({key: Cut}, names of the bands)."""
    files, _ = scene_plan.list_scenes([pathlib.Path(path) for path in paths])
    found, unreadable, _ = scene_plan.look_at(files, 0.0, scaled)
    choices, _ = scene_plan.choose_bands(files, found, bands, names)
    items, _ = scene_tiles.plan_tiles(files, found, unreadable, choices, length(tile), length(stride or tile), gsd)
    cuts = {}
    for item in items:
        try:
            stored = scenes.convert_tile(item, max_nodata, nodata, scaled)
            cuts[item.key] = Cut(stored, codecs.decode_image(stored.data), json.loads(stored.place))
        except Rejected:
            cuts[item.key] = Cut(None, None, None)
    return cuts, next(iter(choices.values())).names
