"""The metadata of a data set folder as the tools read it: checked, with the histograms of its splits."""

from pathlib import Path

import numpy as np

from pera_jax.data import codecs, records, statistics
from pera_jax.errors import UserError


def load(folder: Path, split: str | None = None) -> tuple[records.DatasetInfo, list[str]]:
    """Returns (info, names of the splits to look at: all, or the one that is named).

    Raises UserError: no data set folder, no such split, or an info.json whose parts do not fit together.
    """
    info = records.load_info(folder)
    fault = _fault(info)
    if fault:
        raise UserError(
            f"{folder / records.INFO_FILE} is damaged: {fault}; copy it again, or convert the data set anew"
        )
    if split is not None and split not in info.splits:
        raise UserError(f"{folder} has no split {split!r}; it has {', '.join(sorted(info.splits))}")
    return info, list(info.splits) if split is None else [split]


def _fault(info: records.DatasetInfo) -> str | None:
    """What does not fit together, or None."""
    if not _all(info.bands, str) or not info.bands or len(set(info.bands)) < len(info.bands):
        return "bands is no list of names"
    if info.dtype not in codecs.DTYPES:
        return f"dtype {info.dtype!r} is none of {', '.join(codecs.DTYPES)}"
    if not (info.class_names is None or _all(info.class_names, str)) or not isinstance(info.has_places, bool):
        return "class_names is no list of names, or has_places not true or false"
    if not info.splits:
        return "it names no split"
    for name, split in info.splits.items():
        lists = (split.shards, split.shard_records, split.shard_bytes)
        if not (_all(lists[0], str) and all(_all(numbers, int) for numbers in lists[1:])):
            return f"the shards of split {name!r} are no lists of names and numbers"
        if len({*map(len, lists)}) > 1 or len(set(split.shards)) < len(split.shards):
            return f"split {name!r} has {len(split.shards)} shards and other numbers of sizes, or names one twice"
        if min(split.shard_records, default=0) < 0 or sum(split.shard_records) != split.records:
            return (
                f"the shards of split {name!r} hold {sum(split.shard_records)} records, and the split {split.records!r}"
            )
        per_band = (split.ranges, split.mean, split.std)
        if any(not isinstance(values, list) or len(values) != len(info.bands) for values in per_band):
            return f"split {name!r} has no statistics of {len(info.bands)} bands"
        pairs = [pair for pair in split.ranges if _all(pair, (int, float)) and len(pair) == 2 and pair[0] < pair[1]]
        if len(pairs) < len(info.bands) or not all(_all(values, (int, float)) for values in per_band[1:]):
            return f"split {name!r} has ranges, means or deviations that are no numbers, or a range without extent"
        if not isinstance(split.percentiles, dict) or not isinstance(split.fingerprint, str):
            return f"split {name!r} has no percentiles or no fingerprint"
    return None


def _all(values, kind) -> bool:
    return isinstance(values, list) and all(isinstance(value, kind) for value in values)


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
