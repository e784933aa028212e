"""Terminates a process that makes no progress, after printing the stack of each of its threads."""

import faulthandler
import os
import signal
import sys
import threading
import time

_SENTENCE_FIRST = 1.0  # seconds between the sentence and the stacks
_LAST_RESORT = 11.0  # seconds between the sentence and an end with status 1, where nothing else has ended the process


class Watchdog:
    """While entered, terminates the process by SIGALRM (status 142 in a shell) if `reset` is not called in time.

    Every thread's Python stack is printed on stderr first. Both are done by the system's timer and a handler in C,
    which also work when Python does not run because a call into a library hangs and holds the interpreter's lock.
    """

    def __init__(self, seconds: float):
        """`seconds`: the timeout; 0 disables the watchdog."""
        self._seconds = seconds
        self._deadline = 0.0
        self._ended = threading.Event()

    def __enter__(self) -> "Watchdog":
        if self._seconds > 0:
            # Prints the stacks, then takes the signal's default action: it terminates the process.
            faulthandler.register(signal.SIGALRM, file=sys.__stderr__, all_threads=True, chain=True)
            self.reset()
            threading.Thread(target=self._announce, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._ended.set()
        if self._seconds > 0:
            signal.setitimer(signal.ITIMER_REAL, 0)
            faulthandler.unregister(signal.SIGALRM)
            faulthandler.cancel_dump_traceback_later()

    def reset(self) -> None:
        """Restarts the countdown; call it whenever the run has made progress."""
        if self._seconds > 0:
            self._deadline = time.monotonic() + self._seconds
            signal.setitimer(signal.ITIMER_REAL, self._seconds + _SENTENCE_FIRST)
            # A fallback: the first process of a container ignores signals that it does not handle.
            faulthandler.dump_traceback_later(self._seconds + _LAST_RESORT, exit=True, file=sys.__stderr__)

    def _announce(self) -> None:
        while not self._ended.wait(max(self._deadline - time.monotonic(), 0.1)):
            if time.monotonic() > self._deadline:
                print(
                    f"error: no progress for {self._seconds:g} s (stall_seconds): data loading, another host or a "
                    "device hangs; the stack of each thread follows, then this process exits; re-run the same command "
                    "to resume",
                    file=sys.__stderr__,
                    flush=True,
                )
                if not self._ended.wait((_SENTENCE_FIRST + _LAST_RESORT) / 2) and time.monotonic() > self._deadline:
                    os._exit(128 + signal.SIGALRM)  # where the signal itself has ended nothing
