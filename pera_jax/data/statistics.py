"""Band statistics from histograms: exact, and independent of the order of the images.

For uint8 and uint16 a histogram is an array with one bin per value; for float32 it is a `FloatHistogram`, which
distinguishes values to 1/4096 or better. So statistics for any range come from one small table per split, and
histograms of parts can be added.
"""

import io
import pathlib

import numpy as np

from pera_jax.common.errors import UserError
from pera_jax.data.float_histogram import Cells, FloatHistogram

PERCENTILES = (0.1, 1.0, 50.0, 99.0, 99.9)  # that info.json names
_RANGE = (1.0, 99.0)  # percentiles mapped to 0 and 1 by default
_OLD_BINS = 65536  # bins of float32 in older folders
Histogram = np.ndarray | FloatHistogram  # int64 [C, bins] for uint8 and uint16


def bins(dtype: str) -> int:
    """Number of bins of uint8 or uint16."""
    return {"uint8": 256, "uint16": 65536}[dtype]


def count(pixels: np.ndarray, valid: np.ndarray | None = None) -> Histogram:
    """The histogram of each band.

    Args:
      pixels: [H, W, C], uint8, uint16 or finite float32.
      valid: bool [H, W] or [H, W, C], the pixels to count; by default all.
    """
    bands = np.moveaxis(pixels, 2, 0)  # [C, H, W]
    if valid is None:
        values = [band.reshape(-1) for band in bands]
    else:
        of_each = np.moveaxis(valid, 2, 0) if valid.ndim == 3 else [valid] * len(bands)
        values = [band[here] for band, here in zip(bands, of_each, strict=True)]
    if pixels.dtype == np.float32:
        return FloatHistogram.count(values)
    number = bins(pixels.dtype.name)
    return np.stack([np.bincount(band, minlength=number) for band in values])


def table(band: np.ndarray | Cells) -> tuple[np.ndarray, np.ndarray]:
    """(float64 [n], int64 [n]) of one band: values in stored units, ascending, and their counts."""
    if isinstance(band, Cells):
        return band.middles(), band.counts
    return np.arange(len(band), dtype=np.float64), band


def current(counts: Histogram, dtype: str) -> Histogram:
    """The histogram in the current form: for float32, older folders have one bin per 16-bit pattern."""
    old = dtype == "float32" and isinstance(counts, np.ndarray) and counts.shape[1:] == (_OLD_BINS,)
    return FloatHistogram.from_bins(counts) if old else counts


def differences(one: Histogram, other: Histogram) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each band (float64 [n], int64 [n]): values, and how many more of them `one` has than `other`.

    For float32, in cells that both distinguish.
    """
    found = []
    for ours, theirs in zip(one, other, strict=True):
        if not isinstance(ours, Cells):
            found.append((table(ours)[0], ours - theirs))
            continue
        ours, theirs = ours.coarser(theirs.shifts), theirs.coarser(ours.shifts)
        both = Cells(np.union1d(ours.keys, theirs.keys), np.empty(0, np.int64), ours.shifts)
        more = np.zeros(len(both.keys), np.int64)
        more[np.searchsorted(both.keys, ours.keys)] += ours.counts
        more[np.searchsorted(both.keys, theirs.keys)] -= theirs.counts
        found.append((both.middles(), more))
    return found


def percentiles(counts: Histogram, dtype: str, shares: tuple[float, ...]) -> np.ndarray:
    """Percentiles `shares` (in percent) in stored units: float64 [len(shares), C].

    Args:
      counts: with at least one pixel in each band.
    """
    found = []  # [C, S]
    for band in current(counts, dtype):
        values, held = table(band)
        running = np.cumsum(held)
        places = np.searchsorted(running, [share / 100 * running[-1] for share in shares], side="left")
        found.append(values[np.minimum(places, len(values) - 1)])
    return np.array(found).T


def default_ranges(counts: Histogram, dtype: str) -> list[list[float]]:
    """[low, high] per band in stored units: the full range for uint8, else percentiles 1 and 99."""
    if dtype == "uint8":
        return [[0.0, 255.0]] * len(counts)
    low, high = percentiles(counts, dtype, _RANGE)
    high = np.where(high > low, high, low + np.maximum(1.0 if dtype == "uint16" else 1e-6, 1e-3 * np.abs(low)))
    return [[float(a), float(b)] for a, b in zip(low, high, strict=True)]


def moments(counts: Histogram, dtype: str, ranges: list[list[float]]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each band after its range is mapped to [0, 1] and clipped: float64 [C] each.

    Args:
      ranges: [low, high] per band in stored units.
    """
    means, deviations = [], []
    for band, (low, high) in zip(current(counts, dtype), ranges, strict=True):
        values, held = table(band)
        mapped, pixels = np.clip((values - low) / (high - low), 0.0, 1.0), held.sum()
        mean = (held * mapped).sum() / pixels
        means.append(mean)
        deviations.append(np.sqrt((held * (mapped - mean) ** 2).sum() / pixels))
    return np.array(means), np.array(deviations)


def file_name(split: str) -> str:
    """Name of the file in a dataset folder with the histograms of a split."""
    return f"{split}.histogram.npz"


def to_bytes(counts: Histogram) -> bytes:
    """Content of a histogram file, deterministic: an npz with `counts` int64 [C, bins] or, for float32, the arrays of
    `FloatHistogram.arrays`."""
    buffer = io.BytesIO()
    arrays = counts.arrays() if isinstance(counts, FloatHistogram) else {"counts": counts}
    np.savez_compressed(buffer, **arrays)  # NumPy writes no timestamps
    return buffer.getvalue()


def from_bytes(content: bytes) -> Histogram:
    """The inverse of `to_bytes`."""
    with np.load(io.BytesIO(content)) as arrays:
        return FloatHistogram.from_arrays(**arrays) if "steps" in arrays else arrays["counts"]


def load(path: str | pathlib.Path, split: str) -> Histogram:
    """The histograms of a split. Raises UserError if the file is missing or damaged."""
    file = pathlib.Path(path) / file_name(split)
    try:
        return from_bytes(file.read_bytes())
    except Exception as error:  # on damaged bytes NumPy and zipfile raise nearly anything
        raise UserError(
            f"{file} cannot be read ({error}); copy the whole dataset folder again, or convert it again"
        ) from error
