"""Worker processes for a long row of tasks, which end when the main process ends, however that comes."""

import contextlib
import itertools
import multiprocessing
import multiprocessing.connection
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from pera_jax.common import interrupts
from pera_jax.common.environment import EnvironmentFault, environment_fault, passing

SAID, DONE, _FAILED, _FAULT = "said", "done", "failed", "fault"
_LISTEN = 5.0  # seconds between two looks at workers that are silent
IDLE_SECONDS = 300.0  # without a word and without computing, after which workers are taken to hang
SILENT_SECONDS = 3600.0  # without a word


class WorkFailed(Exception):
    """A task raised OSError or RuntimeError; the text is that of the error."""


class _Silence:
    """How long workers have said nothing, and whether they compute."""

    def __init__(self, processes: Iterable[multiprocessing.Process]):
        self._pids = [process.pid for process in processes]
        self._word = self._busy = time.monotonic()
        self._computed = 0

    def broken(self) -> None:
        self._word = self._busy = time.monotonic()

    def check(self) -> None:
        """Raises EnvironmentFault when it has lasted too long."""
        now, computed = time.monotonic(), sum(map(_computed, self._pids))
        if computed != self._computed:
            self._computed, self._busy = computed, now
        if now - self._busy > IDLE_SECONDS or now - self._word > SILENT_SECONDS:
            raise EnvironmentFault(
                f"the workers have said nothing for {now - self._word:.0f} s: the disk hangs, or there is not enough memory "
                "for their threads; see to it, or use fewer --workers, and give the same command again"
            )


def _computed(pid: int) -> int:
    """The time that a process has computed, in clock ticks; 0 where that is not known."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return sum(map(int, file.read().rpartition(b")")[2].split()[11:13]))
    except (OSError, ValueError):
        return 0


def run(tasks: Iterable, work: Callable[[Any, Callable], Any], workers: int) -> Iterator[tuple[str, Any]]:
    """Runs `work(task, say)` for every task on worker processes.

    Each worker gets its tasks one at a time, in their order; a task is taken from `tasks` when a worker is free for it.
    Tasks, `work` and what it gives back must be picklable.

    Yields:
      (SAID, x) for each call `say(x)` of a worker, (DONE, result) for each task, as they come.

    Raises:
      WorkFailed; EnvironmentFault when a worker dies, hangs, or meets a fault of the machine. Workers end when the
      iterator is closed or exhausted.
    """
    context = multiprocessing.get_context("spawn")  # a fork would copy the locks of the shard writer's threads
    pending, processes = iter(tasks), {}  # connection -> process
    try:
        first = list(itertools.islice(pending, workers))
        for _ in first:  # all are started before one gets a task, for which it must be there
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, work), daemon=True)
            with interrupts.not_for_children():
                process.start()
            theirs.close()  # so that the death of the worker closes the pipe
            processes[ours] = process
        for connection, task in zip(processes, first, strict=True):
            with _alive():
                connection.send(task)
        busy = len(first)
        silence = _Silence(processes.values())
        while busy:
            heard = multiprocessing.connection.wait(list(processes), _LISTEN)
            silence.broken() if heard else silence.check()
            for connection in heard:
                with _alive():
                    kind, content = connection.recv()
                    if kind == DONE:
                        busy -= 1
                        if (task := next(pending, None)) is not None:
                            connection.send(task)
                            busy += 1
                if kind == _FAULT:
                    raise EnvironmentFault(content)
                if kind == _FAILED:
                    raise WorkFailed(content)
                yield kind, content
    finally:
        for connection, process in processes.items():
            process.terminate()
            process.join(_LISTEN)  # one that waits for a disk that hangs ends with it
            connection.close()


@contextlib.contextmanager
def _alive() -> Iterator[None]:
    try:
        yield
    except (EOFError, ConnectionError) as error:
        raise EnvironmentFault(
            "a conversion worker died, perhaps for want of memory; give the command again with --workers 1"
        ) from error


def _work(connection: multiprocessing.connection.Connection, work: Callable) -> None:
    """A worker process: takes tasks until the main process ends it or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the main process decides what ends
    interrupts.signals_wanted()
    try:
        while True:
            task = connection.recv()
            try:
                result = work(task, lambda news: connection.send((SAID, news)))
            except EnvironmentFault as error:
                connection.send((_FAULT, str(error)))
            except Exception as error:
                if isinstance(error, (ConnectionError, EOFError)):
                    raise
                fault = environment_fault(error) if passing(error) else None  # a full disk is told by the command
                if fault is not None:
                    connection.send((_FAULT, f"a worker cannot go on: {fault}, and give the same command again"))
                elif isinstance(error, (OSError, RuntimeError)):
                    connection.send((_FAILED, str(error)))
                else:
                    raise
            else:
                connection.send((DONE, result))
    except (ConnectionError, EOFError):
        return  # the main process was killed; the next one removes what is left under temporary names
