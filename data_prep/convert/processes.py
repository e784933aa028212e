"""A pool of worker processes that receive tasks over pipes and end with the main process, however that ends."""

import contextlib
import dataclasses
import itertools
import multiprocessing
import multiprocessing.connection
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from pera_jax.common import interrupts
from pera_jax.common.environment import EnvironmentFault, environment_fault, passing

NEWS, DONE, LOST, _FAULT = "news", "done", "lost", "fault"
_POLL_SECONDS = 5.0  # how often silent workers are checked
IDLE_SECONDS = 300.0  # workers that send no message and use no CPU for this long count as hanging
SILENT_SECONDS = 3600.0  # workers that send no message for this long count as hanging, even if they compute


class WorkFailed(Exception):
    """A task raised OSError or RuntimeError; the text is that of the error."""


class _Silence:
    """How long the workers have sent nothing, and whether they use the CPU."""

    def __init__(self):
        self._message = self._busy = time.monotonic()
        self._ticks = 0

    def end(self) -> None:
        self._message = self._busy = time.monotonic()

    def check(self, pids: Iterable[int]) -> None:
        """Raises EnvironmentFault if the silence has lasted too long."""
        now, ticks = time.monotonic(), sum(map(_cpu_ticks, pids))
        if ticks != self._ticks:
            self._ticks, self._busy = ticks, now
        if now - self._busy > IDLE_SECONDS or now - self._message > SILENT_SECONDS:
            raise EnvironmentFault(
                f"the workers have not responded for {now - self._message:.0f} s: the disk hangs, or there is too "
                "little memory for their threads; check both, or use fewer --workers, and re-run the same command"
            )


def _cpu_ticks(pid: int) -> int:
    """CPU time of a process in clock ticks; 0 if unknown."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return sum(map(int, file.read().rpartition(b")")[2].split()[11:13]))
    except (OSError, ValueError):
        return 0


@dataclasses.dataclass
class _Worker:
    process: multiprocessing.Process
    task: Any = None

    def end(self, connection: multiprocessing.connection.Connection) -> None:
        self.process.terminate()
        self.process.join(_POLL_SECONDS)  # a process that waits for a hanging disk ends when the disk answers
        connection.close()


def run(
    tasks: Iterable, work: Callable[[Any, Callable], Any], workers: int, *, keep_going: bool = False
) -> Iterator[tuple[str, Any, Any]]:
    """Runs `work(task, send)` for every task on worker processes.

    Each worker gets one task at a time, in order; the next task is taken from `tasks` when a worker is free. Tasks,
    `work` and results must be picklable.

    Args:
      keep_going: a task that fails, or whose worker crashes, is reported as LOST, and the other tasks continue. By
        default the first failure raises.

    Yields:
      (NEWS, task, x) for each call `send(x)` of a worker, (DONE, task, result) for each finished task, (LOST, task,
      reason) for each failed one, in order of arrival.

    Raises:
      WorkFailed: a task raised OSError or RuntimeError. EnvironmentFault: the machine failed, the system killed a
        worker,
      a worker hangs or, without `keep_going`, crashed. All workers end when the iterator is closed or exhausted.
    """
    context = multiprocessing.get_context("spawn")  # a fork would copy the locks of ArrayRecord's threads
    pending, pool, silence = iter(tasks), {}, _Silence()  # pool: connection -> _Worker

    def start() -> multiprocessing.connection.Connection:
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, work), daemon=True)
        with interrupts.not_for_children():
            process.start()
        theirs.close()  # otherwise the pipe would stay open after the worker's death
        pool[ours] = _Worker(process)
        return ours

    def assign(connection: multiprocessing.connection.Connection, task: Any) -> None:
        pool[connection].task = task
        with contextlib.suppress(ConnectionError):  # the worker has just died: receiving from it will show that
            connection.send(task)

    try:
        first = list(itertools.islice(pending, workers))
        # sending blocks until a worker is up
        for connection, task in zip([start() for _ in first], first, strict=True):
            assign(connection, task)
        while pool:
            ready = multiprocessing.connection.wait(list(pool), _POLL_SECONDS)
            silence.end() if ready else silence.check(worker.process.pid for worker in pool.values())
            for connection in ready:
                task = pool[connection].task
                try:
                    kind, content = connection.recv()
                except (EOFError, ConnectionError):
                    dead = pool.pop(connection)
                    dead.process.join()
                    dead.end(connection)
                    kind, content, connection = LOST, _death(dead.process.exitcode, keep_going), None
                if kind == _FAULT:
                    raise EnvironmentFault(content)
                if kind == LOST and not keep_going:
                    raise WorkFailed(content)
                if kind in (DONE, LOST):
                    following = next(pending, None)
                    if following is not None:
                        assign(connection or start(), following)
                    elif connection:
                        pool.pop(connection).end(connection)
                yield kind, task, content
    finally:
        for connection, worker in pool.items():
            worker.end(connection)


def _death(status: int, keep_going: bool) -> str:
    """How a worker ended, as text. Raises EnvironmentFault if the system killed it, or without `keep_going`."""
    if status == -signal.SIGKILL or not keep_going:  # no decoder sends SIGKILL to itself
        raise EnvironmentFault(
            "a worker process was killed or crashed, perhaps for lack of memory; re-run the same command with "
            "--workers 1"
        )
    end = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
    return f"the worker process {end}"


def _serve(connection: multiprocessing.connection.Connection, work: Callable) -> None:
    """A worker process: runs tasks until the main process ends it or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the main process decides what ends
    interrupts.signals_wanted()
    try:
        while True:
            task = connection.recv()
            try:
                result = work(task, lambda news: connection.send((NEWS, news)))
            except EnvironmentFault as error:
                connection.send((_FAULT, str(error)))
            except Exception as error:
                if isinstance(error, (ConnectionError, EOFError)):
                    raise
                fault = environment_fault(error) if passing(error) else None  # the command itself reports a full disk
                if fault is not None:
                    connection.send((_FAULT, f"a worker cannot continue: {fault}, and re-run the same command"))
                elif isinstance(error, (OSError, RuntimeError)):
                    connection.send((LOST, str(error)))
                else:
                    raise
            else:
                connection.send((DONE, result))
    except (ConnectionError, EOFError):
        return  # the main process was killed; the next run removes files left under temporary names
