"""Profiler traces of selected steps of a run, for TensorBoard or Perfetto."""

import os
from typing import Any

import jax

from pera_jax.common.errors import UserError
from pera_jax.parallel import distributed


def parse_range(text: str | None, start: int, total: int) -> tuple[int, int] | None:
    """Parses "20:25" into (20, 25), the first and the last step to trace, numbered as in the log; None for None.

    Args:
      start: number of steps done before. total: the last step.

    Raises:
      UserError: another format, or steps outside of this run.
    """
    if text is None:
        return None
    first, _, last = text.partition(":")
    if not (first.isdigit() and last.isdigit()) or int(first) > int(last):
        raise UserError(f"--profile={text} is invalid; expected FIRST:LAST, such as 20:25")
    if int(first) <= start or int(last) > total:
        raise UserError(f"--profile={text} is out of range; expected steps within {start + 1} to {total}")
    return int(first), int(last)


class Profile:
    """Writes a trace of a range of steps to WORKDIR/profile, on process 0 only."""

    def __init__(self, steps: tuple[int, int] | None, workdir: str):
        self._first, self._last = steps if steps and distributed.main_host() else (0, 0)
        self._folder = os.path.join(workdir, "profile")
        self._running = False

    def before(self, step: int, state: Any) -> None:
        """Call it before `step` is dispatched with `state`."""
        if step == self._first:
            jax.block_until_ready(state)  # so that the trace holds nothing of earlier steps
            jax.profiler.start_trace(self._folder)
            self._running = True

    def after(self, step: int, state: Any) -> None:
        """Call it after `step`, whose result is `state`, was dispatched."""
        if step == self._last:
            jax.block_until_ready(state)
            self.close()

    def close(self) -> None:
        """Stops the trace, if one is running."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
