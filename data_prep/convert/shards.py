"""Worker processes that write the shards of one split, in a way that a killed conversion can resume.

A shard is written under a temporary name, closed, checked, synced and renamed; then a part file that describes it is
written. A shard is finished when its part file exists. The assignment of images to shards is fixed before any worker
starts, so number and content of the shards do not depend on the number of workers.
"""

import base64
import collections
import contextlib
import dataclasses
import functools
import hashlib
import json
import pathlib
import secrets
from collections.abc import Callable, Iterable, Iterator

from array_record.python import array_record_module

from data_prep.convert import processes
from data_prep.convert.pixels import Rejected, Stored
from pera_jax.common import files, json_files
from pera_jax.common.environment import EnvironmentFault
from pera_jax.common.errors import UserError
from pera_jax.common.text import printable
from pera_jax.data import codecs, records, shard_files, statistics

WRITER_OPTIONS = "group_size:1,uncompressed"  # one record per chunk, for random access; images are already compressed
_PACKED = ("digests", "contents", "histogram")  # fields with bytes, stored in base64
_REPORT_EVERY = 16  # images between messages of a worker


@dataclasses.dataclass(frozen=True, slots=True)
class Item:
    """One image to convert.

    Attributes:
      path: of the file that contains it.
      key: its name in the dataset.
      label: class index, None without classes.
      size: in bytes, if known in advance.
      part: location in a file with several images; interpreted by the reader of such files.
    """

    path: str
    key: str
    label: int | None
    size: int
    part: tuple | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Job:
    """One shard to write: `items` to the file `shard` in `folder`."""

    folder: pathlib.Path
    shard: str
    items: list[Item]


@dataclasses.dataclass(frozen=True)
class Part:
    """Description of a finished shard.

    Attributes:
      shard: file name.
      bytes: file size.
      records: number of records.
      digests: SHA-256 of each record, in order, 32 bytes each.
      contents: hash of the source of each record, in order, 16 bytes each.
      histogram: of each band, packed by `statistics.to_bytes`; empty without records.
      corrupt: (key, reason) of images that could not be decoded.
      rejected: (key, reason) of images that are not wanted.
      found: (key, kind) of findings of cleaning.
      changes: number of images by change.
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
        file = _part_file(folder, self.shard)
        files.write(file, json.dumps(fields).encode("ascii"), temporary(file))

    @classmethod
    def load(cls, folder: pathlib.Path, shard: str) -> "Part | None":
        """Loads the part file of a finished shard; None if there is none."""
        file = _part_file(folder, shard)
        if not file.is_file():
            return None
        try:
            part = json_files.parse(file.read_bytes(), cls)  # bytes are in base64
            statistics.from_bytes(part.histogram)
        except Exception as error:  # for a damaged histogram, NumPy and zipfile raise almost any exception
            print(f"{printable(file)} is damaged ({printable(error)}): its shard is written again", flush=True)
            return None
        if part.shard != shard or (32 * part.records, 16 * part.records) != (len(part.digests), len(part.contents)):
            print(f"{printable(file)} belongs to another shard: {printable(shard)} is written again", flush=True)
            return None
        return part


def _part_file(folder: pathlib.Path, shard: str) -> pathlib.Path:
    return folder / (shard + ".json")


def temporary(path: pathlib.Path) -> pathlib.Path:
    """A name next to `path` that no other writer uses, on any machine: workers of a killed conversion may still run
    next to their successors, and some pipeline runners let two workers write the same shard."""
    return path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")


def write_shard(
    job: Job, convert: Callable[[Item], Stored], report: Callable[[int, list[tuple[str, str]]], None]
) -> Part:
    """Converts the items of one shard, and writes it with its part file.

    `report(done, corrupt)` is called every few images with the images since the last call. Raises RuntimeError or
    OSError if the shard cannot be written.
    """
    place = job.folder / job.shard
    histogram = 0  # replaced by the histogram of the first image
    digests, contents, corrupt, rejected, found = bytearray(), bytearray(), [], [], []
    changes = collections.Counter()
    reported = 0
    with files.replacing(place, temporary(place)) as unfinished:
        writer = array_record_module.ArrayRecordWriter(str(unfinished), WRITER_OPTIONS)
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
        writer.close()  # raises RuntimeError for errors of any write so far
        try:
            shard_files.check_shard(unfinished, len(digests) // 32)
        except EnvironmentFault:
            raise
        except UserError as error:
            raise RuntimeError(str(error)) from error
    size = place.stat().st_size
    part = Part(
        job.shard, size, len(digests) // 32, bytes(digests), bytes(contents),
        statistics.to_bytes(histogram) if digests else b"", corrupt, rejected, found, dict(sorted(changes.items())),
    )  # fmt: skip
    part.save(job.folder)
    return part


def _write(job: Job, send: Callable, convert: Callable[[Item], Stored]) -> Part:
    """The work of a worker process on one shard."""
    return write_shard(job, convert, lambda *news: send(news))


def run_jobs(
    jobs: Iterable[Job], convert: Callable[[Item], Stored], workers: int, report: Callable[[int, list], None]
) -> Iterator[Part]:
    """Runs the jobs on worker processes; yields parts as they finish. `convert` and the jobs must be picklable.

    Raises UserError if a worker cannot write, dies or hangs. Workers end when the iterator is closed or exhausted.
    """
    # Jobs are created one by one: the items of all jobs may not fit into memory.
    with contextlib.closing(processes.run(jobs, functools.partial(_write, convert=convert), workers)) as messages:
        try:
            for kind, _, content in messages:
                if kind == processes.NEWS:
                    report(*content)
                else:
                    yield content
        except processes.WorkFailed as error:
            raise UserError(f"cannot write a shard: {error}") from error
