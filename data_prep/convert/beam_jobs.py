"""Jobs as an Apache Beam pipeline: the counterpart of `shards.run_jobs` for any Beam runner.

The elements of the pipeline are names of files next to the shards, each with a pickled job and its conversion function.
Finished shards are detected by their part files. So only names pass through the runner, and asynchronous runners are
monitored by looking for part files. All workers must see the inputs and the dataset folder under the same absolute
paths.
"""

import dataclasses
import importlib.util
import os
import pathlib
import pickle
import time
from collections.abc import Callable, Iterable, Iterator

from data_prep.convert.pixels import Stored
from data_prep.convert.shards import Item, Job, Part, temporary, write_shard
from pera_jax.common import files
from pera_jax.common.errors import UserError

_INTERVAL = 2.0  # seconds between checks for finished shards


def check_installed() -> None:
    """Raises UserError if Apache Beam is not installed."""
    if importlib.util.find_spec("apache_beam") is None:
        raise UserError(
            "Apache Beam is not installed; in a separate environment, run pip install -r "
            "requirements-beam.txt, or install the extra pera_jax[beam]"
        )


def run_jobs(
    jobs: Iterable[Job],
    convert: Callable[[Item], Stored],
    workers: int,
    report: Callable[[int, list], None],
    *,
    options: list[str],
) -> Iterator[Part]:
    """Runs the jobs as one pipeline; yields parts as their shards are found finished.

    Args:
      jobs: shards to write, one per element.
      convert: from a module that workers can import, not from `__main__`.
      workers: ignored: set by options of the runner.
      report: called with (number of images, corrupt images) of each finished shard.
      options: of Beam, such as "--runner=DirectRunner".

    Raises UserError: invalid Beam options, a failed pipeline. A pipeline that is still running when the
    iterator is closed is canceled. Local runners only report at the end.
    """
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions
    from apache_beam.runners.runner import PipelineState

    waiting = {}  # job file -> (folder, shard, number of images); without items, which may not fit into memory
    result = None
    try:
        for job in map(_absolute, jobs):
            waiting[_write_job_file(job, convert)] = job.folder, job.shard, len(job.items)
        if not waiting:
            return
        try:
            pipeline = beam.Pipeline(options=PipelineOptions(options))
            _ = pipeline | beam.Create(list(map(str, waiting))) | beam.Reshuffle() | beam.Map(write_job)
            result = pipeline.run()  # local runners block, others return immediately
        except Exception as error:  # any exception of the runner or a worker
            raise UserError(_failure(str(error) or type(error).__name__)) from error
        ended = False
        while waiting and not ended:
            # before the check: no shard can be finished after the last check
            ended = PipelineState.is_terminal(result.state)
            for file, (folder, shard, images) in list(waiting.items()):
                part = _finished(folder, shard)
                if part is not None:
                    file.unlink(missing_ok=True)
                    del waiting[file]
                    report(images, part.corrupt)
                    yield part
            if waiting and not ended:
                time.sleep(_INTERVAL)
        if waiting:
            _, missing, _ = next(iter(waiting.values()))
            raise UserError(_failure(f"it ended as {result.state} without shard {missing}, see the log of the runner"))
    finally:
        if result is not None and waiting and not PipelineState.is_terminal(result.state):
            result.cancel()
        for file in waiting:
            file.unlink(missing_ok=True)


def _failure(reason: str) -> str:
    last = reason.strip().splitlines()[-1].rstrip(".")
    return f"the pipeline failed: {last}; fix this, and re-run the same command to resume after the finished shards"


def _absolute(job: Job) -> Job:
    """The same job with absolute paths, for processes with another working directory."""
    items = [dataclasses.replace(item, path=os.path.abspath(item.path)) for item in job.items]
    return dataclasses.replace(job, folder=job.folder.absolute(), items=items)


def _write_job_file(job: Job, convert: Callable[[Item], Stored]) -> pathlib.Path:
    file = job.folder / f"{job.shard}.job"
    files.write(file, pickle.dumps((job, convert)), temporary(file))
    return file


def _finished(folder: pathlib.Path, shard: str) -> Part | None:
    part, file = Part.load(folder, shard), folder / shard
    return part if part is not None and file.is_file() and file.stat().st_size == part.bytes else None


def write_job(file: str) -> str:
    """Runs in a worker: writes the shard of a job file, unless it is finished, and returns its name.

    A runner may execute a job twice, even concurrently: temporary names differ, and both write the same bytes.
    """
    job, convert = pickle.loads(pathlib.Path(file).read_bytes())
    if _finished(job.folder, job.shard) is None:
        write_shard(job, convert, _count)
    return job.shard


def _count(images: int, corrupt: list[tuple[str, str]]) -> None:
    """Updates the counters shown by runners."""
    from apache_beam.metrics import Metrics

    Metrics.counter("data_prep", "images").inc(images)
    Metrics.counter("data_prep", "corrupt").inc(len(corrupt))
