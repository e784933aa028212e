"""Writing one split of a dataset folder: plan, shards and metadata, in a crash-safe order.

Until a split is finished, its plan (images and options), finished shards and part files lie in FOLDER/.SPLIT.partial.
Then the shards are moved, the metadata is written, and info.json last, so that it only lists complete splits.
"""

import contextlib
import dataclasses
import functools
import os
import pathlib
import shutil
from collections.abc import Callable

from data_prep.convert import duplicates as duplicates_of
from data_prep.convert import split_plan, summary
from data_prep.convert.pixels import Stored
from data_prep.convert.shards import Item, Part, run_jobs
from data_prep.convert.split_plan import Split
from pera_jax.common import files, lease
from pera_jax.common.errors import UserError
from pera_jax.common.progress import Progress
from pera_jax.data import records, statistics

# Files that a dataset folder may contain besides info.json, or without it after a crash.
_OWN_FILES = (
    "*.array_record-*-of-*",
    "*.report.json",
    "*.inputs.csv",
    "*.histogram.npz",
    "dataset_info.json",
    "features.json",
    "label.labels.txt",
)


def existing_info(folder: pathlib.Path) -> records.DatasetInfo | None:
    """The metadata of a dataset folder; None for a new folder. Raises UserError if the folder has other content."""
    if (folder / records.INFO_FILE).exists():
        return records.load_info(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output {folder} is a file; choose a folder")
    for entry in sorted(folder.glob("[!.]*")):
        if not any(entry.match(pattern) for pattern in _OWN_FILES):
            raise UserError(
                f"--output {folder} is not a dataset folder: it contains {entry.name}; choose another folder"
            )
    return None


def already_complete(split: Split, info: records.DatasetInfo | None) -> bool:
    """Whether the folder already has this split.

    Raises UserError if it has a different split of that name, splits with other bands or classes, or damaged shards.
    """
    if info is None:
        return False
    if split.name in info.splits:
        if info.splits[split.name].source != split.source:
            raise UserError(
                f"{split.folder} already has a split {split.name!r} of other images or options; "
                f"choose another --output or --split, or remove {split.folder}"
            )
        records.open_split(split.folder, split.name)
        shutil.rmtree(split.partial, ignore_errors=True)  # left by a crash between the last steps
        if (split.folder / lease.NAME).exists():
            with contextlib.suppress(UserError), lease.held(split.folder, "--output", say=lambda text: None):
                pass  # removes the lease of a dead owner
        return True
    if (info.bands, info.dtype) != (split.bands, split.dtype):
        raise UserError(
            f"{split.folder} has the bands {', '.join(info.bands)} of {info.dtype}, but split {split.name!r} has "
            f"{', '.join(split.bands)} of {split.dtype}; choose another --output"
        )
    if info.class_names != split.class_names:
        ours, theirs = (set(names or ()) for names in (split.class_names, info.class_names))
        if not ours ^ theirs:
            raise UserError(
                f"{split.folder} has the classes of split {split.name!r} in a different order; choose another --output"
            )
        odd = sorted(ours ^ theirs)[0]
        has, lacks = ("the input", split.folder) if odd in ours else (split.folder, "the input")
        raise UserError(
            f"the classes of split {split.name!r} differ from those of the splits in {split.folder}: "
            f"{has} has class {odd!r}, {lacks} does not; all splits must have the same class folders"
        )
    return False


def write_split(
    split: Split,
    convert: Callable[[Item], Stored],
    *,
    workers: int,
    run: Callable = run_jobs,
    max_corrupt_fraction: float,
    rejected: list[tuple[str, str]] = (),
    duplicates: list[str] = (),
) -> tuple[records.DatasetInfo, dict]:
    """Writes a split, or its missing shards; returns (metadata, report).

    Args:
      split: what to write.
      convert: converts an item, or raises ImageDecodeError or Rejected; picklable.
      workers: number of processes.
      run: runs the jobs: `run_jobs`, or a function with the same signature.
      max_corrupt_fraction: maximum fraction of images that cannot be decoded.
      rejected: (name, reason) of files that are not candidates, for the report.
      duplicates: keys of duplicates that were left out, for the report.

    Raises:
      UserError: too many corrupt images, a write error, or an unfinished conversion of something else. Finished shards
        are kept for the next run; without any, nothing is left behind.
    """
    made = _missing_folders(split.folder)
    try:
        with lease.held(split.folder, "--output"):
            split_plan.check_unfinished(split)
            split_plan.check_kept(split)
            try:
                split_plan.write(split)
                parts = _write_shards(
                    split, functools.partial(run, convert=convert, workers=workers), max_corrupt_fraction
                )
                info, report = _finish(split, parts, rejected, duplicates)
                shutil.rmtree(split.partial)
                return info, report
            finally:
                _tidy(split)
    except OSError as error:
        raise UserError(
            f"cannot write {error.filename or split.folder}: {error.strerror or error}; free disk space or choose "
            "another --output"
        ) from error
    except KeyboardInterrupt as error:
        raise UserError("interrupted; re-run the same command to resume after the finished shards") from error
    finally:
        for path in made:
            with contextlib.suppress(OSError):  # folders that are not empty stay
                path.rmdir()


def _missing_folders(folder: pathlib.Path) -> list[pathlib.Path]:
    """The folders to create, innermost first."""
    return [path for path in (folder, *folder.parents) if not path.exists()]


def _tidy(split: Split) -> None:
    """Removes incomplete files, and the whole plan if no shard is finished."""
    split_plan.remove_half_written(split)
    if split.partial.exists() and not any(split.partial.glob("*.array_record-*.json")):
        shutil.rmtree(split.partial)


def _write_shards(split: Split, run: Callable, max_corrupt_fraction: float) -> list[Part]:
    """Returns the parts of all shards, in order; finished shards of an earlier run are kept."""
    names = [split.shard_name(k) for k in range(split.shards)]
    parts = {name: part for name in names if (part := _finished(split, name)) is not None}
    missing = [k for k, name in enumerate(names) if name not in parts]
    corrupt = [entry for part in parts.values() for entry in part.corrupt]

    def check_corrupt(total: int) -> None:
        if len(corrupt) > max_corrupt_fraction * total or len(corrupt) == total:
            key, reason = corrupt[0]
            fix = f"fix them, or increase --max-corrupt-fraction ({max_corrupt_fraction:g})"
            raise UserError(
                f"{len(corrupt)} of {total} images cannot be decoded (the first is {key}: {reason}); "
                f"{fix if len(corrupt) < total else 'pass a folder of images'}"
            )

    def on_images(done: int, new_corrupt: list[tuple[str, str]]) -> None:
        corrupt.extend(new_corrupt)
        progress.update(done)
        check_corrupt(len(split))

    if parts and missing:
        print(f"{split.name}: resuming after {len(parts)} of {len(names)} shards", flush=True)
    check_corrupt(len(split))
    with (
        Progress(sum(map(split.job_size, missing)), "images", f"convert {split.name}") as progress,
        contextlib.closing(run((split.job(k) for k in missing), report=on_images)) as finished,
    ):
        for part in finished:
            parts[part.shard] = part
    if not any(part.records for part in parts.values()):
        key, reason = next(entry for part in parts.values() for entry in (*part.rejected, *part.corrupt))
        shutil.rmtree(split.partial)  # nothing to resume from
        raise UserError(
            f"no images are left of {len(split)} (the first is {key}: {reason}); pass other images, or drop fewer kinds"
        )
    return [parts[name] for name in names]


def _finished(split: Split, shard: str) -> Part | None:
    part = Part.load(split.partial, shard)
    if part is None:
        return None
    places = [folder / shard for folder in (split.partial, split.folder)]  # after a crash while shards were moved
    return part if any(file.is_file() and file.stat().st_size == part.bytes for file in places) else None


def _finish(
    split: Split, parts: list[Part], rejected: list[tuple[str, str]], duplicates: list[str]
) -> tuple[records.DatasetInfo, dict]:
    """Moves the shards to the dataset folder and writes the metadata, info.json last."""
    from data_prep.convert import tfds_metadata  # imported late: takes half a second, and workers do not need it

    for part in parts:
        if (split.partial / part.shard).exists():
            os.replace(split.partial / part.shard, split.folder / part.shard)
    files.sync(split.folder)
    counts = summary.histogram(parts)
    split_info = summary.split_info(parts, counts, split.dtype, split.source)
    info = existing_info(split.folder)
    splits = {**(info.splits if info else {}), split.name: split_info}
    info = records.DatasetInfo(
        name=split.dataset, bands=split.bands, dtype=split.dtype, class_names=split.class_names,
        has_places=split.has_places, format_version=records.FORMAT_VERSION, splits=splits,
    )  # fmt: skip
    twins = [] if duplicates else _twins(split, parts)
    report, table = summary.report(split.name, parts, rejected, duplicates, twins)
    staging = split.partial / "tfds"
    tfds_metadata.write(staging, split.folder, info)
    content = {
        f"{split.name}.inputs.csv": table,
        f"{split.name}.report.json": files.as_json(report),
        statistics.file_name(split.name): statistics.to_bytes(counts),
        **{file.name: file.read_bytes() for file in sorted(staging.iterdir())},
        records.INFO_FILE: files.as_json(dataclasses.asdict(info)),
    }
    for name, text in content.items():
        files.write(split.folder / name, text, split.partial / f"{name}.tmp")
    return info, report


def _twins(split: Split, parts: list[Part]) -> list[str]:
    """The keys of records whose source has the same bytes as an earlier one."""
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
