"""Ctrl-C, SIGTERM and SIGHUP: a command ends cleanly at any time, even during imports or while C++ code compiles.

Python handles a signal in the main thread between two bytecode instructions, which may take minutes in a compiler, and
as an exception that a callback may swallow. The functions here do not depend on that.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # SIGHUP: the terminal is closed or its connection lost
_LONGEST = 3.0  # time limit in seconds for the actions of `before_end`
_starting = threading.Lock()  # held while child processes start
_before_end: list[Callable[[], None]] = []  # what to do before the process ends immediately


@contextlib.contextmanager
def before_end(action: Callable[[], None]) -> Iterator[None]:
    """Context in which `end_at_once` calls `action` first; `action` must not wait for the main thread."""
    _before_end.append(action)
    try:
        yield
    finally:
        _before_end.remove(action)


def end_at_once(number: int, text: str) -> None:
    """Writes `text` to stderr and ends the process with status 128 + `number` (a signal number), without cleanup."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    _say(text)
    _starting.acquire(timeout=_LONGEST)  # a half-started child would print a traceback
    helper = threading.Thread(target=_run, args=(list(reversed(_before_end)),), daemon=True)
    helper.start()
    helper.join(_LONGEST)
    os._exit(128 + number)


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # a closed terminal
        os.write(2, f"{text}\n".encode())


def _run(actions: list[Callable[[], None]]) -> None:
    for action in actions:
        with contextlib.suppress(Exception):
            action()


@contextlib.contextmanager
def not_for_children() -> Iterator[None]:
    """Blocks `STOPS` in processes that this thread starts, until they call `signals_wanted`.

    These signals go to the whole process group, and a child that is still importing would print a traceback."""
    with _starting:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def signals_wanted() -> None:
    """Unblocks the signals blocked by `not_for_children`; call it after installing the handlers."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)


def guard_imports() -> None:
    """Until `imported` is called, Ctrl-C ends this process immediately, without a traceback.

    Only has an effect for commands, `pera-jax ...` and `python -m ...`: programs that import the package install their
    own handlers.
    """
    alone = threading.current_thread() is threading.main_thread()
    command = sys.argv[:1] == ["-m"] or os.path.basename("".join(sys.argv[:1])) == "pera-jax"
    if command and alone and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def imported() -> None:
    """Restores the default: Ctrl-C raises KeyboardInterrupt."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(number, frame) -> None:
    end_at_once(number, "error: interrupted")


class StopSignal:
    """Context in which SIGTERM, SIGHUP (unless ignored, as under nohup) and Ctrl-C ask a command to stop without loss.

    Before `saving` is called there is nothing to save, and the command ends immediately with status 128 + signal
    number. After it, the first signal requests a stop after the current step and prints a line; a second Ctrl-C ends
    the process immediately. A second SIGTERM does not: supervisors send it twice. A separate thread handles the
    signals, so they never wait for the main thread.
    """

    ends_process = True

    def __init__(self):
        self.asked: str | None = None
        self.several_hosts = False  # several hosts stop together, which is handled elsewhere
        self._saves = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopSignal":
        self._read, write = os.pipe()
        os.set_blocking(write, False)
        self._write = write
        wanted = STOPS[:2] if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else STOPS
        self._before = {number: signal.signal(number, self._handle) for number in wanted}
        self._wakeup = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=self._forget)
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.write(self._write, b"\0")  # ends the thread
        self._thread.join()
        os.close(self._write)
        os.close(self._read)

    @staticmethod
    def _forget() -> None:
        """Without this, a forked child would write its signals to this process's pipe."""
        signal.set_wakeup_fd(-1)

    def saving(self) -> None:
        """Declares that there is something to save from now on."""
        self._saves = True

    def reached(self, step: int) -> bool:
        """Whether to stop after `step`."""
        return self.asked is not None

    def _listen(self) -> None:
        while number := os.read(self._read, 1)[0]:
            if number in self._before:
                self._received(number)

    def _received(self, number: int) -> None:
        name = signal.Signals(number).name
        if not self._saves:
            lost = (
                "nothing is lost"
                if not self.several_hosts
                else "re-run the same command to resume from the newest checkpoint"
            )
            end_at_once(number, f"error: interrupted by {name}; {lost}")
        elif self.asked is None:
            self.asked = name
            if self.several_hosts and number == signal.SIGHUP:
                os.kill(os.getpid(), signal.SIGTERM)  # which reaches the other hosts
            again = "; press Ctrl-C again to stop immediately" if number == signal.SIGINT else ""
            _say(f"{name}: saving a checkpoint after this step{again}")
        elif number == signal.SIGINT:
            end_at_once(
                number, "error: stopped immediately; re-run the same command to resume from the newest checkpoint"
            )

    def _handle(self, number, frame) -> None:
        """Does nothing: the thread reads the signal number from the pipe."""


class StopInCall:
    """The counterpart of `StopSignal` for calls from a program or notebook; never ends the process.

    Before `saving` is called, SIGTERM and Ctrl-C raise KeyboardInterrupt. After it, the first signal requests a stop
    after the current step and prints a line; a second Ctrl-C raises KeyboardInterrupt. The previous handlers are
    restored at the end. Has no effect outside the main thread, which alone receives signals.
    """

    ends_process = False

    def __init__(self):
        self.asked: str | None = None
        self.several_hosts = False
        self._saves = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopInCall":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def saving(self) -> None:
        """Declares that there is something to save from now on."""
        self._saves = True

    def reached(self, step: int) -> bool:
        """Whether to stop after `step`."""
        return self.asked is not None

    def _handle(self, number, frame) -> None:
        if not self._saves or (self.asked and number == signal.SIGINT):
            raise KeyboardInterrupt
        if self.asked is None:
            self.asked = signal.Signals(number).name
            print(
                f"{self.asked}: saving a checkpoint after this step; press Ctrl-C to stop immediately",
                file=sys.stderr,
                flush=True,
            )
