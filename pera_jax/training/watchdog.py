"""Ends a process in which nothing moves any more, after it has said where each of its threads stands."""

import faulthandler
import os
import signal
import sys
import threading
import time

_SENTENCE_FIRST = 1.0  # seconds between the sentence and the stacks
_LAST_RESORT = 11.0  # seconds between the sentence and an end with status 1, where nothing else has ended the process


class Watchdog:
    """While entered, ends the process by SIGALRM (status 142 in a shell) when `fed` is not called for so many seconds.

    Every thread's Python stack goes to stderr before. That and the end are done by the system's timer and a handler in C,
    which also run when Python cannot, because a call into a library hangs and keeps the interpreter.
    """

    def __init__(self, seconds: float):
        """`seconds`: 0 for never."""
        self._seconds = seconds
        self._deadline = 0.0
        self._ended = threading.Event()

    def __enter__(self) -> "Watchdog":
        if self._seconds > 0:
            # Prints the stacks, then does what the signal does by default: it ends the process.
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
            # The first process of a container is not ended by a signal that it does not handle.
            faulthandler.dump_traceback_later(self._seconds + _LAST_RESORT, exit=True, file=sys.__stderr__)

    def _announce(self) -> None:
        while not self._ended.wait(max(self._deadline - time.monotonic(), 0.1)):
            if time.monotonic() > self._deadline:
                print(
                    f"error: nothing has moved for {self._seconds:g} s (stall_seconds): data, another host or a "
                    "device hangs; this process ends, and where each thread stands follows",
                    file=sys.__stderr__,
                    flush=True,
                )
                if not self._ended.wait((_SENTENCE_FIRST + _LAST_RESORT) / 2) and time.monotonic() > self._deadline:
                    os._exit(128 + signal.SIGALRM)  # where the signal itself has ended nothing
