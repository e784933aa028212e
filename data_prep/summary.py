"""What the parts of a split add up to: its entry in info.json, and the report of its conversion."""

import collections
import hashlib

import numpy as np

from data_prep.shards import Part
from pera_jax.data import records, statistics


def histogram(parts: list[Part]) -> np.ndarray:
    """The values of all pixels of a split, int64 [C, bins]."""
    return sum(statistics.from_bytes(part.histogram) for part in parts)


def split_info(parts: list[Part], counts: np.ndarray, dtype: str, source: str) -> records.SplitInfo:
    """The entry of a split; `parts` in the order of the shards, `counts` their histogram, `dtype` of the images."""
    ranges = statistics.default_ranges(counts, dtype)
    mean, std = statistics.moments(counts, dtype, ranges)
    found = statistics.percentiles(counts, dtype, statistics.PERCENTILES)  # [S, C]
    fingerprint = hashlib.sha256(b"".join(digest for part in parts for digest in part.digests)).hexdigest()
    return records.SplitInfo(
        records=sum(len(part.digests) for part in parts),
        shards=[part.shard for part in parts],
        shard_records=[len(part.digests) for part in parts],
        shard_bytes=[part.bytes for part in parts],
        ranges=ranges,
        mean=[round(float(value), 6) for value in mean],
        std=[round(float(value), 6) for value in std],
        percentiles={f"{share:g}": values.tolist() for share, values in zip(statistics.PERCENTILES, found, strict=True)},
        fingerprint=fingerprint,
        source=source,
    )


def report(split: str, parts: list[Part], ignored: dict[str, int]) -> dict:
    """What the conversion found: the content of SPLIT.report.json.

    `changed` counts images by what was done to them, and one image may count under several names; `ignored_files`
    counts files that were no candidates, by the ending of their name.
    """
    changes = collections.Counter()
    for part in parts:
        changes.update(part.changes)
    corrupt = [{"key": key, "reason": reason} for part in parts for key, reason in part.corrupt]
    rejected = [{"key": key, "reason": reason} for part in parts for key, reason in part.rejected]
    written = sum(len(part.digests) for part in parts)
    return {
        "split": split,
        "images": written + len(corrupt) + len(rejected),
        "records": written,
        "corrupt": corrupt,
        "rejected": rejected,
        "changed": dict(sorted(changes.items())),
        "ignored_files": ignored,
    }
