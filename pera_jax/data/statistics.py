"""Statistics of a band from its histogram: exact, and the same in whatever order images are counted.

Of uint8 and uint16 a histogram is an array with a bin for every value; of float32 it is a `FloatHistogram`, which
distinguishes values to 1/4096 or better. So every statistic, for whatever range is mapped to [0, 1], comes from one small table
per split, and counts of parts add up.
"""

import io
import pathlib

import numpy as np

from pera_jax.common.errors import UserError
from pera_jax.data.float_histogram import Cells, FloatHistogram

PERCENTILES = (0.1, 1.0, 50.0, 99.0, 99.9)  # that info.json names
_RANGE = (1.0, 99.0)  # percentiles that map to 0 and 1 where nobody chose a range
_OLD_BINS = 65536  # of float32 in older folders
Histogram = np.ndarray | FloatHistogram  # int64 [C, bins] of whole numbers


def bins(dtype: str) -> int:
    """Number of bins of uint8 or uint16."""
    return {"uint8": 256, "uint16": 65536}[dtype]


def count(pixels: np.ndarray, valid: np.ndarray | None = None) -> Histogram:
    """The histogram of each band.

    Args:
      pixels: [H, W, C], uint8, uint16 or finite float32.
      valid: bool [H, W] or [H, W, C], the pixels that count; all by default.
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
    """(float64 [n], int64 [n]) of one band: values in stored units, ascending, and how many there are of each."""
    if isinstance(band, Cells):
        return band.middles(), band.counts
    return np.arange(len(band), dtype=np.float64), band


def of_dtype(counts: Histogram, dtype: str) -> Histogram:
    """The histogram as this version counts it: of float32, older folders hold a bin for each pattern of 16 bits."""
    old = dtype == "float32" and isinstance(counts, np.ndarray) and counts.shape[1:] == (_OLD_BINS,)
    return FloatHistogram.of_bins(counts) if old else counts


def differences(one: Histogram, other: Histogram) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each band (float64 [n], int64 [n]): values, and how many more of them `one` counts than `other`.

    Of float32 in the cells that both distinguish.
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
    """The values, in stored units, below which `shares` percent of the pixels lie: float64 [len(shares), C].

    Args:
      counts: at least one pixel in each band.
    """
    found = []  # [C, S]
    for band in of_dtype(counts, dtype):
        values, held = table(band)
        running = np.cumsum(held)
        places = np.searchsorted(running, [share / 100 * running[-1] for share in shares], side="left")
        found.append(values[np.minimum(places, len(values) - 1)])
    return np.array(found).T


def default_ranges(counts: Histogram, dtype: str) -> list[list[float]]:
    """[low, high] per band, stored units: the full range of uint8, else percentiles 1 and 99."""
    if dtype == "uint8":
        return [[0.0, 255.0]] * len(counts)
    low, high = percentiles(counts, dtype, _RANGE)
    high = np.where(high > low, high, low + np.maximum(1.0 if dtype == "uint16" else 1e-6, 1e-3 * np.abs(low)))
    return [[float(a), float(b)] for a, b in zip(low, high, strict=True)]


def moments(counts: Histogram, dtype: str, ranges: list[list[float]]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each band after its range was mapped to [0, 1] and clipped: float64 [C] each.

    Args:
      ranges: [low, high] per band, stored units.
    """
    means, deviations = [], []
    for band, (low, high) in zip(of_dtype(counts, dtype), ranges, strict=True):
        values, held = table(band)
        mapped, pixels = np.clip((values - low) / (high - low), 0.0, 1.0), held.sum()
        mean = (held * mapped).sum() / pixels
        means.append(mean)
        deviations.append(np.sqrt((held * (mapped - mean) ** 2).sum() / pixels))
    return np.array(means), np.array(deviations)


def file_name(split: str) -> str:
    """The file in a data set folder that holds the histograms of a split."""
    return f"{split}.histogram.npz"


def to_bytes(counts: Histogram) -> bytes:
    """The content of a histogram's file, the same bytes for the same counts: NumPy's npz with `counts` int64 [C, bins], or
    of float32 what `FloatHistogram.arrays` says."""
    buffer = io.BytesIO()
    arrays = counts.arrays() if isinstance(counts, FloatHistogram) else {"counts": counts}
    np.savez_compressed(buffer, **arrays)  # NumPy stamps no time into the archive
    return buffer.getvalue()


def from_bytes(content: bytes) -> Histogram:
    """What `to_bytes` packed."""
    with np.load(io.BytesIO(content)) as arrays:
        return FloatHistogram.from_arrays(**arrays) if "steps" in arrays else arrays["counts"]


def load(path: str | pathlib.Path, split: str) -> Histogram:
    """The histograms of a split. Raises UserError where the file is missing or damaged."""
    file = pathlib.Path(path) / file_name(split)
    try:
        return from_bytes(file.read_bytes())
    except Exception as error:  # on damaged bytes NumPy and zipfile raise nearly anything
        raise UserError(f"{file} cannot be read ({error}); copy the data set folder whole, or convert it anew") from error
