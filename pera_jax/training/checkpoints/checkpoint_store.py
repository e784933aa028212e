"""Writes the checkpoints of a run that trains, in the background; keeps some and leaves nothing half written."""

import contextlib
import dataclasses
import errno
import os
import pathlib
import shutil
import time
from typing import Any

import jax

from pera_jax.common import environment, paths
from pera_jax.common.environment import EnvironmentFault
from pera_jax.common.errors import UserError
from pera_jax.common.lease import Lease
from pera_jax.common.text import first_line
from pera_jax.parallel import distributed
from pera_jax.training import step as steps
from pera_jax.training.checkpoints import checkpoint, intact, ocp

_REMOVAL_SECONDS, _QUIET_SECONDS = 20.0, 1.0  # longest wait for threads of a failed save; silence that ends it


@dataclasses.dataclass(frozen=True)
class _FirstOfEvery:
    """Orbax's policy to keep the first checkpoint at or after each multiple of `steps`, whatever steps are saved.

    What is judged is the row of checkpoints that are there. One that was removed had no multiple between itself and the
    one before it, so the row tells the same as that of all that were ever saved.
    """

    steps: int

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        multiples = [0, *(each.step // self.steps for each in checkpoints)]
        return [before < here for before, here in zip(multiples, multiples[1:])]


class Store:
    """The checkpoints of one run that trains."""

    def __init__(self, workdir: str, keep_last: int, keep_every: int, lease: Lease | None = None):
        """Opens `workdir`/checkpoints, which removes saves that were not finished.

        Args:
          keep_last, keep_every: the last `keep_last` checkpoints stay, and the first at or after each multiple of
            `keep_every` steps.
          lease: of the workdir; None for a host that does not hold it.
        """
        policies = ocp.training.preservation_policies
        self.folder = pathlib.Path(paths.local(workdir)).absolute() / checkpoint.FOLDER
        self._response, self._step = None, None  # of the save under way
        self._lease = lease
        try:
            self._checkpointer = ocp.training.Checkpointer(
                self.folder,
                # Every save that is asked for; the default policy skips one while another is under way.
                save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
                preservation_policy=policies.AnyPreservationPolicy(
                    [policies.LatestN(keep_last), _FirstOfEvery(keep_every)]
                ),
                cleanup_tmp_directories=True,
            )
        except OSError as error:
            raise UserError(f"cannot open the checkpoints in {self.folder}: {error.strerror}") from error

    def check_owned(self) -> None:
        """Raises UserError where another process has taken the workdir over."""
        if self._lease:
            self._lease.check()

    def last_good(self) -> str:
        """Which checkpoint to go on from, in words."""
        finished = checkpoint.saved_steps(self.folder.parent)
        return f"the last good checkpoint is step {finished[-1]}" if finished else "there is no checkpoint yet"

    def save(self, state: steps.TrainState, meta: dict[str, Any], data: dict[str, Any]) -> None:
        """Starts writing `state` in the background under its own step; waits for the write before it, if any.

        Raises:
          UserError: this or the previous checkpoint could not be written; names the last good one. Another process has
            taken the workdir over.
        """
        self.check_owned()
        self.wait()
        step = int(state.step)
        items = intact.sealed(checkpoint.split(state) | {"data": data, "meta": meta | {"step": step}})
        try:
            self._check_space(items)
            response = self._checkpointer.save_checkpointables_async(step, items)
        except jax.errors.JaxRuntimeError:  # another host is lost: that is no matter of the disk
            raise
        except checkpoint.WRITE_ERRORS as error:
            raise self._failed(step, error) from error
        if response is None:
            raise RuntimeError(f"Orbax skipped the checkpoint of step {step} although its policy is to save every one")
        self._response, self._step = response, step

    def _check_space(self, items: dict[str, Any]) -> None:
        """Raises OSError where the device has no room, before Orbax's threads run into it in several places at once."""
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(items) if isinstance(leaf, jax.Array))
        # The hosts must agree: one that saved alone would wait for the others.
        if distributed.any_host(shutil.disk_usage(self.folder).free < needed):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def wait(self) -> None:
        """Waits until the last save is whole. Raises UserError as `save`."""
        if self._response is None:
            return
        response, self._response = self._response, None
        try:
            response.result()
            self._checkpointer.wait()
        except jax.errors.JaxRuntimeError:
            raise
        except checkpoint.WRITE_ERRORS as error:
            raise self._failed(self._step, error) from error

    def _failed(self, step: int, error: BaseException) -> UserError:
        what = f"the checkpoint of step {step} could not be written to {self.folder}"
        fault = environment.environment_fault(error)
        if fault is None:
            return UserError(f"{what} ({first_line(error)}); {self.last_good()}: choose another workdir, then start again")
        return EnvironmentFault.from_error(error, f"{what}: {fault}, then start again; {self.last_good()}")

    def close(self) -> None:
        """Ends as `wait` does, and leaves nothing half written."""
        try:
            self.wait()
        finally:
            with contextlib.suppress(*checkpoint.WRITE_ERRORS):  # `wait` has told them
                self._checkpointer.close()
            if distributed.main_host() and not (self._lease and self._lease.lost):  # else they are another's
                _remove_half_written(self.folder)


def _remove_half_written(folder: pathlib.Path) -> None:
    """Removes what failed saves have left, until it stays away.

    A save fails with the first of its threads that fails; the others still write, and make their folders again.
    """
    deadline, since_last = time.monotonic() + _REMOVAL_SECONDS, None
    while time.monotonic() < deadline:
        halves = list(folder.glob("*.orbax-checkpoint-tmp"))
        for half in halves:
            shutil.rmtree(half, ignore_errors=True)
            since_last = time.monotonic()
        if since_last is None or time.monotonic() - since_last > _QUIET_SECONDS:
            return
        time.sleep(0.05)
