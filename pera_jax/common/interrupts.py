"""Ctrl-C and SIGTERM: a clean end of a command at any moment, also while modules are imported or C++ compiles.

Python hands a signal to the main thread between two of its own instructions, which may be minutes away in a compiler, and
as an exception that whatever calls back into Python may swallow. Here the end of a process does not depend on that.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

_LONGEST = 3.0  # seconds that a process which ends at once may take for what still must be done
_starting = threading.Lock()  # held while child processes are started
_before_end: list[Callable[[], None]] = []  # what still must be done by a process that ends at once


@contextlib.contextmanager
def before_end(action: Callable[[], None]) -> Iterator[None]:
    """While entered, `action` is called by whatever ends the process at once; it must not wait for the main thread."""
    _before_end.append(action)
    try:
        yield
    finally:
        _before_end.remove(action)


def end_at_once(number: int, text: str) -> None:
    """Says `text` on stderr and ends the process with status 128 + `number`, of a signal, without tidying up."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    os.write(2, f"{text}\n".encode())
    _starting.acquire(timeout=_LONGEST)  # a child that has not got all it needs would print a traceback
    helper = threading.Thread(target=_run, args=(list(reversed(_before_end)),), daemon=True)
    helper.start()
    helper.join(_LONGEST)
    os._exit(128 + number)


def _run(actions: list[Callable[[], None]]) -> None:
    for action in actions:
        with contextlib.suppress(Exception):
            action()


@contextlib.contextmanager
def not_for_children() -> Iterator[None]:
    """Processes that are started by this thread meanwhile do not get SIGINT and SIGTERM, which go to a whole group of
    processes, until `signals_wanted`: they could do nothing but print a traceback while they import."""
    with _starting:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def signals_wanted() -> None:
    """Ends what `not_for_children` has done to this process, once it has said what is to become of signals."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM))


def guard_imports() -> None:
    """Until `imported` Ctrl-C ends this process at once: there is nothing to tidy up, and a traceback would help nobody.

    Does nothing but for a command, `pera-jax ...` or `python -m ...`: programs that import the package have handlers of their own.
    """
    alone = threading.current_thread() is threading.main_thread()
    command = sys.argv[:1] == ["-m"] or os.path.basename("".join(sys.argv[:1])) == "pera-jax"
    if command and alone and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def imported() -> None:
    """From here on Ctrl-C is a KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(number, frame) -> None:
    end_at_once(number, "error: interrupted")


class StopSignal:
    """While entered, SIGTERM and Ctrl-C ask a command for an end that loses nothing.

    Before there is anything to save (`saving` says when there is) it ends at once with status 128 + the signal's number.
    Later the first signal asks for an end after the step under way, and says so; Ctrl-C after that ends the process at
    once. SIGTERM does not: supervisors send it twice. A thread does all this, so that it does not wait for the main one.
    """

    ends_process = True

    def __init__(self):
        self.asked: str | None = None
        self.several_hosts = False  # they stop together, which is no matter of this class; here Ctrl-C just ends one
        self._saves = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopSignal":
        self._read, write = os.pipe()
        os.set_blocking(write, False)
        self._write = write
        self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
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
        """A forked child would write its own signals into this process's pipe."""
        signal.set_wakeup_fd(-1)

    def saving(self) -> None:
        """From here on there is something to save."""
        self._saves = True

    def reached(self, step: int) -> bool:
        """Whether to end after `step`."""
        return self.asked is not None

    def _listen(self) -> None:
        while number := os.read(self._read, 1)[0]:
            if number in self._before:
                self._received(number)

    def _received(self, number: int) -> None:
        name = signal.Signals(number).name
        if not self._saves:
            lost = "nothing is lost" if not self.several_hosts else "the same command goes on from the newest checkpoint"
            end_at_once(number, f"error: interrupted by {name}; {lost}")
        elif self.asked is None:
            self.asked = name
            again = "; again to stop at once" if number == signal.SIGINT else ""
            os.write(2, f"{name}: saving after this step{again}\n".encode())
        elif number == signal.SIGINT:
            end_at_once(
                number, "error: stopped at once; the same command goes on from the newest checkpoint"
            )

    def _handle(self, number, frame) -> None:
        """Nothing: the thread has the number from the pipe."""


class StopInCall:
    """What `StopSignal` is to a command, for a call in a program or a notebook, whose process it never ends.

    Before there is anything to save SIGTERM and Ctrl-C raise KeyboardInterrupt. Later the first one asks for an end after
    the step under way, and says so; Ctrl-C after that raises KeyboardInterrupt. The program's own handlers are back at the
    end. Only the main thread gets signals: in another one nothing is changed.
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
        """From here on there is something to save."""
        self._saves = True

    def reached(self, step: int) -> bool:
        """Whether to end after `step`."""
        return self.asked is not None

    def _handle(self, number, frame) -> None:
        if not self._saves or (self.asked and number == signal.SIGINT):
            raise KeyboardInterrupt
        if self.asked is None:
            self.asked = signal.Signals(number).name
            print(f"{self.asked}: saving after this step; Ctrl-C to stop at once", file=sys.stderr, flush=True)
