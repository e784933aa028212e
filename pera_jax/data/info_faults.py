"""Consistency checks of info.json beyond the types of its fields."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pera_jax.common.text import printable
from pera_jax.data import codecs

if TYPE_CHECKING:  # `records` calls this module
    from pera_jax.data.records import DatasetInfo, SplitInfo

def fault(info: DatasetInfo) -> str | None:
    """The first inconsistency, as part of a sentence; None if there is none."""
    if not info.bands or len(set(info.bands)) < len(info.bands):
        return "bands must be a list of unique names"
    if info.dtype not in codecs.DTYPES:
        return f"dtype is {printable(info.dtype)}, expected one of {', '.join(codecs.DTYPES)}"
    if not info.splits:
        return "it has no splits"
    if info.class_names is not None and len(set(info.class_names)) < len(info.class_names):
        return "class_names contains a name twice"
    for name, split in info.splits.items():
        wrong = _fault_of_split(split, len(info.bands))
        if wrong:
            return f"split '{printable(name)}' {wrong}"
    return None


def _fault_of_split(split: SplitInfo, bands: int) -> str | None:
    shards = len(split.shards)
    if len({shards, len(split.shard_records), len(split.shard_bytes)}) > 1:
        return f"has {shards} shards, but {len(split.shard_records)} record counts and {len(split.shard_bytes)} sizes"
    if len(set(split.shards)) < shards:
        return "names a shard twice"
    if sum(split.shard_records) != split.records:
        return f"has {split.records:,} records, but its shards have {sum(split.shard_records):,}"
    for name, held, size in zip(split.shards, split.shard_records, split.shard_bytes, strict=True):
        if held > size:  # protects readers from absurd record counts
            return f"claims {held:,} records in the {size:,} bytes of {printable(name)}"
    statistics = {"ranges": split.ranges, "means": split.mean, "standard deviations": split.std}
    statistics |= {f"percentile {percent}": values for percent, values in split.percentiles.items()}
    for name, values in statistics.items():
        if len(values) != bands:
            return f"has {printable(name)} for {len(values)} bands, expected {bands}"
    if not all(low < high for low, high in split.ranges):
        return "has a range that is not low < high"
    if min(split.std) < 0:
        return "has a negative standard deviation"
    return None
