"""Loading the metadata of a dataset folder and the histograms of its splits."""

from pathlib import Path

import numpy as np

from pera_jax.common.errors import UserError
from pera_jax.data import records, statistics
from pera_jax.data.float_histogram import FloatHistogram


def load(folder: Path, split: str | None = None) -> tuple[records.DatasetInfo, list[str]]:
    """Returns (metadata, names of all splits, or of the given one). Raises UserError as `records.load_info` and
    `records.check_split`."""
    info = records.load_info(folder)
    if split is None:
        return info, list(info.splits)
    records.check_split(folder, info, split)
    return info, [split]


def histogram(folder: Path, info: records.DatasetInfo, split: str) -> statistics.Histogram:
    """The histogram of each band of a split. Raises UserError if it is missing, damaged, or has other bands."""
    file = folder / statistics.file_name(split)
    counts = statistics.current(statistics.load(folder, split), info.dtype)
    if info.dtype == "float32":
        fits = isinstance(counts, FloatHistogram) and len(counts) == len(info.bands)
    else:
        shape = (len(info.bands), statistics.bins(info.dtype))
        fits = (
            isinstance(counts, np.ndarray) and (counts.shape, counts.dtype) == (shape, np.int64) and counts.min() >= 0
        )
    if not fits or not all(band.sum() for _, band in map(statistics.table, counts)):
        raise UserError(
            f"{file} does not have {len(info.bands)} bands of {info.dtype}; copy it again, or convert the dataset again"
        )
    return counts
