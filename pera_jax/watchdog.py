"""Ends a process in which nothing moves any more, after it has said where each of its threads stands."""

import faulthandler
import sys
import threading
import time

_SENTENCE_FIRST = 1.0  # seconds between the sentence and the stacks


class Watchdog:
    """While entered, ends the process with status 1 when `fed` is not called for so many seconds.

    Every thread's Python stack goes to stderr before. That and the end are done by a thread of the C library's kind,
    which also runs when Python cannot, because a call into a library hangs and keeps the interpreter.
    """

    def __init__(self, seconds: float):
        """`seconds`: 0 for never."""
        self._seconds = seconds
        self._deadline = 0.0
        self._ended = threading.Event()

    def __enter__(self) -> "Watchdog":
        self.fed()
        if self._seconds:
            threading.Thread(target=self._announce, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._ended.set()
        if self._seconds:
            faulthandler.cancel_dump_traceback_later()

    def fed(self) -> None:
        """Something has moved."""
        if self._seconds:
            self._deadline = time.monotonic() + self._seconds
            faulthandler.dump_traceback_later(self._seconds + _SENTENCE_FIRST, exit=True, file=sys.__stderr__)

    def _announce(self) -> None:
        while not self._ended.wait(max(self._deadline - time.monotonic(), 0.1)):
            if time.monotonic() > self._deadline:
                print(
                    f"error: no step has finished for {self._seconds:g} s (stall_seconds): data, another host or a "
                    "device hangs; this process ends, and where each thread stands follows",
                    file=sys.__stderr__,
                    flush=True,
                )
                return
