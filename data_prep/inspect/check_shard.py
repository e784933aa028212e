"""Checking one shard for `data_prep.verify`, in worker processes.

If damaged bytes crash a decoder, only a worker process dies, and the command reports its shard.
"""

import collections
import contextlib
import dataclasses
import hashlib
import pathlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from data_prep.convert import processes
from pera_jax.common import environment, json_files
from pera_jax.data import codecs, records, shard_files, statistics

_REPORT_EVERY = 32  # records between messages of a worker


@dataclasses.dataclass(frozen=True)
class Task:
    """One shard to check: its index in its split, and the metadata of the dataset."""

    folder: pathlib.Path
    split: str
    index: int
    info: records.DatasetInfo

    @property
    def shard(self) -> str:
        return self.info.splits[self.split].shards[self.index]

    @property
    def records(self) -> int:
        return self.info.splits[self.split].shard_records[self.index]


@dataclasses.dataclass
class Findings:
    """The findings in one shard.

    Attributes:
      digests: SHA-256 of each readable record, in order.
      counts: histogram of the valid pixels of all decoded images; None without any.
      no_data: number of nodata values over all bands.
      decoded: number of images that were decoded and have the right bands and dtype.
      lossy: number of decoded JPEG images.
      heights, widths: minimum and maximum, px.
      shard_problems: problems of the whole shard.
      record_problems: [first, last, text] of consecutive records with the same problem, counted from 0.
    """

    digests: list[bytes] = dataclasses.field(default_factory=list)
    counts: statistics.Histogram | None = None
    no_data: int = 0
    decoded: int = 0
    lossy: int = 0
    heights: tuple[int, int] | None = None
    widths: tuple[int, int] | None = None
    shard_problems: list[str] = dataclasses.field(default_factory=list)
    record_problems: list[list] = dataclasses.field(default_factory=list)

    def bad_record(self, number: int, text: str) -> None:
        if self.record_problems and self.record_problems[-1][1:] == [number - 1, text]:
            self.record_problems[-1][1] = number
        else:
            self.record_problems.append([number, number, text])

    def add_image(self, pixels: np.ndarray, lossy: bool, no_data: dict | None = None) -> None:
        """Adds an image [H, W, C]; `no_data` is from its place. Raises ValueError if they do not match."""
        valid = None if no_data is None else with_data(pixels, no_data)
        counts = statistics.count(pixels, valid)
        self.counts = counts if self.counts is None else self.counts + counts
        self.no_data += 0 if valid is None else int(valid.size - valid.sum())
        self.decoded += 1
        self.lossy += lossy
        self.heights, self.widths = (
            span(old, (side, side)) for old, side in zip((self.heights, self.widths), pixels.shape)
        )


def with_data(pixels: np.ndarray, no_data: dict) -> np.ndarray:
    """A mask, bool [H, W, C], with as many False as there are nodata pixels, at pixels with the nodata value.

    Args:
      pixels: [H, W, C].
      no_data: `pixels`, the number of nodata pixels per band, and `values`, their value per band.

    Raises:
      ValueError: fewer pixels have that value.
    """
    numbers, values = no_data.get("pixels"), no_data.get("values")
    for given, kinds in ((numbers, int), (values, (int, float))):
        if not isinstance(given, list) or len(given) != pixels.shape[2] or not all(isinstance(v, kinds) for v in given):
            raise ValueError("its place does not give the number and value of nodata pixels for each band")
    valid = np.ones(pixels.shape, bool)
    for band, (number, value) in enumerate(zip(numbers, values, strict=True)):
        held = np.flatnonzero(pixels[..., band] == pixels.dtype.type(value))
        if not 0 <= number <= len(held):
            raise ValueError(f"expected {number} nodata pixels in band {band + 1}, but {len(held)} have that value")
        valid[..., band].flat[held[:number]] = False
    return valid


def span(one: tuple[int, int] | None, other: tuple[int, int] | None) -> tuple[int, int] | None:
    """Combines two (minimum, maximum) pairs, either of which may be None."""
    pairs = [pair for pair in (one, other) if pair]
    return (min(low for low, _ in pairs), max(high for _, high in pairs)) if pairs else None


def check(task: Task, report: Callable[[int], None]) -> Findings:
    """Reads and decodes every record of a shard. Damage is reported in the findings.

    `report(n)` is called every few records; the numbers sum to the number of records in info.json. Raises
    EnvironmentFault if the machine fails.
    """
    found, done = Findings(), 0
    for number, raw in _read(task, found):
        if isinstance(raw, bytes):
            found.digests.append(hashlib.sha256(raw).digest())
            try:
                _check_record(raw, task.info, found)
            except Exception as error:  # for damaged bytes, decoders raise almost any exception
                environment.raise_if_fault(error, f"record {number} of shard {task.shard} cannot be checked")
                found.bad_record(number, str(error) or type(error).__name__)
        else:
            found.bad_record(number, raw)
        if (number + 1) % _REPORT_EVERY == 0 and number < task.records:
            report(number + 1 - done)
            done = number + 1
    report(task.records - done)
    return found


def _read(task: Task, found: Findings) -> Iterator[tuple[int, bytes | str]]:
    """Yields (record number, record or the reason why it cannot be read); adds problems of the whole shard to
    `found`."""
    file, size = task.folder / task.shard, task.info.splits[task.split].shard_bytes[task.index]
    held = shard_files.size_of(file)
    if held is None:
        found.shard_problems.append("is missing")
        return
    if held != size:
        found.shard_problems.append(f"has {held:,} bytes, expected {size:,}")
    try:
        reader = shard_files.open_shard(file)
    except RuntimeError:
        found.shard_problems.append("cannot be read: it is truncated, or its index is damaged")
        return
    held = reader.num_records()
    reader.close()
    if held != task.records:
        found.shard_problems.append(f"has {held:,} records, expected {task.records:,}")
    owner = shard_files.OPEN.owner(found)
    for number in range(held):
        try:
            yield number, shard_files.OPEN.read(owner, file, number)
        except (RuntimeError, IndexError):
            yield number, "its bytes are damaged: the checksum does not match"
    shard_files.OPEN.close(owner)


def _check_record(raw: bytes, info: records.DatasetInfo, found: Findings) -> None:
    """Adds the image to the findings. Raises ValueError with the problem, or any exception of a decoder."""
    record = records.decode_record(raw)
    place = json_files.loads(record.place) if record.place else {}
    if not isinstance(place, dict):
        raise ValueError("its place is not a JSON object")
    pixels = codecs.decode_bands(record.image, info, range(len(info.bands)))
    found.add_image(pixels, record.image[:2] == b"\xff\xd8", place.get("no_data"))
    if not record.key:
        raise ValueError("its key is empty")
    if info.class_names is None and record.label != -1:
        raise ValueError(f"it has the label {record.label}, but the dataset has no classes")
    if info.class_names is not None and not 0 <= record.label < len(info.class_names):
        what = "no label" if record.label == -1 else f"the label {record.label}"
        raise ValueError(f"it has {what}, but the dataset has {len(info.class_names)} classes")
    if info.has_places != bool(record.place):
        raise ValueError("it has no place" if info.has_places else "it has a place, but the dataset has none")


def check_all(tasks: Sequence[Task], workers: int, report: Callable[[int], None]) -> Iterator[tuple[Task, Findings]]:
    """Yields each task with its findings in order of completion, from `workers` processes; `report(n)` counts records.

    A worker that crashes is a finding of its shard. Raises EnvironmentFault if the machine fails or the system kills a
    worker.
    """
    counted = collections.Counter()  # records reported, by (split, index)
    with contextlib.closing(processes.run(tasks, check, workers, keep_going=True)) as messages:
        for kind, task, content in messages:
            if kind == processes.NEWS:
                counted[task.split, task.index] += content
                report(content)
                continue
            if kind == processes.LOST:
                report(task.records - counted[task.split, task.index])
                content = Findings(shard_problems=[f"cannot be checked: {content}"])
            yield task, content
