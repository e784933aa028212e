"""Checks a data set folder: reads and decodes every record, and compares all with the metadata.

    python -m data_prep.verify shards/aid
    python -m data_prep.verify shards/aid --split train --workers 8 --json verified.json

* Shards: are there, have the size and the number of records that info.json names, and can be read.
* Records: fit their checksum, are images of the bands and the dtype of the data set, with a label among its classes.
* Fingerprint: of all records in their order, computed anew.
* Histogram and statistics: SPLIT.histogram.npz is compared with the pixels, and info.json with it. What can be
  compared: every value where all images are stored without loss; of JPEG, whose decoders differ by a grey level, the
  number of pixels and their mean to two grey levels. Pixels without data are not counted: a tile of a scene says in
  its place how many there are, and what they hold.
* Files for TensorFlow Datasets: are there and name the same splits, shards and classes.

Every fault is named with its shard and the number of the record in it, counted from 0; the exit status is 1 where there
is one. A changed bit that no record depends on, in the padding of a shard, does no harm and is not found.
"""

import argparse
import hashlib
import os
import pathlib

import numpy as np

from data_prep.convert.shards import write_file
from data_prep.inspect import folder_info, tables
from data_prep.inspect.check_shard import Findings, Task, check_all, span
from pera_jax.common import json_files, owned, paths
from pera_jax.common.errors import UserError, run
from pera_jax.common.progress import Progress
from pera_jax.common.text import printable
from pera_jax.data import records, statistics

_MOST_GREY_LEVELS = 2.0  # between the means of a band by two decoders of the same JPEG files


def main(argv: list[str] | None = None) -> None:
    """The command. Raises UserError, also where the folder is not sound."""
    parser = argparse.ArgumentParser(prog="python -m data_prep.verify", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=paths.local_path, help="data set folder")
    parser.add_argument("--split", help="check this split only")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="default: all cores")
    parser.add_argument("--json", type=paths.local_path, metavar="FILE", help="also write what was found to this file")
    args = parser.parse_args(argv)
    if args.workers < 1:
        raise UserError(f"--workers is {args.workers}; it must be at least 1")
    if args.json and not args.json.resolve().parent.is_dir():
        raise UserError(f"--json {args.json} lies in a folder that does not exist; make it first")
    if args.json:
        owned.check(args.json, fix="--json")

    try:
        found = verify(args.folder, args.split, args.workers)
    except KeyboardInterrupt as error:
        raise UserError("interrupted; nothing was changed, give the same command again") from error
    print(_table(found))
    for problem in found["problems"]:
        print(printable(_sentence(problem), limit=1000))
    if args.json:
        try:
            write_file(args.json, owned.json_text(found))
        except OSError as error:
            raise UserError(f"cannot write {args.json}: {error.strerror}; make room or name another file") from error
    if found["problems"]:
        raise UserError(f"{args.folder} is damaged, see the lines above; copy it again, or convert the data set anew")
    print(f"{printable(args.folder)} is sound")


def verify(folder: pathlib.Path, split: str | None, workers: int) -> dict:
    """Checks a folder, or one split of it.

    Returns:
      What --json writes: `splits`, what was found of each by name; and `problems`, each with "text" and, where it has
      one, "split", "shard" and "records": [first, last], counted from 0 within the shard.

    Raises:
      UserError: info.json cannot be used, so that there is nothing to compare with.
    """
    info, names = folder_info.load(folder, split)
    tasks = [Task(folder, name, i, info) for name in names for i in range(len(info.splits[name].shards))]
    findings = {name: {} for name in names}  # by the index of the shard
    problems = []
    counts = {name: 0 for name in names}  # added up as they come: of many bands each is several megabytes
    with Progress(sum(task.records for task in tasks), "records", "verify") as progress:
        for task, found in check_all(tasks, workers, progress.update):
            if found.counts is not None:
                counts[task.split] = counts[task.split] + found.counts
                found.counts = None
            findings[task.split][task.index] = found
    result = {"folder": str(folder), "name": info.name, "bands": info.bands, "dtype": info.dtype, "splits": {}}
    for name in names:
        parts = [findings[name][i] for i in range(len(info.splits[name].shards))]
        for shard, part in zip(info.splits[name].shards, parts, strict=True):
            problems += [{"split": name, "shard": shard, "text": text} for text in part.shard_problems]
            problems += [
                {"split": name, "shard": shard, "records": [first, last], "text": text}
                for first, last, text in part.record_problems
            ]
        result["splits"][name], faults = _check_split(folder, info, name, parts, counts[name])
        problems += [{"split": name, "text": text} for text in faults]
    problems += [{"text": text} for text in _check_tfds(folder, info)]
    return {**result, "sound": not problems, "problems": problems}


def _check_split(folder, info, name: str, parts: list[Findings], counts) -> tuple[dict, list[str]]:
    """Returns (what is reported of a split, its faults beside those of shards and records)."""
    split, faults = info.splits[name], []
    digests = [digest for part in parts for digest in part.digests]
    computed, histogram = None, "not compared"  # both need every record
    if len(digests) == split.records:
        computed = hashlib.sha256(b"".join(digests)).hexdigest()
        if computed != split.fingerprint:
            faults.append(
                f"the fingerprint of the records is {computed[:12]}, and info.json says {split.fingerprint[:12]}"
            )
    decoded, lossy = sum(part.decoded for part in parts), sum(part.lossy for part in parts)
    try:
        stored = folder_info.histogram(folder, info, name)
    except UserError as error:
        faults.append(str(error))
        histogram = "damaged"
    else:
        faults += _check_statistics(split, stored, info.dtype)
        if decoded == split.records:
            histogram, fault = compare(counts, stored, info, lossy > 0, sum(part.no_data for part in parts))
            if fault:
                faults.append(f"{statistics.file_name(name)} does not fit the pixels: {fault}")
    heights = widths = None
    for part in parts:
        heights, widths = span(heights, part.heights), span(widths, part.widths)
    return {
        "shards": len(split.shards), "records": split.records, "read": len(digests), "decoded": decoded,
        "bytes": sum(split.shard_bytes), "heights": heights, "widths": widths, "fingerprint": split.fingerprint,
        "fingerprint_computed": computed, "histogram": histogram,
    }, faults  # fmt: skip


def compare(
    counts: statistics.Histogram, stored: statistics.Histogram, info: records.DatasetInfo, lossy: bool, no_data: int = 0
) -> tuple[str, str | None]:
    """Compares the values of all pixels with the histogram that is stored.

    Args:
      counts: of the pixels; stored: of the folder.
      lossy: some images are JPEG.
      no_data: number of values that stand for no data, which `counts` lacks.

    Returns:
      (the outcome in a word or two, the fault in words or None).
    """
    more = statistics.differences(counts, stored)
    if not any(band.any() for _, band in more):
        return f"equal ({no_data:,} without data)" if no_data else "equal", None
    if info.has_places and all((band[values == 0] >= 0).all() and not band[values != 0].any() for values, band in more):
        # Tiles of older versions do not say how many of their zeros stand for no data.
        return f"equal ({no_data + sum(int(band.sum()) for _, band in more):,} without data)", None
    for name, (_, difference) in zip(info.bands, more, strict=True):
        if not lossy and difference.any():
            return (
                "differs",
                f"{int(np.abs(difference).sum()):,} pixels of band {name} are too many or too few of their value",
            )
        if difference.sum():
            return "differs", f"band {name} has {int(-difference.sum()):+,} pixels"
    full = [[0.0, 255.0]] * len(info.bands)
    ours, theirs = (statistics.moments(each, info.dtype, full)[0] for each in (counts, stored))
    if np.abs(255.0 * (ours - theirs)).max() > _MOST_GREY_LEVELS:
        return "differs", f"the means differ by over {_MOST_GREY_LEVELS:g} grey levels"
    return "fits (JPEG)", None


def _check_statistics(split: records.SplitInfo, stored: statistics.Histogram, dtype: str) -> list[str]:
    """Compares the numbers in info.json with the histogram that is stored."""
    mean, std = statistics.moments(stored, dtype, split.ranges)
    faults = []
    if not (np.allclose(mean, split.mean, atol=2e-6) and np.allclose(std, split.std, atol=2e-6)):
        faults.append("mean and std in info.json are not those of the histogram")
    for share, values in split.percentiles.items():
        try:
            same = np.allclose(statistics.percentiles(stored, dtype, (float(share),))[0], values, rtol=1e-6)
        except (ValueError, TypeError):
            same = False
        if not same:
            faults.append(f"percentile {share} in info.json is not that of the histogram")
    return faults


def _check_tfds(folder: pathlib.Path, info: records.DatasetInfo) -> list[str]:
    """What is wrong with the files by which TensorFlow Datasets opens the folder."""
    faults = []

    def content(name: str):
        try:
            text = (folder / name).read_text(encoding="utf-8")
            return json_files.loads(text) if name.endswith(".json") else text.split("\n")
        except FileNotFoundError:
            faults.append(f"{name} is missing: TensorFlow Datasets cannot open the folder")
        except (OSError, ValueError) as error:
            faults.append(f"{name} cannot be read: {error}")
        return None

    described, features = content("dataset_info.json"), content("features.json")
    if described is not None:
        ours = {name: [str(number) for number in split.shard_records] for name, split in info.splits.items()}
        try:
            theirs = {split["name"]: split["shardLengths"] for split in described["splits"]}
        except (KeyError, TypeError):
            theirs = None
        if theirs != ours:
            faults.append("dataset_info.json names other splits or shards than info.json")
    wanted = (
        {"image", "key"}
        | ({"label"} if info.class_names is not None else set())
        | ({"place"} if info.has_places else set())
    )
    if features is not None:
        try:
            held = set(features["featuresDict"]["features"])
        except (KeyError, TypeError):
            held = set()
        if held != wanted:
            faults.append(f"features.json does not name the features {', '.join(sorted(wanted))}")
    if info.class_names is not None:
        names = content("label.labels.txt")
        if names is not None and [name for name in names if name] != info.class_names:
            faults.append("label.labels.txt names other classes than info.json")
    return faults


def _table(found: dict) -> str:
    rows = [["split", "shards", "records", "decoded", "MB", "height", "width", "fingerprint", "histogram"]]
    for name, split in found["splits"].items():
        sides = [_span(split["heights"]), _span(split["widths"])]
        same = {None: "not compared", split["fingerprint"]: "equal"}.get(split["fingerprint_computed"], "differs")
        numbers = [f"{split[key]:,}" for key in ("shards", "records", "decoded")]
        rows.append([name, *numbers, f"{split['bytes'] / 1e6:,.1f}", *sides, same, split["histogram"]])
    return tables.text(rows)


def _span(sides: tuple[int, int] | None) -> str:
    return "-" if sides is None else f"{sides[0]}" if sides[0] == sides[1] else f"{sides[0]} to {sides[1]}"


def _sentence(problem: dict) -> str:
    place = problem.get("shard") or problem.get("split")
    if "records" in problem:
        first, last = problem["records"]
        place += f", record {first}" if first == last else f", records {first} to {last}"
    return f"{place}: {problem['text']}" if place else problem["text"]


if __name__ == "__main__":
    run(main)
