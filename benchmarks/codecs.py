"""Size and time of the codec of TIFF records beside others.

    python benchmarks/codecs.py                                       # made images of every dtype
    python benchmarks/codecs.py --input scenes/*.tif --tile 256       # tiles of your own, read with rasterio

"tiff zstd" is what datasets hold: horizontal differences, Zstandard. "tiff deflate" is the same with zlib's code at level 6,
which every TIFF reader knows; "lerc" is Esri's code for rasters, without loss (floats it then stores as they are). Made
images: noise of many scales, as the ground has it, and a little white noise, as a sensor has it. Times are CPU times, the best of --repeat.
"""

import argparse
import io
import pathlib
import sys
import time
from collections.abc import Callable

import imagecodecs
import numpy as np
import tifffile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from pera_jax.common import errors  # noqa: E402
from pera_jax.data import codecs  # noqa: E402

_MOST_TILES = 16  # of one file


def deflate(pixels: np.ndarray) -> bytes:
    """As `codecs.encode_tiff`, but packed with zlib's code."""
    buffer = io.BytesIO()
    tifffile.imwrite(
        buffer, np.ascontiguousarray(np.moveaxis(pixels, 2, 0)), photometric="minisblack", compression="zlib",
        planarconfig="separate" if pixels.shape[2] > 1 else None, rowsperstrip=len(pixels), metadata=None,
        predictor=3 if pixels.dtype.kind == "f" else 2,
    )  # fmt: skip
    return buffer.getvalue()


def lerc(pixels: np.ndarray) -> bytes:
    return imagecodecs.lerc_encode(np.ascontiguousarray(np.moveaxis(pixels, 2, 0)), level=0.0)


def lerc_back(encoded: bytes) -> np.ndarray:
    return np.ascontiguousarray(np.moveaxis(imagecodecs.lerc_decode(encoded), 0, 2))


CODECS = {
    "tiff zstd": (codecs.encode_tiff, codecs.decode_image),
    "tiff deflate": (deflate, codecs.decode_image),
    "lerc": (lerc, lerc_back),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--input", type=pathlib.Path, nargs="+", help="GeoTIFFs; default: made images")
    parser.add_argument("--tile", type=int, default=256, help="side of a tile in pixels (%(default)s)")
    parser.add_argument("--repeat", type=int, default=3, help="times each is measured (%(default)s)")
    arguments = parser.parse_args()
    if arguments.input:
        sets = {path.name: tiles_of(path, arguments.tile) for path in arguments.input}
    else:
        sets = {f"{bands} bands of {dtype}, made": made(bands, dtype, arguments.tile)
                for bands, dtype in ((4, "uint8"), (13, "uint16"), (10, "float32"))}  # fmt: skip
    wide = max(map(len, sets))
    print(f"{'images':{wide}}  {'codec':12}  {'MB':>7}  {'of raw':>6}  {'encode MB/s':>11}  {'decode MB/s':>11}")
    for name, tiles in sets.items():
        for codec, ways in CODECS.items():
            raw = sum(tile.nbytes for tile in tiles) / 1e6
            size, encode, decode = measure(tiles, *ways, arguments.repeat)
            print(
                f"{name:{wide}}  {codec:12}  {raw:7.2f}  {size / raw:6.3f}  {raw / encode:11.0f}  {raw / decode:11.0f}"
            )


def measure(tiles: list[np.ndarray], encode: Callable, decode: Callable, repeat: int) -> tuple[float, float, float]:
    """(MB, CPU seconds to encode all tiles, to decode them). Raises ValueError where pixels change."""
    times = []
    for _ in range(repeat):
        start = time.process_time()
        encoded = [encode(tile) for tile in tiles]
        middle = time.process_time()
        decoded = [decode(content) for content in encoded]
        times.append((middle - start, time.process_time() - middle))
    if not all(map(np.array_equal, tiles, decoded)):
        raise ValueError("a codec changed the pixels")
    return sum(map(len, encoded)) / 1e6, *map(min, zip(*times, strict=True))


def made(bands: int, dtype: str, side: int) -> list[np.ndarray]:
    """Four tiles [side, side, bands] of noise whose strength falls with its frequency."""
    rng = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
    strength = 1 / np.maximum(frequency, 1 / side) ** 1.5
    tiles = []
    for _ in range(4):
        ground = [
            np.fft.irfft2(np.fft.rfft2(rng.standard_normal((side, side))) * strength, s=(side, side))
            for _ in range(bands)
        ]
        values = np.stack([(plane - plane.min()) / np.ptp(plane) for plane in ground], axis=2) + rng.normal(
            0, 0.004, (side, side, bands)
        )
        scale = 255 if dtype == "uint8" else 4000
        values = np.clip(values, 0, 1) * scale
        tiles.append(values.astype(dtype) if dtype == "float32" else np.round(values).astype(dtype))
    return tiles


def tiles_of(path: pathlib.Path, side: int) -> list[np.ndarray]:
    """The first tiles [<= side, <= side, C] of a scene. Raises UserError where it cannot be read or holds another dtype."""
    from data_prep.convert.pixels import Rejected
    from data_prep.geo import scene_file, scene_reader

    scene_file.require_rasterio()
    try:
        scene = scene_reader.describe(str(path))
        width, height = (min(side, own) for own in scene.sides)
        places = [(column, row) for row in range(0, scene.sides[1] - height + 1, height)
                  for column in range(0, scene.sides[0] - width + 1, width)]  # fmt: skip
        tiles = [
            scene_reader.Tile((*place, width, height), width, height, tuple(scene.names), scene.alpha) for place in places
        ]
        return [scene_reader.read(str(path), tile)[0] for tile in tiles[:_MOST_TILES]]
    except (codecs.ImageDecodeError, Rejected) as error:
        raise errors.UserError(f"--input {path} cannot be read ({error}); name GeoTIFFs") from error


if __name__ == "__main__":
    errors.run(main)
