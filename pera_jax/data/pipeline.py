"""From records to batches of crops: which record comes when, read, decoded and cropped by worker processes (Grain).

The stream of global batches is a pure function of (records, crops, seed, batch size). Each epoch is its own shuffle of
all records, cut to the `floor(records / batch)` batches that fill up: within an epoch no record comes twice, and the
rest of the shuffle, other records each time, is left out. Of several data sets each has its own shuffles, one after the
other, whole, and examples are drawn from them in turn by their shares. Where a record's crops lie is drawn from (seed,
epoch, place in the epoch). So batch k is the same for any number of workers and of hosts and wherever the reading starts, and its
number is all the position that a checkpoint needs to hold.
"""

import contextlib
import dataclasses
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
import types
from collections.abc import Iterator, Sequence
from multiprocessing import connection

import numpy as np
from absl import flags

from pera_jax import calls
from pera_jax.common import environment, interrupts
from pera_jax.common.errors import UserError
from pera_jax.data import decode, records, shared_memory
from pera_jax.data.mixture import Mixture

with calls.logging_unchanged():  # its import brings Orbax's
    import grain

_REPLACEMENTS, _NEIGHBOURS, _LEAP = 100, 4, 0x9E3779B1
_ENDLESS = 1 << 62  # Grain computes with lengths as floats, which round the largest whole number up
_SEED_STEP = 0x9E3779B9  # between the seeds of the data sets of a run
_STARTED = 5.0  # seconds after which workers that are not started yet are not waited for
_BATCHES_PER_WORKER = 4  # that lie in shared memory at once: two wait in Grain's buffers, two to be let in


@dataclasses.dataclass(frozen=True)
class Crops:
    """Which crops an image gives.

    Attributes:
      specs: for each crop type, the number of crops per image, their size in px and the range of their share of the image's
        area: `objectives.base.CropSpec`.
      aspect: range of width / height. flip: probability of each of the two flips.
    """

    specs: dict[str, tuple[int, int, tuple[float, float]]]
    aspect: tuple[float, float]
    flip: float


def make_pipeline(
    data: Mixture,
    crops: Crops,
    *,
    batch_size: int,
    seed: int,
    start_batch: int = 0,
    workers: int = 0,
    rows: Sequence[int] | None = None,
) -> "Batches":
    """The endless stream of this host's rows of each global batch, from batch `start_batch` on.

    Args:
      data: the data sets.
      batch_size: images in a global batch, of all hosts.
      seed: 0 <= seed < 2**32.
      start_batch: batches that were delivered before, the position to go on from.
      workers: processes that read, decode and crop; with 0 a thread of this process does.
      rows: places in the global batch, 0 ... batch_size - 1, that this host supplies, in the order in which it gets
        them; all by default. Several hosts may supply the same.

    Returns:
      An iterator over dicts of arrays, b = len(rows):
        for each crop type [b, number, size, size, C], of the stored dtype: the bands of the run,
        "label" int32 [b], -1 without classes; "set" int64 [b], the data set, and "index" int64 [b], the record of it, whose
        turn it was;
        "replaced" bool [b], whether that record could not be read or decoded, so that image and label are those of the
        next record that could.
      `close()` ends its workers. With workers the arrays lie in shared memory, which is given back as they are dropped:
      drop them before the program ends.

    Raises:
      UserError: fewer records than one batch; too little shared memory.
      ValueError: rows that the batch does not have.
      While iterating: 100 records in a row that cannot be decoded; EnvironmentFault where the machine fails, as where
      it kills a worker.
    """
    batches_per_epoch = len(data) // batch_size
    if batches_per_epoch < 1:
        raise UserError(
            f"one batch takes batch_size={batch_size} images and the split holds {len(data)}; make the batch smaller"
        )
    rows = np.arange(batch_size) if rows is None else np.asarray(rows)
    if not rows.size or rows.min() < 0 or rows.max() >= batch_size:
        raise ValueError(f"rows {rows} are none of a batch of {batch_size}")
    if not 0 <= seed < 2**32:
        raise UserError(f"seed={seed} is out of range; choose one from 0 to {2**32 - 1}")
    if workers:
        freed = shared_memory.remove_orphans()
        if freed:
            print(f"{freed >> 20} MiB of shared memory of killed runs are free again", file=sys.stderr, flush=True)
        _check_shared_memory(crops, len(data.bands) * np.dtype(data.bands.dtype).itemsize, len(rows), workers)

    draws = [
        grain.MapDataset.range(len(source)).seed((seed + place * _SEED_STEP) % 2**32).shuffle()
        for place, source in enumerate(data.sources)
    ]
    if len(draws) == 1:
        draws = [draws[0][: batches_per_epoch * batch_size]]
    draws = [each.random_map(Draw(place)).repeat() for place, each in enumerate(draws)]
    draws = draws[0] if len(draws) == 1 else grain.MapDataset.mix(draws, weights=data.shares)
    batches = TakeRows(draws, batch_size, rows).batch(len(rows))[start_batch:].map(ReadBatch(data, crops))
    if not workers:
        keep_memory()
        return Batches(iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2))), 0)

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain hands its flags on to the workers; a program without absl has none.
    stream = batches.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)).mp_prefetch(
        grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=1), worker_init_fn=_start_worker
    )
    return Batches(iter(stream), workers)


class Batches(Iterator[dict[str, np.ndarray]]):
    """An endless iterator over batches that ends its worker processes when it is closed."""

    def __init__(self, iterator: grain.DatasetIterator, workers: int):
        self._iterator = iterator
        before = _processes()
        with interrupts.not_for_children(), _without_script():
            iterator.get_state()  # Makes the iterators of the workers, which Grain else puts off until the first batch is
            iterator.start_prefetch()  # asked for; they can start while the model compiles.
            _wait_for_processes(before + workers)

    def __next__(self) -> dict[str, np.ndarray]:
        try:
            batch = next(self._iterator)
        except (RuntimeError, OSError, MemoryError) as error:
            environment.raise_if_fault(error, "the next batch cannot be read")
            if not re.search(r"exit code -?\d", str(error)):  # Grain's words for a worker that is gone
                raise
            raise environment.EnvironmentFault(
                f"a data worker was ended by the system ({_end_of(error)}), most often for want of memory; set fewer "
                "config.data.workers or a smaller batch_size, or give the job more memory, and start again"
            ) from error
        return {name: np.asarray(value) for name, value in batch.items()}

    def close(self) -> None:
        """Ends the workers and gives back their memory. Calling it again does nothing."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None


def _processes() -> int:
    """How many workers of this process there are."""
    return sum(each.name.startswith("grain") for each in multiprocessing.active_children())


def _wait_for_processes(number: int) -> None:
    """Until so many are started, which threads of Grain do; not until they are ready."""
    end = time.monotonic() + _STARTED
    while _processes() < number and time.monotonic() < end:  # one that could not be started is an error of the first batch
        time.sleep(0.001)


@contextlib.contextmanager
def _without_script() -> Iterator[None]:
    """Processes that are started meanwhile do not run the program's script again: without `if __name__ == "__main__"` it
    would start a training in each of them. A module that was started with `python -m` is imported as ever."""
    script = sys.modules["__main__"]
    if getattr(script, "__spec__", None) is None:
        sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = script


def _end_of(error: RuntimeError) -> str:
    """How a worker ended, from Grain's sentence: "SIGKILL", or "status 1"."""
    status = int(re.search(r"exit code (-?\d+)", str(error))[1])
    return signal.Signals(-status).name if status < 0 else f"status {status}"


class TakeRows(grain.MapDataset):
    """Of every `batch_size` elements those at the places `rows`. Comes after what is random: that is keyed by place."""

    def __init__(self, parent: grain.MapDataset, batch_size: int, rows: np.ndarray):
        super().__init__(parent)
        self._batch_size = batch_size
        self._rows = [int(row) for row in rows]

    def __len__(self) -> int:
        return min(len(self._parent) // self._batch_size * len(self._rows), _ENDLESS)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        batch, place = divmod(index, len(self._rows))
        return self._parent[batch * self._batch_size + self._rows[place]]


class ReadBatch(grain.transforms.Map):
    """Reads, decodes and crops the records of one batch, straight into the batch's arrays."""

    def __init__(self, data: Mixture, crops: Crops):
        self._data = data
        self._crops = crops

    def map(self, draws: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Takes "set", "index" and "seed", int64 [b]; returns a batch as `make_pipeline` says."""
        size, bands = len(draws["index"]), self._data.bands
        batch = {
            name: np.empty((size, number, pixels, pixels, len(bands)), bands.dtype)
            for name, (number, pixels, _) in self._crops.specs.items()
        }
        label, replaced = np.empty(size, np.int32), np.empty(size, bool)
        for i, (place, index, seed) in enumerate(zip(draws["set"], draws["index"], draws["seed"], strict=True)):
            out = {name: values[i] for name, values in batch.items()}
            label[i], replaced[i] = self._fill(int(place), int(index), int(seed), out)
        return batch | {"label": label, "set": draws["set"], "index": draws["index"], "replaced": replaced}

    def _fill(self, place: int, index: int, seed: int, out: dict[str, np.ndarray]) -> tuple[int, bool]:
        """Fills `out`, by kind [number, size, size, C], from the image `index` of data set `place`, or the next one that
        can be decoded; returns its label, and whether it is another."""
        source = self._data.sources[place]
        for skipped in range(_REPLACEMENTS):
            # The neighbours first; then anywhere, since a shard may be damaged as a whole.
            other = (index + (skipped if skipped < _NEIGHBOURS else skipped * _LEAP)) % len(source)
            try:
                record = records.decode_record(source.read(other))
                rng = np.random.default_rng(seed)
                decode.fill_crops(record.image, source.info, self._data.places[place], rng, self._crops, out)
                return record.label, skipped > 0
            except (RuntimeError, ValueError):  # A damaged shard, record or image.
                continue
        raise UserError(
            f"{_REPLACEMENTS} records that were tried, from number {index} on, cannot be decoded; {source.path} is "
            "damaged: convert it again"
        )


class Draw(grain.transforms.RandomMap):
    """A record's turn: its data set and number, and the seed of its crops, from a generator keyed by (seed, turn)."""

    def __init__(self, place: int):
        self._place = np.int64(place)

    def random_map(self, index: int, rng: np.random.Generator) -> dict[str, np.int64]:
        return {"set": self._place, "index": np.int64(index), "seed": rng.integers(2**63)}


def workers_of(wanted: int) -> int:
    """`config.data.workers` as a number: -1 is one for each two cores that this process may use, from 1 to 16."""
    return wanted if wanted >= 0 else max(1, min(len(os.sched_getaffinity(0)) // 2, 16))


def keep_memory() -> None:
    """Teaches the C library, which raises its limits when a large block is freed, to keep memory for the next image.

    Else it may give the pages of every image back to the system, and to be handed them again takes as long as decoding.
    """
    np.empty(16 << 20, np.uint8)


def _start_worker(worker: int, workers: int) -> None:
    """Runs first in each worker process."""
    for number in (signal.SIGINT, signal.SIGTERM):  # Sent to all processes of a job; the parent says when to end.
        signal.signal(number, signal.SIG_IGN)
    interrupts.signals_wanted()
    shared_memory.name_after(multiprocessing.parent_process().pid)
    keep_memory()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Ends this worker when the process that started it is gone, even if that was killed and could not say so."""
    connection.wait([multiprocessing.parent_process().sentinel])
    time.sleep(2)  # Nobody empties the queue: the batch in hand finds it full, instead of being cut off half shared.
    os._exit(1)


def _check_shared_memory(crops: Crops, pixel_bytes: int, local_batch: int, workers: int) -> None:
    images = sum(number * size**2 * pixel_bytes for number, size, _ in crops.specs.values())
    shared_memory.check_room((_BATCHES_PER_WORKER * workers + 1) * local_batch * images, workers, local_batch)
