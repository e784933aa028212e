"""Combines the parts of a split into its entry in info.json and the report of the conversion."""

import collections
import csv
import hashlib
import io

from data_prep.convert.shards import Part
from pera_jax.data import records, statistics

_SHOWN, _REASONS = 20, 50  # maximum number of keys per list in the report, and of lists


def histogram(parts: list[Part]) -> statistics.Histogram:
    """The histogram of all pixels of a split."""
    return sum(statistics.from_bytes(part.histogram) for part in parts if part.records)


def split_info(parts: list[Part], counts: statistics.Histogram, dtype: str, source: str) -> records.SplitInfo:
    """The entry of a split, from its parts in the order of the shards and their histogram `counts`."""
    ranges = statistics.default_ranges(counts, dtype)
    mean, std = statistics.moments(counts, dtype, ranges)
    found = statistics.percentiles(counts, dtype, statistics.PERCENTILES)  # [S, C]
    fingerprint = hashlib.sha256(b"".join(part.digests for part in parts)).hexdigest()
    return records.SplitInfo(
        records=sum(part.records for part in parts),
        shards=[part.shard for part in parts],
        shard_records=[part.records for part in parts],
        shard_bytes=[part.bytes for part in parts],
        ranges=ranges,
        mean=[round(float(value), 6) for value in mean],
        std=[round(float(value), 6) for value in std],
        percentiles={
            f"{share:g}": values.tolist() for share, values in zip(statistics.PERCENTILES, found, strict=True)
        },
        fingerprint=fingerprint,
        source=source,
    )


def report(
    split: str,
    parts: list[Part],
    rejected: list[tuple[str, str]],
    duplicates: list[str],
    twins: list[str],
) -> tuple[dict, bytes]:
    """The outcome of every input: contents of SPLIT.report.json and SPLIT.inputs.csv.

    Each input counts in exactly one of `written`, `duplicates` (left out), `rejected` and `failed`, which sum to
    `inputs`. `found` lists findings of cleaning among the written images, `changed` counts changes; an image may occur
    under several names there. The report only shows the start of long lists; the table has every input that was not
    written, and every finding.

    Args:
      rejected: (name, reason) of files that are not candidates, in addition to those of the parts.
      duplicates: keys of exact duplicates that were left out.
      twins: keys of exact duplicates that were written.
    """
    changes, found = collections.Counter(), [(key, "duplicate") for key in twins]
    refused, failed = list(rejected), []
    for part in parts:
        changes.update(part.changes)
        refused += part.rejected
        failed += part.corrupt
        found += part.found
    written = sum(part.records for part in parts)
    rows = [("failed", *row) for row in failed] + [("rejected", *row) for row in refused]
    rows += [("duplicate", key, "") for key in duplicates] + [("written", *row) for row in found]
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows([("outcome", "input", "reason"), *rows])
    return {
        "split": split,
        "inputs": written + len(duplicates) + len(refused) + len(failed),
        "written": written,
        "duplicates": {"number": len(duplicates), "first": duplicates[:_SHOWN]},
        "rejected": _counted(refused),
        "failed": {"number": len(failed), "first": [{"key": key, "reason": reason} for key, reason in failed[:_SHOWN]]},
        "found": _counted(found),
        "changed": dict(sorted(changes.items())),
    }, table.getvalue().encode("utf-8")


def _counted(rows: list[tuple[str, str]]) -> dict:
    """Number and first keys per reason, most frequent reasons first; limited, as there may be a reason per input."""
    by_reason = collections.defaultdict(list)
    for key, reason in rows:
        by_reason[reason].append(key)
    common = sorted(by_reason.items(), key=lambda item: (-len(item[1]), item[0]))[:_REASONS]
    counted = {
        "number": len(rows),
        "reasons": {reason: {"number": len(keys), "first": keys[:_SHOWN]} for reason, keys in common},
    }
    others = len(rows) - sum(len(keys) for _, keys in common)
    return counted | ({"other_reasons": {"number": others}} if others else {})
