"""A data set folder as the tools read it: its metadata, and the histograms of its splits."""

from pathlib import Path

import numpy as np

from pera_jax.data import records, statistics
from pera_jax.errors import UserError


def load(folder: Path, split: str | None = None) -> tuple[records.DatasetInfo, list[str]]:
    """Returns (info, names of the splits to look at: all, or the one that is named). Raises UserError as
    `records.load_info` and `records.check_split`."""
    info = records.load_info(folder)
    if split is None:
        return info, list(info.splits)
    records.check_split(folder, info, split)
    return info, [split]


def histogram(folder: Path, info: records.DatasetInfo, split: str) -> np.ndarray:
    """The histogram of each band of a split, int64 [C, bins]. Raises UserError: missing, damaged, of other bands."""
    file = folder / statistics.file_name(split)
    counts = statistics.load(folder, split)
    expected = (len(info.bands), statistics.bins(info.dtype))
    if counts.shape != expected or counts.dtype != np.int64 or counts.min() < 0 or not counts.any(axis=1).all():
        raise UserError(
            f"{file} does not count {expected[0]} bands of {info.dtype}; copy it again, or convert the data set anew"
        )
    return counts
