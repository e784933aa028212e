"""Compares the codec of TIFF records with others: compressed size and CPU time.

    python benchmarks/codecs.py                                       # synthetic images of every dtype
    python benchmarks/codecs.py --input scenes/*.tif --tile 256       # tiles of your own scenes, read with rasterio

"tiff zstd" is the codec of datasets: horizontal differencing and Zstandard. "tiff deflate" uses zlib level 6 instead,
which every TIFF reader supports. "lerc" is Esri's raster codec in lossless mode, which stores floats uncompressed.
Synthetic images are noise on many scales, like the ground, plus a little white noise, like a sensor. Times are CPU
times, the best of --repeat.
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

_MAX_TILES = 16  # per file


def deflate(pixels: np.ndarray) -> bytes:
    """Like `codecs.encode_tiff`, but with zlib compression."""
    buffer = io.BytesIO()
    tifffile.imwrite(
        buffer, np.ascontiguousarray(np.moveaxis(pixels, 2, 0)), photometric="minisblack", compression="zlib",
        planarconfig="separate" if pixels.shape[2] > 1 else None, rowsperstrip=len(pixels), metadata=None,
        predictor=3 if pixels.dtype.kind == "f" else 2,
    )  # fmt: skip
    return buffer.getvalue()


def lerc(pixels: np.ndarray) -> bytes:
    return imagecodecs.lerc_encode(np.ascontiguousarray(np.moveaxis(pixels, 2, 0)), level=0.0)


def lerc_decode(encoded: bytes) -> np.ndarray:
    return np.ascontiguousarray(np.moveaxis(imagecodecs.lerc_decode(encoded), 0, 2))


CODECS = {
    "tiff zstd": (codecs.encode_tiff, codecs.decode_image),
    "tiff deflate": (deflate, codecs.decode_image),
    "lerc": (lerc, lerc_decode),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--input", type=pathlib.Path, nargs="+", help="GeoTIFFs (default: synthetic images)")
    parser.add_argument("--tile", type=int, default=256, help="tile size in pixels (default: %(default)s)")
    parser.add_argument("--repeat", type=int, default=3, help="number of measurements (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.input:
        sets = {path.name: tiles_of(path, arguments.tile) for path in arguments.input}
    else:
        sets = {f"{bands} bands of {dtype}, synthetic": synthetic(bands, dtype, arguments.tile)
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
    """(MB, CPU seconds to encode all tiles, CPU seconds to decode them). Raises ValueError if pixels change."""
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


def synthetic(bands: int, dtype: str, side: int) -> list[np.ndarray]:
    """Four tiles [side, side, bands] of noise whose amplitude decreases with frequency."""
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
    """The first tiles [<= side, <= side, C] of a scene. Raises UserError if it cannot be read or has an unsupported
    dtype."""
    from data_prep.convert.pixels import Rejected
    from data_prep.geo import scene_file, scene_reader

    scene_file.require_rasterio()
    try:
        scene = scene_reader.describe(str(path))
        width, height = (min(side, own) for own in scene.sides)
        places = [(column, row) for row in range(0, scene.sides[1] - height + 1, height)
                  for column in range(0, scene.sides[0] - width + 1, width)]  # fmt: skip
        tiles = [
            scene_reader.Tile((*place, width, height), width, height, tuple(scene.names), scene.alpha)
            for place in places
        ]
        return [scene_reader.read(str(path), tile)[0] for tile in tiles[:_MAX_TILES]]
    except (codecs.ImageDecodeError, Rejected) as error:
        raise errors.UserError(f"--input {path} cannot be read ({error}); pass GeoTIFFs") from error


if __name__ == "__main__":
    errors.run(main)
