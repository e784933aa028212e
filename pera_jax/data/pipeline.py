"""From records to batches of crops: the order of the records, and reading, decoding and cropping in workers (Grain).

The stream of global batches is a pure function of (records, crops, seed, batch size). Each epoch is its own shuffle of
all records, cut to `floor(records / batch)` full batches: no record occurs twice in an epoch, and the remainder of the
shuffle is dropped, different records each time. With several datasets, each has its own sequence of complete shuffles,
and examples are drawn from the datasets by their weights. The crops of a record are drawn from (seed, epoch, index in
the epoch), and what a method draws for a group of neighboring images, from the seeds of their crops. So batch k is the
same for any number of workers and hosts and any start position, and k is the only position that a checkpoint has to
store.
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
from typing import Any

import numpy as np
from absl import flags

from pera_jax import calls
from pera_jax.common import environment, interrupts
from pera_jax.common.errors import UserError
from pera_jax.data import read_batch, shared_memory
from pera_jax.data.mixture import Mixture

with calls.logging_unchanged():  # also imports Orbax, which configures logging
    import grain

_ENDLESS = 1 << 62  # Grain converts lengths to floats, which would round the largest integer up
_SEED_STEP = 0x9E3779B9  # offset between the seeds of the datasets of a run
_STARTED = 5.0  # maximum seconds to wait for workers to start
_BATCHES_PER_WORKER = 4  # in shared memory at once: two in Grain's buffers, two waiting to enter


@dataclasses.dataclass(frozen=True)
class Crops:
    """The crops that are taken from an image.

    Attributes:
      specs: by crop type, the number of crops per image, their size in px and the range of their area as a fraction of
        the image area: `objectives.base.CropSpec`.
      aspect: range of width / height. flip: probability of each of the two flips.
      draws: further entries of the batch: `objectives.base.HostDraws`, or None.
    """

    specs: dict[str, tuple[int, int, tuple[float, float]]]
    aspect: tuple[float, float]
    flip: float
    draws: Any = None


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
    """An infinite iterator over this host's rows of each global batch, starting at batch `start_batch`.

    Args:
      data: the datasets.
      batch_size: images per global batch, over all hosts.
      seed: 0 <= seed < 2**32.
      start_batch: the position to resume from: number of batches delivered before.
      workers: number of worker processes; 0 uses a thread of this process.
      rows: indices in the global batch, 0 ... batch_size - 1, that this host provides, in this order; by default all.
        Several hosts may provide the same rows.

    Returns:
      An iterator over dicts of arrays, b = len(rows):
        each crop type: [b, number, size, size, C] in the stored dtype, with the bands of the run;
        each entry of `crops.draws`: [b, ...];
        "label": int32 [b], -1 without classes;
        "set", "index": int64 [b] each, the dataset and the record in it that were drawn;
        "replaced": bool [b], whether that record could not be read or decoded, so that image and label come from
        another record.
      `close()` ends the workers. With workers the arrays lie in shared memory, which is freed when they are deleted:
      delete them before the program ends.

    Raises:
      UserError: fewer records than one batch; too little shared memory; rows that are not whole groups of
        `crops.draws`.
      ValueError: rows outside the batch.
      While iterating, UserError after 100 records that cannot be decoded, and EnvironmentFault if the machine fails or
      kills a worker.
    """
    batches_per_epoch = len(data) // batch_size
    if batches_per_epoch < 1:
        raise UserError(
            f"batch_size={batch_size} is larger than the split with {len(data)} images; reduce batch_size"
        )
    rows = np.arange(batch_size) if rows is None else np.asarray(rows)
    if not rows.size or rows.min() < 0 or rows.max() >= batch_size:
        raise ValueError(f"rows {rows} are out of range for batch_size={batch_size}")
    read_batch.check_groups(crops.draws, rows)
    if not 0 <= seed < 2**32:
        raise UserError(f"seed={seed} is out of range; expected 0 to {2**32 - 1}")
    if workers:
        freed = shared_memory.remove_orphans()
        if freed:
            print(f"freed {freed / 2**20:.1f} MiB of shared memory of killed runs", file=sys.stderr, flush=True)
        _check_shared_memory(crops, len(data.bands) * np.dtype(data.bands.dtype).itemsize, len(rows), workers)

    draws = [
        grain.MapDataset.range(len(source)).seed((seed + place * _SEED_STEP) % 2**32).shuffle()
        for place, source in enumerate(data.sources)
    ]
    if len(draws) == 1:
        draws = [draws[0][: batches_per_epoch * batch_size]]
    draws = [each.random_map(read_batch.Draw(place)).repeat() for place, each in enumerate(draws)]
    draws = draws[0] if len(draws) == 1 else grain.MapDataset.mix(draws, weights=data.shares)
    batches = TakeRows(draws, batch_size, rows).batch(len(rows))[start_batch:].map(read_batch.ReadBatch(data, crops))
    if not workers:
        keep_memory()
        return Batches(iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2))), 0)

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain passes absl flags to its workers; programs without absl have none.
    stream = batches.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)).mp_prefetch(
        grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=1), worker_init_fn=_start_worker
    )
    return Batches(iter(stream), workers)


class Batches(Iterator[dict[str, np.ndarray]]):
    """An infinite iterator over batches; `close` ends its worker processes."""

    def __init__(self, iterator: grain.DatasetIterator, workers: int):
        self._iterator = iterator
        before = _processes()
        with interrupts.not_for_children(), _without_script():
            # Starts the workers now, while the model compiles, and not with the first batch.
            iterator.get_state()
            iterator.start_prefetch()
            _wait_for_processes(before + workers)

    def __next__(self) -> dict[str, np.ndarray]:
        try:
            batch = next(self._iterator)
        except (RuntimeError, OSError, MemoryError) as error:
            environment.raise_if_fault(error, "the next batch cannot be read")
            if not re.search(r"exit code -?\d", str(error)):  # Grain's message for a dead worker
                raise
            raise environment.EnvironmentFault(
                f"a data worker was killed by the system ({_end_of(error)}), most likely for lack of memory; use fewer "
                "config.data.workers or a smaller batch_size, or give the job more memory, and re-run the same command"
            ) from error
        return {name: np.asarray(value) for name, value in batch.items()}

    def close(self) -> None:
        """Ends the workers and frees their memory. Can be called repeatedly."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None


def _processes() -> int:
    """Number of Grain workers of this process."""
    return sum(each.name.startswith("grain") for each in multiprocessing.active_children())


def _wait_for_processes(number: int) -> None:
    """Waits until `number` workers are started by the threads of Grain, not until they are ready."""
    end = time.monotonic() + _STARTED
    # a worker that cannot be started is reported by the first batch
    while _processes() < number and time.monotonic() < end:
        time.sleep(0.001)


@contextlib.contextmanager
def _without_script() -> Iterator[None]:
    """Keeps processes started in this context from running the main script again.

    Without `if __name__ == "__main__"` the script would start a training in each of them. Modules started with `python
    -m` are imported as usual.
    """
    script = sys.modules["__main__"]
    if getattr(script, "__spec__", None) is None:
        sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = script


def _end_of(error: RuntimeError) -> str:
    """How a worker ended, from Grain's message: "SIGKILL" or "status 1"."""
    status = int(re.search(r"exit code (-?\d+)", str(error))[1])
    return signal.Signals(-status).name if status < 0 else f"status {status}"


class TakeRows(grain.MapDataset):
    """Keeps the indices `rows` of every `batch_size` elements. Applied after random transforms, which depend on the
    index."""

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


def workers_of(wanted: int) -> int:
    """Resolves `config.data.workers`: -1 means one worker per two available cores, at least 1 and at most 16."""
    return wanted if wanted >= 0 else max(1, min(len(os.sched_getaffinity(0)) // 2, 16))


def keep_memory() -> None:
    """Makes the C library keep freed memory for the next image: it raises its threshold when a large block is freed.

    Otherwise the pages of every image may return to the system, and getting them back takes as long as decoding.
    """
    np.empty(16 << 20, np.uint8)


def _start_worker(worker: int, workers: int) -> None:
    """Runs first in each worker process."""
    for number in interrupts.STOPS:  # sent to all processes of a job; the parent decides when to end
        signal.signal(number, signal.SIG_IGN)
    interrupts.signals_wanted()
    shared_memory.name_after(multiprocessing.parent_process().pid)
    keep_memory()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Ends this worker when its parent process is gone, even if it was killed."""
    connection.wait([multiprocessing.parent_process().sentinel])
    time.sleep(2)  # lets the current batch run into the full queue instead of leaving it half shared
    os._exit(1)


def _check_shared_memory(crops: Crops, pixel_bytes: int, local_batch: int, workers: int) -> None:
    images = sum(number * size**2 * pixel_bytes for number, size, _ in crops.specs.values())
    if crops.draws:
        images += sum(int(np.prod(shape)) * np.dtype(dtype).itemsize for shape, dtype in crops.draws.shapes().values())
    shared_memory.check_room((_BATCHES_PER_WORKER * workers + 1) * local_batch * images, workers, local_batch)
