"""Progress of counted loops on stderr: count, rate, time left."""

import collections
import contextlib
import errno
import os
import shutil
import sys
import time
from collections.abc import Callable
from typing import TextIO

from pera_jax.common.text import printable

_PIPED_INTERVAL = 10.0  # seconds between lines if stderr is not a terminal
_LIVE_INTERVAL = 0.1
_RATE_WINDOW = 30.0  # window of the rate in seconds


class Progress:
    """Progress of a loop with a known number of items: count, rate, time left.

        with Progress(len(paths), "images", "convert") as progress:
            for path in paths:
                ...
                progress.update()

    shows `convert: 1,200/5,000 images  24%  310/s  ETA 0:12` on stderr: a live line on a terminal, else a plain line
    every ten seconds; and finally a line with the count, the elapsed time and the mean rate.
    The rate is over the last half minute, so that the time left adapts to changes of speed.
    """

    def __init__(
        self,
        total: int,
        unit: str,
        label: str,
        *,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """`clock` returns seconds; `stream` defaults to stderr."""
        self._total, self._unit, self._label, self._clock = total, unit, label, clock
        self._line = Line(stream)
        self._done, self._closed = 0, False
        self._began = self._shown = clock()
        self._marks = collections.deque([(self._began, 0)])  # (seconds, things done), oldest first

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def update(self, n: int = 1) -> None:
        """Adds `n` to the count."""
        self._done += n
        now = self._clock()
        if now - self._shown < (_LIVE_INTERVAL if self._line.live else _PIPED_INTERVAL):
            return
        self._shown = now
        while len(self._marks) > 1 and now - self._marks[1][0] >= _RATE_WINDOW:
            self._marks.popleft()
        began, before = self._marks[0]
        self._marks.append((now, self._done))
        rate = (self._done - before) / (now - began)
        left = f"  ETA {duration_text((self._total - self._done) / rate)}" if rate > 0 else ""
        share = 100 * self._done // self._total if self._total else 100
        self._line.show(f"{self._counted()}  {share}%  {rate_text(rate)}/s{left}")

    def close(self) -> None:
        """Shows the final line; can be called repeatedly."""
        if self._closed:
            return
        self._closed = True
        seconds = self._clock() - self._began
        rate = f", {rate_text(self._done / seconds)}/s" if seconds > 0 else ""
        self._line.show(f"{self._counted()} in {duration_text(seconds)}{rate}")
        self._line.end()

    def _counted(self) -> str:
        return f"{self._label}: {self._done:,}/{self._total:,} {self._unit}"


def write(stream: TextIO, text: str) -> None:
    """Writes and flushes `text`. Does nothing if the terminal or the pipe is gone: a job outlives its observer."""
    try:
        stream.write(text)
        stream.flush()
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.EIO):
            raise
        # Python keeps what was not written, and would fail again at the end
        with contextlib.suppress(OSError), open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())


class Line:
    """A line that is redrawn on a terminal; otherwise each text is printed as a separate line."""

    def __init__(self, stream: TextIO | None):
        self._stream = sys.stderr if stream is None else stream
        self.live = self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self._drawn = False

    def show(self, text: str) -> None:
        if self.live:
            width = shutil.get_terminal_size().columns - 1  # a full line would wrap and could not be redrawn
            write(self._stream, f"\r{text[:width]}\x1b[K")  # back to the start of the line; erase what is left of it
            self._drawn = True
        else:
            write(self._stream, text + "\n")

    def say(self, text: str) -> None:
        """Prints a permanent line."""
        self.end()
        write(self._stream, printable(text, limit=2000) + "\n")

    def end(self) -> None:
        if self._drawn:
            write(self._stream, "\n")
            self._drawn = False


def rate_text(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def duration_text(seconds: float) -> str:
    """12 -> "0:12", 3723 -> "1:02:03"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
