"""Worker processes that write the shards of one split, so that a killed conversion can go on.

A shard is written to a temporary name, closed, counted, synced and renamed; then a part file beside it says what it
holds. A shard counts as finished when its part file is there. Which images go into which shard is settled before any
worker starts, so neither the number nor the content of the shards depends on the number of workers.
"""

import base64
import collections
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import secrets
from collections.abc import Callable, Iterable, Iterator

from array_record.python import array_record_module

from data_prep.convert import processes
from data_prep.convert.pixels import Rejected, Stored
from pera_jax.common import json_files
from pera_jax.common.environment import EnvironmentFault
from pera_jax.common.errors import UserError
from pera_jax.common.text import printable
from pera_jax.data import codecs, records, shard_files, statistics

WRITER_OPTIONS = "group_size:1,uncompressed"  # one record per chunk: random access reads no other; JPEG does not shrink
_PACKED = ("digests", "contents", "histogram")  # bytes, which JSON does not know
_REPORT_EVERY = 16  # images between two messages of a worker


@dataclasses.dataclass(frozen=True, slots=True)
class Item:
    """One image to convert.

    Attributes:
      path: of the file that holds it.
      key: names it in the data set.
      label: index of its class, None without classes.
      size: in bytes, as far as it is known beforehand.
      part: which part of the file it is, where that holds several; the reader of such files knows what it means.
    """

    path: str
    key: str
    label: int | None
    size: int
    part: tuple | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Job:
    """One shard to write into `folder`, under the name `shard`, from `items`."""

    folder: pathlib.Path
    shard: str
    items: list[Item]


@dataclasses.dataclass(frozen=True)
class Part:
    """What one shard holds.

    Attributes:
      shard: its file name.
      bytes: its size.
      records: number of its records.
      digests: SHA-256 of each record, in order, 32 bytes each.
      contents: a hash of what each record was made from, in order, 16 bytes each.
      histogram: pixels of each value in each band, packed by `statistics.to_bytes`: of 13 bands of uint16 an array would be
        7 MB for each shard; empty where there is no record.
      corrupt: (key, reason) of the images that could not be decoded.
      rejected: (key, reason) of those that were not wanted.
      found: (key, kind) of those that cleaning has something to say of.
      changes: number of images by what was done to them.
    """

    shard: str
    bytes: json_files.Count
    records: json_files.Count
    digests: bytes
    contents: bytes
    histogram: bytes
    corrupt: list[tuple[str, str]]
    rejected: list[tuple[str, str]]
    found: list[tuple[str, str]]
    changes: dict[str, json_files.Count]

    def save(self, folder: pathlib.Path) -> None:
        fields = dataclasses.asdict(self)
        for name in _PACKED:
            fields[name] = base64.b64encode(fields[name]).decode("ascii")
        write_file(_part_file(folder, self.shard), json.dumps(fields).encode("ascii"))

    @classmethod
    def load(cls, folder: pathlib.Path, shard: str) -> "Part | None":
        """The part file of a finished shard, or None."""
        file = _part_file(folder, shard)
        if not file.is_file():
            return None
        try:
            part = json_files.parse(file.read_bytes(), cls)  # bytes are in base 64
            statistics.from_bytes(part.histogram)
        except Exception as error:  # on a damaged histogram NumPy and zipfile raise nearly anything
            print(f"{printable(file)} is damaged ({printable(error)}): its shard is written anew", flush=True)
            return None
        if part.shard != shard or (32 * part.records, 16 * part.records) != (len(part.digests), len(part.contents)):
            print(f"{printable(file)} is of another shard: {printable(shard)} is written anew", flush=True)
            return None
        return part


def _part_file(folder: pathlib.Path, shard: str) -> pathlib.Path:
    return folder / (shard + ".json")


def _temporary(path: pathlib.Path) -> pathlib.Path:
    """A name that no other writer has, on this machine or another one: workers of a killed conversion may live on beside
    their successors, and some runners of pipelines have two workers write the same shard."""
    return path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")


def write_file(path: pathlib.Path, content: bytes, staging: pathlib.Path | None = None) -> None:
    """Writes a whole file or none: a temporary name (in `staging`, else beside it), sync, rename. Raises OSError."""
    temporary = _temporary((staging or path.parent) / path.name)
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # nothing where the rename came
    sync(path.parent)


def sync(path: pathlib.Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_shard(
    job: Job, convert: Callable[[Item], Stored], report: Callable[[int, list[tuple[str, str]]], None]
) -> Part:
    """Converts the items of one shard and writes it with its part file.

    `report(done, corrupt)` is called every few images with what came since the last call.
    Raises RuntimeError or OSError when the disk refuses.
    """
    temporary = _temporary(job.folder / job.shard)
    writer = array_record_module.ArrayRecordWriter(str(temporary), WRITER_OPTIONS)
    histogram = 0  # becomes that of the first image
    digests, contents, corrupt, rejected, found = bytearray(), bytearray(), [], [], []
    changes = collections.Counter()
    reported = 0
    for i, item in enumerate(job.items, 1):
        try:
            stored = convert(item)
        except codecs.ImageDecodeError as error:
            corrupt.append((item.key, str(error)))
        except Rejected as error:
            rejected.append((item.key, str(error)))
        else:
            label = item.label if stored.label is None else stored.label
            record = records.encode_record(stored.data, item.key, label, stored.place)
            writer.write(record)
            digests += hashlib.sha256(record).digest()
            contents += stored.content
            found.extend((item.key, kind) for kind in stored.found)
            histogram = histogram + stored.histogram
            changes.update(stored.changes)
        if i % _REPORT_EVERY == 0 or i == len(job.items):
            report(i - (i - 1) // _REPORT_EVERY * _REPORT_EVERY, corrupt[reported:])
            reported = len(corrupt)
    writer.close()  # errors of all writes so far surface here, as RuntimeError
    try:
        shard_files.check_shard(temporary, len(digests) // 32)
    except EnvironmentFault:
        raise
    except UserError as error:
        raise RuntimeError(str(error)) from error
    sync(temporary)
    os.replace(temporary, job.folder / job.shard)
    sync(job.folder)
    size = (job.folder / job.shard).stat().st_size
    part = Part(
        job.shard, size, len(digests) // 32, bytes(digests), bytes(contents), statistics.to_bytes(histogram) if digests else b"", corrupt,
        rejected, found, dict(sorted(changes.items())),
    )  # fmt: skip
    part.save(job.folder)
    return part


def _write(job: Job, say: Callable, convert: Callable[[Item], Stored]) -> Part:
    """The work of one worker process on one shard."""
    return write_shard(job, convert, lambda *news: say(news))


def run_jobs(
    jobs: Iterable[Job], convert: Callable[[Item], Stored], workers: int, report: Callable[[int, list], None]
) -> Iterator[Part]:
    """Runs the jobs on worker processes; yields parts as they finish. `convert` and the jobs must be picklable.

    Raises UserError when a worker cannot write, dies or hangs. Workers end when the iterator is closed or exhausted.
    """
    # Jobs are made one by one: the items of all would fill the memory.
    with contextlib.closing(processes.run(jobs, functools.partial(_write, convert=convert), workers)) as messages:
        try:
            for kind, content in messages:
                if kind == processes.SAID:
                    report(*content)
                else:
                    yield content
        except processes.WorkFailed as error:
            raise UserError(f"a shard cannot be written: {error}") from error
