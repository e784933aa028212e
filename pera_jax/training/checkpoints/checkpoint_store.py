"""Writes the checkpoints of a training in the background, removes old ones, and cleans up after failed saves."""

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

# Orbax lets the replicas of a leaf write a share each. Below this size a share costs more than it saves: a bias on 256
# devices would be 256 writes.
_SMALLEST_SHARE = 2**20  # bytes
_CLEANUP_SECONDS, _QUIET_SECONDS = 20.0, 1.0  # longest wait for the threads of a failed save; pause that ends it


@dataclasses.dataclass(frozen=True)
class _FirstOfEvery:
    """An Orbax preservation policy: keeps the first checkpoint at or after each multiple of `steps`.

    It sees only the checkpoints that still exist. This gives the same result as seeing all that were ever saved,
    because there is no multiple between a removed checkpoint and the one before it.
    """

    steps: int

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        multiples = [0, *(each.step // self.steps for each in checkpoints)]
        return [before < now for before, now in zip(multiples, multiples[1:])]


class Store:
    """Writes the checkpoints of one training."""

    def __init__(self, workdir: str, keep_last: int, keep_every: int, lease: Lease | None = None):
        """Opens `workdir`/checkpoints and removes unfinished saves.

        Args:
          keep_last: number of latest checkpoints to keep.
          keep_every: also keep the first checkpoint at or after each multiple of this number of steps.
          lease: lease on the workdir; None except on the main host.

        Raises:
          UserError: the folder cannot be opened.
        """
        policies = ocp.training.preservation_policies
        context = ocp.Context()
        context.array.saving.min_slice_bytes_for_replica_parallel = _SMALLEST_SHARE
        self.folder = pathlib.Path(paths.local(workdir)).absolute() / checkpoint.FOLDER
        self._response, self._step = None, None  # of the save in progress
        self._lease = lease
        try:
            self._checkpointer = ocp.training.Checkpointer(
                self.folder,
                # The default policy skips a save while another one is in progress.
                save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
                preservation_policy=policies.AnyPreservationPolicy(
                    [policies.LatestN(keep_last), _FirstOfEvery(keep_every)]
                ),
                cleanup_tmp_directories=True,
                context=context,
            )
        except OSError as error:
            raise UserError(f"cannot open {self.folder}: {error.strerror}; choose another workdir") from error

    def check_owned(self) -> None:
        """Raises UserError if another process has taken over the workdir."""
        if self._lease:
            self._lease.check()

    def last_good(self) -> str:
        """A clause that names the last good checkpoint, for error messages."""
        finished = checkpoint.saved_steps(self.folder.parent)
        return f"the last good checkpoint is step {finished[-1]}" if finished else "there is no checkpoint yet"

    def save(self, state: steps.TrainState, meta: dict[str, Any], data: dict[str, Any]) -> None:
        """Waits for the previous save, then starts to save `state` in the background.

        Raises:
          UserError: this or the previous checkpoint could not be written (the message names the last good one), or
            another process has taken over the workdir.
        """
        self.check_owned()
        self.wait()
        step = int(state.step)
        items = intact.with_digests(checkpoint.split(state) | {"data": data, "meta": meta | {"step": step}})
        try:
            self._check_space(items)
            response = self._checkpointer.save_checkpointables_async(step, items)
        except jax.errors.JaxRuntimeError:  # another host is lost; the disk is not at fault
            raise
        except checkpoint.WRITE_ERRORS as error:
            raise self._failed(step, error) from error
        if response is None:
            raise RuntimeError(f"Orbax skipped the checkpoint of step {step} although its policy is to save every one")
        self._response, self._step = response, step

    def _check_space(self, items: dict[str, Any]) -> None:
        """Raises OSError if the disk has too little free space, before several threads of Orbax fail with it."""
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(items) if isinstance(leaf, jax.Array))
        # The hosts must agree, because one that saves alone would wait for the others.
        if distributed.any_host(shutil.disk_usage(self.folder).free < needed):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def wait(self) -> None:
        """Waits until the last save has finished. Raises UserError like `save`."""
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
            return UserError(f"{what} ({first_line(error)}); choose another workdir and re-run; {self.last_good()}")
        return EnvironmentFault.from_error(error, f"{what}: {fault}, then re-run the same command; {self.last_good()}")

    def close(self) -> None:
        """Waits like `wait`, then removes unfinished saves."""
        try:
            self.wait()
        finally:
            with contextlib.suppress(*checkpoint.WRITE_ERRORS):  # `wait` has raised them
                self._checkpointer.close()
            # otherwise another process owns the folder
            if distributed.main_host() and not (self._lease and self._lease.lost):
                _remove_unfinished(self.folder)


def _remove_unfinished(folder: pathlib.Path) -> None:
    """Removes the folders of failed saves repeatedly, until no new ones appear.

    When one thread of a save fails, the others continue to write and create their folders again.
    """
    deadline, since_last = time.monotonic() + _CLEANUP_SECONDS, None
    while time.monotonic() < deadline:
        for unfinished in list(folder.glob("*.orbax-checkpoint-tmp")):
            shutil.rmtree(unfinished, ignore_errors=True)
            since_last = time.monotonic()
        if since_last is None or time.monotonic() - since_last > _QUIET_SECONDS:
            return
        time.sleep(0.05)
