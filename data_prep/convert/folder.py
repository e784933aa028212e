"""One split of a data set folder: plan, shards, metadata, in an order that a crash cannot spoil.

While a split is being written, everything lies in FOLDER/.SPLIT.partial: the plan (which images, which options), the
finished shards and their part files. When all shards are there they move to their place, the metadata is written, and
info.json last of all: a split is in it whole, or not at all.
"""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import shutil
from collections.abc import Callable

from data_prep.convert import duplicates as duplicates_of
from data_prep.convert import split_plan, summary
from data_prep.convert.pixels import Stored
from data_prep.convert.shards import Item, Part, run_jobs, sync, write_file
from data_prep.convert.split_plan import Split
from pera_jax.common import lease
from pera_jax.common.errors import UserError
from pera_jax.common.progress import Progress
from pera_jax.data import records, statistics

# What a folder may hold beside info.json, or without one after a crash.
_OWN_FILES = ("*.array_record-*-of-*", "*.report.json", "*.inputs.csv", "*.histogram.npz", "dataset_info.json", "features.json", "label.labels.txt")


def existing_info(folder: pathlib.Path) -> records.DatasetInfo | None:
    """The metadata of a folder that has some. Raises UserError where the folder holds anything else."""
    if (folder / records.INFO_FILE).exists():
        return records.load_info(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output {folder} is a file; name a folder")
    for entry in sorted(folder.glob("[!.]*")):
        if not any(entry.match(pattern) for pattern in _OWN_FILES):
            raise UserError(f"--output {folder} is no data set folder: it holds {entry.name}; name another folder")
    return None


def already_complete(split: Split, info: records.DatasetInfo | None) -> bool:
    """Whether the folder already holds this very split. Raises UserError if it holds another of the same name, or one
    with other bands or classes, or if shards of the split that is there are damaged."""
    if info is None:
        return False
    if split.name in info.splits:
        if info.splits[split.name].source != split.source:
            raise UserError(
                f"{split.folder} already holds a split {split.name!r} of other images or options; "
                f"name another --output or --split, or remove {split.folder}"
            )
        records.open_split(split.folder, split.name)
        shutil.rmtree(split.partial, ignore_errors=True)  # left where a crash came between the last steps
        if (split.folder / lease.NAME).exists():
            with contextlib.suppress(UserError), lease.held(split.folder, "--output", say=lambda text: None):
                pass  # takes a dead owner's lease away
        return True
    if (info.bands, info.dtype) != (split.bands, split.dtype):
        raise UserError(
            f"{split.folder} holds {', '.join(info.bands)} of {info.dtype}, split {split.name!r} would hold "
            f"{', '.join(split.bands)} of {split.dtype}; name another --output"
        )
    if info.class_names != split.class_names:
        ours, theirs = (set(names or ()) for names in (split.class_names, info.class_names))
        if not ours ^ theirs:
            raise UserError(f"{split.folder} has the classes of split {split.name!r} in another order; name another --output")
        odd = sorted(ours ^ theirs)[0]
        has, lacks = ("the input", split.folder) if odd in ours else (split.folder, "the input")
        raise UserError(
            f"the classes of split {split.name!r} differ from those of the splits in {split.folder}: "
            f"{has} has class {odd!r}, {lacks} does not; give all splits the same class folders"
        )
    return False


def write_split(
    split: Split,
    convert: Callable[[Item], Stored],
    *,
    workers: int,
    run: Callable = run_jobs,
    max_corrupt_share: float,
    rejected: list[tuple[str, str]] = (),
    duplicates: list[str] = (),
) -> tuple[records.DatasetInfo, dict]:
    """Writes a split, or what is missing of it, and returns (metadata, report).

    Args:
      split: what to write.
      convert: makes the stored image of an item, or raises ImageDecodeError; picklable.
      workers: number of processes.
      run: what runs the jobs: `run_jobs`, or something with its arguments and results.
      max_corrupt_share: a larger share of undecodable images ends the conversion.
      rejected: (name, reason) of files that are no candidates; duplicates: keys of those that were left out. Both go
        into the report.

    Raises:
      UserError: too many corrupt images, a disk that refuses, an unfinished conversion of something else. Finished
        shards are kept for the next try; where there are none, nothing is left behind.
    """
    made = _missing_folders(split.folder)
    try:
        with lease.held(split.folder, "--output"):
            split_plan.check_unfinished(split)
            split_plan.check_kept(split)
            try:
                split_plan.write(split)
                parts = _write_shards(split, functools.partial(run, convert=convert, workers=workers), max_corrupt_share)
                info, report = _finish(split, parts, rejected, duplicates)
                shutil.rmtree(split.partial)
                return info, report
            finally:
                _tidy(split)
    except OSError as error:
        raise UserError(f"cannot write {error.filename or split.folder}: {error.strerror or error}") from error
    except KeyboardInterrupt as error:
        raise UserError("interrupted; the same command goes on after the shards that are finished") from error
    finally:
        for path in made:
            with contextlib.suppress(OSError):  # those that hold something stay
                path.rmdir()


def _missing_folders(folder: pathlib.Path) -> list[pathlib.Path]:
    """The folders that will have to be made, innermost first."""
    return [path for path in (folder, *folder.parents) if not path.exists()]


def _tidy(split: Split) -> None:
    """After a failure: removes what is half written, and the whole plan where no shard is finished."""
    split_plan.remove_half_written(split)
    if split.partial.exists() and not any(split.partial.glob("*.array_record-*.json")):
        shutil.rmtree(split.partial)


def _write_shards(split: Split, run: Callable, max_corrupt_share: float) -> list[Part]:
    """Returns the parts of all shards, in order; those that an earlier try finished are not written again."""
    names = [split.shard_name(k) for k in range(split.shards)]
    parts = {name: part for name in names if (part := _finished(split, name)) is not None}
    missing = [k for k, name in enumerate(names) if name not in parts]
    corrupt = [entry for part in parts.values() for entry in part.corrupt]

    def check_corrupt(total: int) -> None:
        if len(corrupt) > max_corrupt_share * total or len(corrupt) == total:
            key, reason = corrupt[0]
            mend = f"mend them, or allow a larger --max-corrupt-share than {max_corrupt_share:g}"
            raise UserError(
                f"{len(corrupt)} of {total} images cannot be decoded (the first is {key}: {reason}); "
                f"{mend if len(corrupt) < total else 'name a folder of images'}"
            )

    def on_images(done: int, new_corrupt: list[tuple[str, str]]) -> None:
        corrupt.extend(new_corrupt)
        progress.update(done)
        check_corrupt(len(split))

    if parts and missing:
        print(f"{split.name}: going on after {len(parts)} of {len(names)} shards", flush=True)
    check_corrupt(len(split))
    with (
        Progress(sum(map(split.job_size, missing)), "images", f"convert {split.name}") as progress,
        contextlib.closing(run((split.job(k) for k in missing), report=on_images)) as finished,
    ):
        for part in finished:
            parts[part.shard] = part
    if not any(part.records for part in parts.values()):
        key, reason = next(entry for part in parts.values() for entry in (*part.rejected, *part.corrupt))
        shutil.rmtree(split.partial)  # nothing that another try could go on from
        raise UserError(f"none of {len(split)} images is left (the first is {key}: {reason}); choose others, or reject less")
    return [parts[name] for name in names]


def _finished(split: Split, shard: str) -> Part | None:
    part = Part.load(split.partial, shard)
    if part is None:
        return None
    places = [folder / shard for folder in (split.partial, split.folder)]  # a crash may have come while shards moved
    return part if any(file.is_file() and file.stat().st_size == part.bytes for file in places) else None


def _finish(
    split: Split, parts: list[Part], rejected: list[tuple[str, str]], duplicates: list[str]
) -> tuple[records.DatasetInfo, dict]:
    """Moves the shards to their place and writes the metadata, info.json last."""
    from data_prep.convert import tfds_metadata  # its import takes half a second, which worker processes need not spend

    for part in parts:
        if (split.partial / part.shard).exists():
            os.replace(split.partial / part.shard, split.folder / part.shard)
    sync(split.folder)
    counts = summary.histogram(parts)
    split_info = summary.split_info(parts, counts, split.dtype, split.source)
    info = existing_info(split.folder)
    splits = {**(info.splits if info else {}), split.name: split_info}
    info = records.DatasetInfo(
        name=split.dataset, bands=split.bands, dtype=split.dtype, class_names=split.class_names, has_places=split.has_places,
        format_version=records.FORMAT_VERSION, splits=splits,
    )  # fmt: skip
    twins = [] if duplicates else _twins(split, parts)
    report, table = summary.report(split.name, parts, rejected, duplicates, twins)
    write_file(split.folder / f"{split.name}.inputs.csv", table, split.partial)
    write_file(split.folder / f"{split.name}.report.json", _json(report), split.partial)
    write_file(split.folder / statistics.file_name(split.name), statistics.to_bytes(counts), split.partial)
    staging = split.partial / "tfds"
    tfds_metadata.write(staging, split.folder, info)
    for file in sorted(staging.iterdir()):
        write_file(split.folder / file.name, file.read_bytes(), split.partial)
    write_file(split.folder / records.INFO_FILE, _json(dataclasses.asdict(info)), split.partial)
    return info, report


def _twins(split: Split, parts: list[Part]) -> list[str]:
    """The keys of records that were made from the same bytes as one before them."""
    contents = b"".join(part.contents for part in parts)
    later = duplicates_of.later_equals(contents)
    keys, first = [], 0
    for shard, part in enumerate(parts):
        here = later[(later >= first) & (later < first + part.records)] - first
        if len(here):
            out = {key for key, _ in (*part.corrupt, *part.rejected)}
            written = [item.key for item in split.job(shard).items if item.key not in out]
            keys.extend(written[i] for i in here)
        first += part.records
    return keys


def _json(value: dict) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode("ascii")
