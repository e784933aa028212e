"""Coordination between the processes of a run: barriers, reductions, a shared stop, and how a process exits on an
error.

Every host runs the same command and computes the same steps. Process 0 alone writes metrics and messages; all processes
write the checkpoints, into one folder that every host sees.
"""

import contextlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from pera_jax.common.errors import CRASH, TRY_AGAIN, UserError
from pera_jax.common.progress import write
from pera_jax.common.text import first_line, printable

_EXIT_DELAY = 2.0  # seconds before process 0 exits: it runs the coordinator, whose end cuts off the other processes


def main_host() -> bool:
    """Whether this is process 0, which writes metrics and messages."""
    return jax.process_index() == 0


def say(text: str) -> None:
    """Prints one line on stderr, on process 0 only; unprintable characters in `text` are escaped."""
    if main_host():
        write(sys.stderr, printable(text, limit=2000) + "\n")


def barrier(name: str) -> None:
    """Waits until every host has reached the barrier `name`."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def any_host(flag: bool) -> bool:
    """Whether `flag` is true on any host. Every host must call it."""
    return bool(flag) if jax.process_count() == 1 else bool(np.any(multihost_utils.process_allgather(np.bool_(flag))))


def max_over_hosts(value: int) -> int:
    """The maximum of `value` over all hosts. Every host must call it."""
    return value if jax.process_count() == 1 else int(np.max(multihost_utils.process_allgather(np.int64(value))))


def broadcast_from_main(value: int) -> int:
    """The `value` of process 0. Every host must call it."""
    return value if jax.process_count() == 1 else int(multihost_utils.broadcast_one_to_all(np.int64(value)))


def raise_on_all_hosts(error: Exception | None) -> None:
    """Raises on all hosts if any host has an error: its own error, or one saying that another host failed.

    Every host must call it: if one host exited alone, the others would wait for it.
    """
    if any_host(error is not None):
        raise error or UserError("another host failed; see its own error message")


def on_main_host(function: Callable[[], None]) -> None:
    """Calls `function` on process 0 while the others wait. If it raises, all hosts raise."""
    failure = None
    if main_host():
        try:
            function()
        except Exception as error:
            failure = error
    raise_on_all_hosts(failure)


def check_equal(value: int, message: str) -> None:
    """Raises UserError(message) on every host if `value` differs between hosts. Every host must call it."""
    if jax.process_count() > 1 and np.unique(multihost_utils.process_allgather(np.int64(value))).size > 1:
        raise UserError(message)


class SharedStop:
    """Stops all hosts after the same step when any of them receives SIGTERM, which JAX handles."""

    asked = None

    def reached(self, step: int) -> bool:
        """Whether to stop after `step`. Every host must call it after every step."""
        if multihost_utils.reached_preemption_sync_point(step):
            self.asked = "SIGTERM"
        return self.asked is not None


@contextlib.contextmanager
def exit_on_error() -> Iterator[None]:
    """With several hosts, an exception exits this process at once, with one sentence if possible and a status of
    `errors`.

    Nothing is cleaned up: cleanup that waits for the other hosts could wait forever, while they wait for this one.
    """
    try:
        yield
    except BaseException as error:
        if jax.process_count() == 1:
            raise
        status = CRASH
        if isinstance(error, UserError):
            status = error.status
            print(f"error: {error}", file=sys.stderr)
        elif isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            status = TRY_AGAIN
            reason = first_line(error)
            print(
                f"error: process {jax.process_index()} of {jax.process_count()} lost contact with the other processes, "
                f"one of which has probably failed ({reason}); re-run the same command on all hosts to resume",
                file=sys.stderr,
            )
        elif isinstance(error, KeyboardInterrupt):
            status = 128 + signal.SIGINT
            print("error: interrupted", file=sys.stderr)
        elif not isinstance(error, SystemExit):
            traceback.print_exc()
        sys.stderr.flush()
        if main_host():
            time.sleep(_EXIT_DELAY)
        os._exit(status)
