"""What `data_prep.verify` does with one shard, and the processes that do it.

The shards are read in processes of their own: whatever damaged bytes do to a decoder, the command lives on and names
the shard whose reader died.
"""

import collections
import contextlib
import dataclasses
import hashlib
import multiprocessing
import multiprocessing.connection
import pathlib
import signal
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from pera_jax.common import environment, interrupts, json_files
from pera_jax.common.environment import EnvironmentFault
from pera_jax.common.text import printable
from pera_jax.data import codecs, records, shard_files, statistics

_REPORT_EVERY = 32  # records between two messages of a worker


@dataclasses.dataclass(frozen=True)
class Task:
    """One shard to check: number `index` of its split, and what info.json says of it."""

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
    """What was found in one shard.

    Attributes:
      digests: SHA-256 of each record that could be read, in order.
      counts: the values of the pixels with data of the images that could be decoded; None without one.
      no_data: number of values that stand for no data, of all bands.
      decoded: number of images that could be decoded and have the right bands and dtype; lossy: those of them in JPEG.
      heights, widths: least and greatest, px.
      shard_problems: sentences on the shard as a whole.
      record_problems: [first, last, text] of records in a row with the same fault, counted from 0 within the shard.
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
        """Adds an image [H, W, C]; `no_data` is what its place says. Raises ValueError where it does not fit."""
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
    """bool [H, W, C], which holds as many False as there are pixels without data, each at one that has their value.

    Args:
      pixels: [H, W, C].
      no_data: `pixels` says how many there are in each band, and `values` what they hold.

    Raises:
      ValueError: there are fewer of that value.
    """
    numbers, values = no_data.get("pixels"), no_data.get("values")
    for given, kinds in ((numbers, int), (values, (int, float))):
        if not isinstance(given, list) or len(given) != pixels.shape[2] or not all(isinstance(v, kinds) for v in given):
            raise ValueError("its place does not say for each band how many pixels have no data, and what they hold")
    valid = np.ones(pixels.shape, bool)
    for band, (number, value) in enumerate(zip(numbers, values, strict=True)):
        held = np.flatnonzero(pixels[..., band] == pixels.dtype.type(value))
        if not 0 <= number <= len(held):
            raise ValueError(f"{number} pixels of band {band + 1} should have no data, and {len(held)} hold their value")
        valid[..., band].flat[held[:number]] = False
    return valid


def span(one: tuple[int, int] | None, other: tuple[int, int] | None) -> tuple[int, int] | None:
    """The least and the greatest of two such pairs; None for a pair of nothing."""
    pairs = [pair for pair in (one, other) if pair]
    return (min(low for low, _ in pairs), max(high for _, high in pairs)) if pairs else None


def check(task: Task, report: Callable[[int], None]) -> Findings:
    """Reads and decodes every record of a shard. Raises nothing for damage, EnvironmentFault for a machine that fails.

    `report(done)` is called every few records; the calls add up to the number of records that info.json names.
    """
    found, done = Findings(), 0
    for number, raw in _read(task, found):
        if isinstance(raw, bytes):
            found.digests.append(hashlib.sha256(raw).digest())
            try:
                _check_record(raw, task.info, found)
            except Exception as error:  # on damaged bytes decoders raise nearly anything
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
    """Yields (number, the record, or why it cannot be read) of each; notes what is wrong with the shard as a whole."""
    file, size = task.folder / task.shard, task.info.splits[task.split].shard_bytes[task.index]
    held = shard_files.size_of(file)
    if held is None:
        found.shard_problems.append("is missing")
        return
    if held != size:
        found.shard_problems.append(f"has {held:,} bytes instead of {size:,}")
    try:
        reader = shard_files.open_shard(file)
    except RuntimeError:
        found.shard_problems.append("cannot be read: it is truncated, or its index is damaged")
        return
    held = reader.num_records()
    reader.close()
    if held != task.records:
        found.shard_problems.append(f"holds {held:,} records instead of {task.records:,}")
    owner = shard_files.OPEN.owner(found)
    for number in range(held):
        try:
            yield number, shard_files.OPEN.read(owner, file, number)
        except (RuntimeError, IndexError):
            yield number, "its bytes are damaged: the checksum does not fit"
    shard_files.OPEN.close(owner)


def _check_record(raw: bytes, info: records.DatasetInfo, found: Findings) -> None:
    """Adds the image to the findings. Raises ValueError with what is wrong, or whatever a decoder raises."""
    record = records.decode_record(raw)
    place = json_files.loads(record.place) if record.place else {}
    if not isinstance(place, dict):
        raise ValueError("its place is no JSON object")
    pixels = codecs.decode_bands(record.image, info, range(len(info.bands)))
    found.add_image(pixels, record.image[:2] == b"\xff\xd8", place.get("no_data"))
    if not record.key:
        raise ValueError("its key is empty")
    if info.class_names is None and record.label != -1:
        raise ValueError(f"it has the label {record.label}, and the data set has no classes")
    if info.class_names is not None and not 0 <= record.label < len(info.class_names):
        what = "no label" if record.label == -1 else f"the label {record.label}"
        raise ValueError(f"it has {what}, and the data set has {len(info.class_names)} classes")
    if info.has_places != bool(record.place):
        raise ValueError("it has no place" if info.has_places else "it has a place, and the data set has none")


# ---------------------------------------------------------------- processes


def _work(connection: multiprocessing.connection.Connection) -> None:
    """A worker process: takes tasks until the main process ends it or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the main process decides what ends
    interrupts.signals_wanted()
    with contextlib.suppress(ConnectionError, EOFError):
        while True:
            task = connection.recv()
            try:
                found = check(task, lambda done: connection.send(("records", done)))
            except EnvironmentFault as error:
                connection.send(("fault", str(error)))
            else:
                connection.send(("shard", found))


def check_all(tasks: Sequence[Task], workers: int, report: Callable[[int], None]) -> Iterator[tuple[Task, Findings]]:
    """Yields each task with what was found, as they finish, from `workers` processes; `report(done)` counts records.

    A worker that dies is a finding of its shard, and another takes its place. Raises EnvironmentFault where the machine
    fails, or the system kills a worker.
    """
    context = multiprocessing.get_context("spawn")  # a fork would copy the locks of the threads of ArrayRecord
    pending = collections.deque(tasks)
    busy = {}  # connection -> [process, its task, the records it has reported]

    def start() -> None:
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs,), daemon=True)
        with interrupts.not_for_children():
            process.start()
        theirs.close()  # so that the death of the worker closes the pipe
        busy[ours] = [process, None, 0]
        give(ours)

    def give(connection) -> None:
        busy[connection][1:] = pending.popleft(), 0
        with contextlib.suppress(ConnectionError):  # it died just now; its pipe says so when it is read
            connection.send(busy[connection][1])

    try:
        for _ in range(min(workers, len(pending))):
            start()
        while busy:
            for connection in multiprocessing.connection.wait(list(busy)):
                process, task, done = busy[connection]
                try:
                    kind, content = connection.recv()
                except (EOFError, ConnectionError):
                    process.join()
                    _end(connection, busy)
                    if process.exitcode == -signal.SIGKILL:  # no decoder does that to itself
                        raise EnvironmentFault(
                            f"the process that read shard {printable(task.shard)} was killed, perhaps for want of memory; "
                            "give the command again with --workers 1"
                        ) from None
                    report(task.records - done)
                    if pending:
                        start()
                    why = f"cannot be checked: the process that read it {_exit_text(process.exitcode)}"
                    yield task, Findings(shard_problems=[why])
                    continue
                if kind == "fault":
                    raise EnvironmentFault(content)
                if kind == "records":
                    busy[connection][2] += content
                    report(content)
                    continue
                if pending:
                    give(connection)
                else:
                    _end(connection, busy)
                yield task, content
    finally:
        for connection in list(busy):
            _end(connection, busy)


def _end(connection, busy: dict) -> None:
    process = busy.pop(connection)[0]
    process.terminate()
    process.join()
    connection.close()


def _exit_text(status: int) -> str:
    return f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
