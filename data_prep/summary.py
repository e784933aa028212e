"""What the parts of a split add up to: its entry in info.json, and the report of its conversion."""

import collections
import hashlib

import numpy as np

from data_prep.shards import Part
from pera_jax.data import records


def split_info(parts: list[Part], source: str) -> records.SplitInfo:
    """The entry of a split; `parts` in the order of the shards."""
    counts = sum(part.histogram for part in parts)  # [3, 256]: exact, so the statistics do not depend on any order
    values = np.arange(256) / 255.0
    pixels = counts.sum(axis=1)
    mean = counts @ values / pixels
    variance = counts @ values**2 / pixels - mean**2
    fingerprint = hashlib.sha256(b"".join(digest for part in parts for digest in part.digests)).hexdigest()
    return records.SplitInfo(
        records=sum(len(part.digests) for part in parts),
        shards=[part.shard for part in parts],
        shard_records=[len(part.digests) for part in parts],
        shard_bytes=[part.bytes for part in parts],
        mean=[round(float(value), 6) for value in mean],
        std=[round(float(value) ** 0.5, 6) for value in np.maximum(variance, 0.0)],
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
    written = sum(len(part.digests) for part in parts)
    return {
        "split": split,
        "images": written + len(corrupt),
        "records": written,
        "corrupt": corrupt,
        "changed": dict(sorted(changes.items())),
        "ignored_files": ignored,
    }
