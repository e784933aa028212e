"""A trace of some steps of a run, for TensorBoard or Perfetto."""

import os
from typing import Any

import jax

from pera_jax.common.errors import UserError
from pera_jax.parallel import distributed


def parse_range(text: str | None, start: int, total: int) -> tuple[int, int] | None:
    """"20:25" -> (20, 25), the first and the last step to trace, counted as in the log; None for None.

    Args:
      start: steps done before; total: the last step.

    Raises:
      UserError: not of that form, or steps that this run will not do.
    """
    if text is None:
        return None
    first, _, last = text.partition(":")
    if not (first.isdigit() and last.isdigit()) or int(first) > int(last):
        raise UserError(f"--profile={text} is not of the form FIRST:LAST, such as 20:25")
    if int(first) <= start or int(last) > total:
        raise UserError(f"--profile={text} lies outside of the run, which does steps {start + 1} to {total}")
    return int(first), int(last)


class Profile:
    """Writes WORKDIR/profile when the run comes through the range of steps; process 0 only."""

    def __init__(self, steps: tuple[int, int] | None, workdir: str):
        self._first, self._last = steps if steps and distributed.main_host() else (0, 0)
        self._folder = os.path.join(workdir, "profile")
        self._running = False

    def before(self, step: int, state: Any) -> None:
        """To be called before `step` is started from `state`."""
        if step == self._first:
            jax.block_until_ready(state)  # of what is traced, nothing belongs to the steps before
            jax.profiler.start_trace(self._folder)
            self._running = True

    def after(self, step: int, state: Any) -> None:
        """To be called after `step`, which makes `state`, was started."""
        if step == self._last:
            jax.block_until_ready(state)
            self.close()

    def close(self) -> None:
        """Ends a trace that is under way."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
