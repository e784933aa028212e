"""Checks a dataset folder: reads and decodes every record, and compares them with the metadata.

    pera-jax verify shards/aid
    pera-jax verify shards/aid --split train --workers 8 --json verified.json

* Shards: exist, have the size and number of records given in info.json, and can be read.
* Records: match their checksums, and contain images with the bands and dtype of the dataset and valid labels.
* Fingerprint: recomputed from all records.
* Histogram and statistics: SPLIT.histogram.npz is compared with the pixels, and info.json with the histogram. For
  lossless images every value is compared; for JPEG, whose decoders differ by a gray level, the number of pixels and
  their mean to two gray levels. Nodata pixels are not counted: the place of a tile gives their number and value.
* Files for TensorFlow Datasets: exist, and list the same splits, shards and classes.

Every problem is reported with its shard and record number, counted from 0; the exit status is then 1. Changed bits in
the padding of a shard, on which no record depends, are harmless and not detected.
"""

import argparse
import hashlib
import os
import pathlib

import numpy as np

from data_prep.inspect import folder_info, tables
from data_prep.inspect.check_shard import Findings, Task, check_all, span
from pera_jax.common import files, json_files, owned, paths
from pera_jax.common.errors import UserError, run
from pera_jax.common.progress import Progress
from pera_jax.common.text import printable
from pera_jax.data import records, statistics

_MOST_GRAY_LEVELS = 2.0  # maximum difference of the band mean between two JPEG decoders


def main(argv: list[str] | None = None) -> None:
    """The command. Raises UserError, also if the folder is damaged."""
    parser = argparse.ArgumentParser(prog="pera-jax verify", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=paths.local_path, help="dataset folder")
    parser.add_argument("--split", help="check only this split")
    parser.add_argument(
        "--workers", type=int, default=len(os.sched_getaffinity(0)), help="number of processes (default: all cores)"
    )
    parser.add_argument("--json", type=paths.local_path, metavar="FILE", help="also write the findings to this file")
    args = parser.parse_args(argv)
    if args.workers < 1:
        raise UserError(f"--workers is {args.workers}; it must be >= 1")
    if args.json and not args.json.resolve().parent.is_dir():
        raise UserError(f"--json {args.json}: the folder does not exist; create it first")
    if args.json:
        owned.check(args.json, fix="--json")

    try:
        found = verify(args.folder, args.split, args.workers)
    except KeyboardInterrupt as error:
        raise UserError("interrupted; re-run the same command") from error
    print(_table(found))
    for problem in found["problems"]:
        print(printable(_sentence(problem), limit=1000))
    if args.json:
        try:
            files.write(args.json, owned.json_text(found))
        except OSError as error:
            raise UserError(
                f"cannot write {args.json}: {error.strerror}; free disk space or choose another file"
            ) from error
    if found["problems"]:
        raise UserError(f"{args.folder} is damaged, see the lines above; copy it again, or convert the dataset again")
    print(f"{printable(args.folder)} is valid")


def verify(folder: pathlib.Path, split: str | None, workers: int) -> dict:
    """Checks a folder, or one split of it.

    Returns:
      The content of --json: findings of each split by name in `splits`; and `problems`, each with "text" and, if they
      apply, "split", "shard" and "records": [first, last], counted from 0 within the shard.

    Raises:
      UserError: info.json cannot be read or is invalid.
    """
    info, names = folder_info.load(folder, split)
    tasks = [Task(folder, name, i, info) for name in names for i in range(len(info.splits[name].shards))]
    findings = {name: {} for name in names}  # by shard index
    problems = []
    counts = {name: 0 for name in names}  # added up on arrival, since each may take several megabytes
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
    """Returns (findings of a split, its problems in addition to those of shards and records)."""
    split, faults = info.splits[name], []
    digests = [digest for part in parts for digest in part.digests]
    computed, histogram = None, "not compared"  # both require every record
    if len(digests) == split.records:
        computed = hashlib.sha256(b"".join(digests)).hexdigest()
        if computed != split.fingerprint:
            faults.append(
                f"the fingerprint of the records is {computed[:12]}, but info.json has {split.fingerprint[:12]}"
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
                faults.append(f"{statistics.file_name(name)} does not match the pixels: {fault}")
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
    """Compares the histogram of all pixels with the stored one.

    Args:
      counts: histogram of the pixels.
      stored: histogram in the folder.
      lossy: whether some images are JPEG.
      no_data: number of nodata values, which are not in `counts`.

    Returns:
      (the outcome in a word or two, a description of the problem or None).
    """
    more = statistics.differences(counts, stored)
    if not any(band.any() for _, band in more):
        return f"equal ({no_data:,} without data)" if no_data else "equal", None
    if info.has_places and all((band[values == 0] >= 0).all() and not band[values != 0].any() for values, band in more):
        # Tiles of older versions do not store how many of their zeros are nodata.
        return f"equal ({no_data + sum(int(band.sum()) for _, band in more):,} without data)", None
    for name, (_, difference) in zip(info.bands, more, strict=True):
        if not lossy and difference.any():
            return (
                "differs",
                f"{int(np.abs(difference).sum()):,} pixels of band {name} have other values than in the histogram",
            )
        if difference.sum():
            return "differs", f"band {name} has {int(-difference.sum()):+,} pixels"
    full = [[0.0, 255.0]] * len(info.bands)
    ours, theirs = (statistics.moments(each, info.dtype, full)[0] for each in (counts, stored))
    if np.abs(255.0 * (ours - theirs)).max() > _MOST_GRAY_LEVELS:
        return "differs", f"the means differ by more than {_MOST_GRAY_LEVELS:g} gray levels"
    return "fits (JPEG)", None


def _check_statistics(split: records.SplitInfo, stored: statistics.Histogram, dtype: str) -> list[str]:
    """Compares the statistics in info.json with the stored histogram."""
    mean, std = statistics.moments(stored, dtype, split.ranges)
    faults = []
    if not (np.allclose(mean, split.mean, atol=2e-6) and np.allclose(std, split.std, atol=2e-6)):
        faults.append("mean and std in info.json do not match the histogram")
    for share, values in split.percentiles.items():
        try:
            same = np.allclose(statistics.percentiles(stored, dtype, (float(share),))[0], values, rtol=1e-6)
        except (ValueError, TypeError):
            same = False
        if not same:
            faults.append(f"percentile {share} in info.json does not match the histogram")
    return faults


def _check_tfds(folder: pathlib.Path, info: records.DatasetInfo) -> list[str]:
    """Problems of the metadata files for TensorFlow Datasets."""
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
            faults.append("dataset_info.json lists other splits or shards than info.json")
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
            faults.append(f"features.json does not list exactly the features {', '.join(sorted(wanted))}")
    if info.class_names is not None:
        names = content("label.labels.txt")
        if names is not None and [name for name in names if name] != info.class_names:
            faults.append("label.labels.txt lists other classes than info.json")
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
