"""Jobs as an Apache Beam pipeline: what `shards.run_jobs` does on local processes, on any runner that Beam has.

The pipeline's elements are names of files. Each file holds a job and its conversion, pickled, and lies beside the
shards, and so do the part files by which finished shards come back: nothing but names passes through the runner, and
one that returns at once is followed by looking for part files. All workers must see the inputs and the data set folder
under the same absolute paths.
"""

import dataclasses
import importlib.util
import os
import pathlib
import pickle
import time
from collections.abc import Callable, Iterable, Iterator

from data_prep.convert.pixels import Stored
from data_prep.convert.shards import Item, Job, Part, write_file, write_shard
from pera_jax.common.errors import UserError

_INTERVAL = 2.0  # seconds between two looks for finished shards


def check_installed() -> None:
    """Raises UserError where there is no Beam."""
    if importlib.util.find_spec("apache_beam") is None:
        raise UserError(
            "Apache Beam is not installed here; in an environment of its own, give pip install -r "
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
      jobs: shards to write; each is one element.
      convert: of a module that workers can import, not of `__main__`.
      workers: without effect: the runner's own options say how many.
      report: called with (number of images, corrupt ones) of each finished shard.
      options: Beam's, such as "--runner=DirectRunner".

    Raises UserError: options that Beam refuses, a pipeline that fails. A pipeline that is still running when the
    iterator is closed is cancelled. Local runners show nothing before they have written everything.
    """
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions
    from apache_beam.runners.runner import PipelineState

    waiting = {}  # job files -> (folder, shard, number of images); the items of all jobs would fill the memory
    result = None
    try:
        for job in map(_absolute, jobs):
            waiting[_write_job_file(job, convert)] = job.folder, job.shard, len(job.items)
        if not waiting:
            return
        try:
            pipeline = beam.Pipeline(options=PipelineOptions(options))
            _ = pipeline | beam.Create(list(map(str, waiting))) | beam.Reshuffle() | beam.Map(write_job)
            result = pipeline.run()  # local runners return when they are done, others at once
        except Exception as error:  # whatever the runner or a worker raises
            raise UserError(_failure(str(error) or type(error).__name__)) from error
        ended = False
        while waiting and not ended:
            ended = PipelineState.is_terminal(result.state)  # asked first: then no shard can come after the last look
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
            raise UserError(_failure(f"it ended as {result.state} without shard {missing}, the runner's log says why"))
    finally:
        if result is not None and waiting and not PipelineState.is_terminal(result.state):
            result.cancel()
        for file in waiting:
            file.unlink(missing_ok=True)


def _failure(reason: str) -> str:
    last = reason.strip().splitlines()[-1].rstrip(".")
    return f"the pipeline failed: {last}; mend that and give the same command again, it goes on after finished shards"


def _absolute(job: Job) -> Job:
    """The same job for processes that were started in another folder."""
    items = [dataclasses.replace(item, path=os.path.abspath(item.path)) for item in job.items]
    return dataclasses.replace(job, folder=job.folder.absolute(), items=items)


def _write_job_file(job: Job, convert: Callable[[Item], Stored]) -> pathlib.Path:
    file = job.folder / f"{job.shard}.job"
    write_file(file, pickle.dumps((job, convert)))
    return file


def _finished(folder: pathlib.Path, shard: str) -> Part | None:
    part, file = Part.load(folder, shard), folder / shard
    return part if part is not None and file.is_file() and file.stat().st_size == part.bytes else None


def write_job(file: str) -> str:
    """What a worker does: writes the shard of a job's file, if it is not there, and returns its name.

    A runner may give the same job twice, at once or after one that was taken for lost: names of unfinished shards
    differ, and both would write the same bytes.
    """
    job, convert = pickle.loads(pathlib.Path(file).read_bytes())
    if _finished(job.folder, job.shard) is None:
        write_shard(job, convert, _count)
    return job.shard


def _count(images: int, corrupt: list[tuple[str, str]]) -> None:
    """Adds to the counters that runners show."""
    from apache_beam.metrics import Metrics

    Metrics.counter("data_prep", "images").inc(images)
    Metrics.counter("data_prep", "corrupt").inc(len(corrupt))
