"""Statistics of a band from its histogram: exact, and the same in whatever order images are counted.

uint8 has a bin per value. uint16 and float32 have 65,536: of uint16 one per value; of float32 one per pattern of the upper
16 bits, which is a relative width of 1/128. So every statistic, for whatever range is mapped to [0, 1], comes from one small
table per split, and counts of parts add up.
"""

import functools
import io
import pathlib

import numpy as np

from pera_jax.errors import UserError

PERCENTILES = (0.1, 1.0, 50.0, 99.0, 99.9)  # that info.json names
_RANGE = (1.0, 99.0)  # percentiles that map to 0 and 1 where nobody chose a range
_TINY = 1e-38  # below the least normal float32
_SIGN, _HALF_BIN = np.uint32(1 << 31), np.uint32(1 << 15)


def bins(dtype: str) -> int:
    """Number of bins."""
    return 256 if dtype == "uint8" else 65536


def count(pixels: np.ndarray, valid: np.ndarray | None = None) -> np.ndarray:
    """The histogram of each band, int64 [C, bins].

    Args:
      pixels: [H, W, C], uint8, uint16 or float32.
      valid: bool [H, W], the pixels that count; all by default.
    """
    rows = pixels.reshape(-1, pixels.shape[2]) if valid is None else pixels[valid]  # [N, C]
    number = bins(pixels.dtype.name)
    return np.stack([np.bincount(_bin(rows[:, band]), minlength=number) for band in range(rows.shape[1])])


def _bin(values: np.ndarray) -> np.ndarray:
    if values.dtype != np.float32:
        return values
    bits = np.ascontiguousarray(values).view(np.uint32)
    ordered = np.where(bits & _SIGN, ~bits, bits | _SIGN)  # as integers they are now ordered as the floats are
    return ordered >> 16


@functools.cache
def _centres(dtype: str) -> np.ndarray:
    """float64 [bins]: the value that stands for each bin, in stored units."""
    if dtype != "float32":
        return np.arange(bins(dtype), dtype=np.float64)
    ordered = (np.arange(bins(dtype), dtype=np.uint32) << 16) | _HALF_BIN
    values = np.where(ordered & _SIGN, ordered & ~_SIGN, ~ordered).view(np.float32)
    values = np.where(np.isfinite(values), values, 0).astype(np.float64)  # no stored value has the other patterns
    return np.where(np.abs(values) < _TINY, 0.0, values)  # the bin of 0 begins with it


def percentiles(counts: np.ndarray, dtype: str, shares: tuple[float, ...]) -> np.ndarray:
    """The values, in stored units, below which `shares` percent of the pixels lie: float64 [len(shares), C].

    Args:
      counts: int64 [C, bins], at least one pixel in each band.
    """
    running = np.cumsum(counts, axis=1)
    found = [
        [np.searchsorted(band, share / 100 * band[-1], side="left") for band in running] for share in shares
    ]  # [S, C]
    return _centres(dtype)[np.minimum(found, bins(dtype) - 1)]


def default_ranges(counts: np.ndarray, dtype: str) -> list[list[float]]:
    """[low, high] per band, stored units: the full range of uint8, else percentiles 1 and 99."""
    if dtype == "uint8":
        return [[0.0, 255.0]] * len(counts)
    low, high = percentiles(counts, dtype, _RANGE)
    high = np.where(high > low, high, low + np.maximum(1.0 if dtype == "uint16" else 1e-6, 1e-3 * np.abs(low)))
    return [[float(a), float(b)] for a, b in zip(low, high, strict=True)]


def moments(counts: np.ndarray, dtype: str, ranges: list[list[float]]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each band after its range was mapped to [0, 1] and clipped: float64 [C] each.

    Args:
      counts: int64 [C, bins].
      ranges: [low, high] per band, stored units.
    """
    low, high = np.asarray(ranges, np.float64).T[:, :, None]  # [C, 1] each
    values = np.clip((_centres(dtype) - low) / (high - low), 0.0, 1.0)  # [C, bins]
    pixels = counts.sum(axis=1)
    mean = (counts * values).sum(axis=1) / pixels
    variance = (counts * values**2).sum(axis=1) / pixels - mean**2
    return mean, np.sqrt(np.maximum(variance, 0.0))


def file_name(split: str) -> str:
    """The file in a data set folder that holds the histograms of a split."""
    return f"{split}.histogram.npz"


def to_bytes(counts: np.ndarray) -> bytes:
    """The content of a histogram's file: NumPy's npz with int64 `counts` [C, bins], the same bytes for the same counts."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, counts=counts)  # NumPy stamps no time into the archive
    return buffer.getvalue()


def from_bytes(content: bytes) -> np.ndarray:
    """What `to_bytes` packed: int64 [C, bins]."""
    with np.load(io.BytesIO(content)) as arrays:
        return arrays["counts"]


def load(path: str | pathlib.Path, split: str) -> np.ndarray:
    """The histograms of a split, int64 [C, bins]. Raises UserError where the file is missing or damaged."""
    file = pathlib.Path(path) / file_name(split)
    try:
        return from_bytes(file.read_bytes())
    except Exception as error:  # on damaged bytes NumPy and zipfile raise nearly anything
        raise UserError(f"{file} cannot be read ({error}); copy the data set folder whole, or convert it anew") from error
