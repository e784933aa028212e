"""Worker processes for a long row of tasks, which end when the main process ends, however that comes."""

import contextlib
import itertools
import multiprocessing
import multiprocessing.connection
import signal
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from pera_jax.errors import UserError

SAID, DONE = "said", "done"


class WorkFailed(Exception):
    """A task raised OSError or RuntimeError; the text is that of the error."""


def run(tasks: Iterable, work: Callable[[Any, Callable], Any], workers: int) -> Iterator[tuple[str, Any]]:
    """Runs `work(task, say)` for every task on worker processes.

    Each worker gets its tasks one at a time, in their order; a task is taken from `tasks` when a worker is free for it.
    Tasks, `work` and what it gives back must be picklable.

    Yields:
      (SAID, x) for each call `say(x)` of a worker, (DONE, result) for each task, as they come.

    Raises:
      WorkFailed; UserError when a worker dies. Workers end when the iterator is closed or exhausted.
    """
    context = multiprocessing.get_context("spawn")  # a fork would copy the locks of the shard writer's threads
    pending, processes = iter(tasks), {}  # connection -> process
    try:
        first = list(itertools.islice(pending, workers))
        for _ in first:  # all are started before one gets a task, for which it must be there
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, work), daemon=True)
            process.start()
            theirs.close()  # so that the death of the worker closes the pipe
            processes[ours] = process
        for connection, task in zip(processes, first, strict=True):
            with _alive():
                connection.send(task)
        busy = len(first)
        while busy:
            for connection in multiprocessing.connection.wait(list(processes)):
                with _alive():
                    kind, content = connection.recv()
                    if kind == DONE:
                        busy -= 1
                        if (task := next(pending, None)) is not None:
                            connection.send(task)
                            busy += 1
                if kind not in (SAID, DONE):
                    raise WorkFailed(content)
                yield kind, content
    finally:
        for connection, process in processes.items():
            process.terminate()
            process.join()
            connection.close()


@contextlib.contextmanager
def _alive() -> Iterator[None]:
    try:
        yield
    except (EOFError, ConnectionError) as error:
        raise UserError(
            "a conversion worker died, perhaps for want of memory; give the command again with --workers 1"
        ) from error


def _work(connection: multiprocessing.connection.Connection, work: Callable) -> None:
    """A worker process: takes tasks until the main process ends it or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the main process decides what ends
    try:
        while True:
            task = connection.recv()
            try:
                result = work(task, lambda news: connection.send((SAID, news)))
            except (ConnectionError, EOFError):
                raise
            except (OSError, RuntimeError) as error:
                connection.send(("failed", str(error)))
            else:
                connection.send((DONE, result))
    except (ConnectionError, EOFError):
        return  # the main process was killed; the next one removes what is left under temporary names
