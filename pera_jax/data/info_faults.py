"""What an info.json may not say, beyond the types of its fields."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pera_jax.common.text import printable
from pera_jax.data import codecs

if TYPE_CHECKING:  # `records` calls this module
    from pera_jax.data.records import DatasetInfo, SplitInfo

def fault(info: DatasetInfo) -> str | None:
    """What does not fit together, as a part of a sentence, or None."""
    if not info.bands or len(set(info.bands)) < len(info.bands):
        return "bands is no list of different names"
    if info.dtype not in codecs.DTYPES:
        return f"dtype is {printable(info.dtype)}, expected one of {', '.join(codecs.DTYPES)}"
    if not info.splits:
        return "it names no split"
    if info.class_names is not None and len(set(info.class_names)) < len(info.class_names):
        return "class_names holds a name twice"
    for name, split in info.splits.items():
        wrong = _fault_of_split(split, len(info.bands))
        if wrong:
            return f"split '{printable(name)}' {wrong}"
    return None


def _fault_of_split(split: SplitInfo, bands: int) -> str | None:
    shards = len(split.shards)
    if len({shards, len(split.shard_records), len(split.shard_bytes)}) > 1:
        return f"has {shards} shards, {len(split.shard_records)} numbers of records and {len(split.shard_bytes)} sizes"
    if len(set(split.shards)) < shards:
        return "names a shard twice"
    if sum(split.shard_records) != split.records:
        return f"has {split.records:,} records, and its shards {sum(split.shard_records):,}"
    for name, held, size in zip(split.shards, split.shard_records, split.shard_bytes, strict=True):
        if held > size:  # no reader is made, and no sample drawn, of a billion records that cannot be
            return f"says that {printable(name)} holds {held:,} records in {size:,} bytes"
    statistics = {"ranges": split.ranges, "means": split.mean, "deviations": split.std, **split.percentiles}
    for name, values in statistics.items():
        if len(values) != bands:
            return f"has {printable(name)} of {len(values)} bands and the data set {bands}"
    if not all(low < high for low, high in split.ranges):
        return "has a range whose lower end is not below its upper end"
    if min(split.std) < 0:
        return "has a negative deviation"
    return None
