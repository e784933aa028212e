"""What the parts of a split add up to: its entry in info.json, and the report of its conversion."""

import collections
import csv
import hashlib
import io

from data_prep.convert.shards import Part
from pera_jax.data import records, statistics

_SHOWN, _REASONS = 20, 50  # of a long list in the report, and lists


def histogram(parts: list[Part]) -> statistics.Histogram:
    """The values of all pixels of a split."""
    return sum(statistics.from_bytes(part.histogram) for part in parts if part.records)


def split_info(parts: list[Part], counts: statistics.Histogram, dtype: str, source: str) -> records.SplitInfo:
    """The entry of a split; `parts` in the order of the shards, `counts` their histogram, `dtype` of the images."""
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
        percentiles={f"{share:g}": values.tolist() for share, values in zip(statistics.PERCENTILES, found, strict=True)},
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
    """What became of every input: the content of SPLIT.report.json and of SPLIT.inputs.csv.

    Each input is in one of `written`, `duplicates` (left out), `rejected` and `failed`, which add up to `inputs`. `found`
    says which written images cleaning would have something to say of, `changed` what was done to images; one image may
    count under several names there. Of long lists the report shows the first; the table has every input that was not
    written, and every find.

    Args:
      rejected: (name, reason) of files that were no candidates; the parts have more.
      duplicates: keys of exact duplicates that were left out; twins: of such that were written.
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
    """By reason, the commonest first, how many there are and the first of them; reasons may be as many as inputs."""
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
