"""Checkpoints of a run, by Orbax: the state, the data position, and everything that is needed to use the weights.

RUN/checkpoints/STEP holds four checkpointables: `state` (parameters, optimiser, centre, step), `teacher` (its weights,
apart, so that evaluation reads only them), `data` (the position in the stream of batches) and `meta` (model shape,
bands, their ranges, mean and std, data fingerprint, git revision, resolved config). A step's folder appears whole or not at all.

With several hosts each writes its part, into one folder that all of them see; what is moved or removed, process 0 does.
"""

import contextlib
import dataclasses
import errno
import hashlib
import os
import pathlib
import shutil
import time
from typing import Any

import jax
from ml_collections import ConfigDict
from orbax.checkpoint import v1 as ocp

from pera_jax import distributed, intact, sharding
from pera_jax import step as steps
from pera_jax.bands import Bands
from pera_jax.common import paths
from pera_jax.common.lease import Lease
from pera_jax.common.text import several
from pera_jax.errors import UserError
from pera_jax.intact import Damaged, Removed  # noqa: F401  of what is read here
from pera_jax.objectives import pera

FOLDER = "checkpoints"
# What a full disk, a lost mount or a denied write look like: Orbax and TensorStore wrap the system's error in several.
WRITE_ERRORS = (OSError, ValueError, RuntimeError)
_REMOVAL_SECONDS, _QUIET_SECONDS = 20.0, 1.0  # longest wait for threads of a failed save; silence that ends it


@dataclasses.dataclass(frozen=True)
class _FirstOfEvery:
    """Orbax's policy to keep the first checkpoint at or after each multiple of `steps`, whatever steps are saved.

    What is judged is the row of checkpoints that are there. One that was removed had no multiple between itself and the
    one before it, so the row tells the same as that of all that were ever saved.
    """

    steps: int

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        multiples = [0, *(checkpoint.step // self.steps for checkpoint in checkpoints)]
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
        self.folder = pathlib.Path(paths.local(workdir)).absolute() / FOLDER
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
        finished = saved_steps(self.folder.parent)
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
        items = intact.sealed(split(state) | {"data": data, "meta": meta | {"step": step}})
        try:
            self._check_space(items)
            response = self._checkpointer.save_checkpointables_async(step, items)
        except jax.errors.JaxRuntimeError:  # another host is lost: that is no matter of the disk
            raise
        except WRITE_ERRORS as error:
            raise self._failed(step, error) from error
        if response is None:
            raise RuntimeError(f"Orbax skipped the checkpoint of step {step} although its policy is to save every one")
        self._response, self._step = response, step

    def _check_space(self, items: dict[str, Any]) -> None:
        """Raises OSError where the device has no room, before Orbax's threads run into it in several places at once."""
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(items) if isinstance(leaf, jax.Array))
        # The hosts must agree: one that saved alone would wait for the others.
        if distributed.anywhere(shutil.disk_usage(self.folder).free < needed):
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
        except WRITE_ERRORS as error:
            raise self._failed(self._step, error) from error

    def _failed(self, step: int, error: BaseException) -> UserError:
        full = os.strerror(errno.ENOSPC)
        reason = full if full in str(error) else (str(error).splitlines() or [type(error).__name__])[0][:200]
        return UserError(f"the checkpoint of step {step} could not be written to {self.folder} ({reason}); {self.last_good()}: "
                         "free space or choose another workdir, then start again")  # fmt: skip

    def close(self) -> None:
        """Ends as `wait` does, and leaves nothing half written."""
        try:
            self.wait()
        finally:
            with contextlib.suppress(*WRITE_ERRORS):  # `wait` has told them
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


def split(state: steps.TrainState) -> dict[str, Any]:
    """The checkpointables `state` and `teacher`."""
    fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    teacher = fields.pop("teacher")
    return {"state": fields, "teacher": teacher}


def restore(
    folder: pathlib.Path, abstract: steps.TrainState, verify: bool = True
) -> tuple[steps.TrainState, dict[str, Any]]:
    """The whole state in a checkpoint's folder, laid out as `abstract` says, and the data position.

    With several hosts all must call it, and all get it or none.

    Args:
      verify: compare arrays and position with the digests of the save.

    Raises:
      UserError: leaves that are missing, too many or of another shape.
      Damaged: an unreadable checkpoint, or one with other values than were saved.
    """
    wanted = split(abstract)
    _, digests = intact.agreed(lambda: _meta_of(folder))
    if digests is not None:
        _check_shapes(folder, {name: intact.saved_shapes(digests, name) for name in wanted}, wanted)

    def load():
        stored = ocp.checkpointables_metadata(folder).metadata
        return {name: stored[name] for name in wanted}

    def items():
        stored = intact.read(folder, load)
        if digests is None:
            _check_shapes(folder, stored, wanted)
        elif differences(stored, wanted):
            raise Damaged(f"the checkpoint {folder} cannot be read: it has lost parts of {' or '.join(wanted)}")
        return intact.read(folder, lambda: ocp.load_checkpointables(folder, wanted | {"data": None}))

    found = intact.agreed(items)

    def check():
        if verify:
            intact.check_json(folder, "data", found["data"], digests)
            for name in wanted:
                intact.check_arrays(folder, name, found[name], digests)

    intact.agreed(check)
    return steps.TrainState(teacher=found["teacher"], **found["state"]), found["data"]


def _check_shapes(folder: pathlib.Path, stored: Any, wanted: Any) -> None:
    differing = differences(stored, wanted)
    if differing:
        raise UserError(f"the checkpoint {folder} does not fit this config: {several(differing)}")


def set_aside(folder: pathlib.Path) -> pathlib.Path:
    """Moves a damaged checkpoint out of the way of the one that will be saved under its step; returns its new place."""
    place = folder.parent.parent / f"damaged_{folder.name}"
    while place.exists():
        place = place.with_name(place.name + "_")
    os.replace(folder, place)
    return place


def saved_steps(run: str | pathlib.Path) -> list[int]:
    """The finished steps of a run, ascending; none where there is no run. Raises UserError for an address."""
    folder = pathlib.Path(paths.local(run)).absolute() / FOLDER
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


def folder_of(run: str | pathlib.Path, step: int | None) -> tuple[pathlib.Path, int]:
    """The folder of a run's checkpoint `step` (None: the latest), and the step.

    Raises:
      UserError: no such run or step.
    """
    finished = saved_steps(run)
    if not (pathlib.Path(run) / FOLDER).is_dir():
        raise UserError(f"{run} is not the folder of a run: it holds no {FOLDER}/")
    if not finished:
        raise UserError(f"{run} holds no finished checkpoint yet")
    if step is not None and step not in finished:
        raise UserError(f"{run} has no checkpoint of step {step}; there are {', '.join(map(str, finished))}")
    chosen = finished[-1] if step is None else step
    return pathlib.Path(run).absolute() / FOLDER / str(chosen), chosen


def identity(folder: pathlib.Path) -> str:
    """SHA-256 of what Orbax notes of a save, its times among it: differs where a step was saved again. "" without."""
    try:
        return hashlib.sha256((folder / "_CHECKPOINT_METADATA").read_bytes()).hexdigest()
    except OSError:
        return ""


def load_meta(folder: pathlib.Path) -> dict[str, Any]:
    """The `meta` of a checkpoint's folder, as it was saved.

    Raises:
      UserError: a checkpoint of another format version.
      Damaged: one that cannot be read, or whose `meta` is not what was saved.
    """
    return _meta_of(folder)[0]


def _meta_of(folder: pathlib.Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The `meta`, and the digests of a checkpoint that has some."""
    stored = intact.read(folder, lambda: ocp.load_checkpointables(folder, {"meta": None})["meta"])
    return intact.unsealed(folder, stored)


@dataclasses.dataclass(frozen=True)
class Weights:
    """One network of a checkpoint and what is needed to use it."""

    params: dict[str, Any]  # with `backbone` and the heads the network has
    meta: dict[str, Any]
    step: int

    @property
    def backbone(self) -> dict[str, Any]:
        return self.params["backbone"]


def objective_of(meta: dict[str, Any]) -> pera.PerA:
    """The objective that a checkpoint was trained with."""
    config = ConfigDict(meta["config"])
    config.model.attention = "auto"  # the machine that reads it need not have the kernels of the one that trained
    return pera.from_config(config, Bands.of(meta))


def load_weights(
    run: str | pathlib.Path, step: int | None = None, which: str = "teacher", untrained: bool = False, verify: bool = True
) -> Weights:
    """The weights of a run, on the first device, without its config's file.

    Args:
      which: "teacher" or "student".
      untrained: the network as it was before the first step, made again from the stored seed.
      verify: compare the arrays with the digests of the save.

    Raises:
      UserError: no such run or step, another format version, an import without a student.
      Damaged: an unreadable checkpoint, or one with other values than were saved.
      Removed: training removed it meanwhile.
    """
    folder, chosen = folder_of(run, step)
    meta, digests = _meta_of(folder)
    if which == "student" and backbone_alone(meta):
        raise UserError(f"{run} holds the teacher's backbone alone, and no student")
    objective = objective_of(meta)
    optimiser = steps.make_optimiser(ConfigDict(meta["config"]).optimiser)
    if untrained:

        def born():  # the rest of the state is never made: it is several times as large
            state = steps.new_state(objective, optimiser, meta["config"]["seed"])
            return state.teacher if which == "teacher" else state.params

        return Weights(jax.jit(born)(), meta, 0)
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    abstract = jax.eval_shape(lambda: steps.new_state(objective, optimiser, 0))
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), abstract)
    name, alone = "teacher" if which == "teacher" else "state", backbone_alone(meta)
    wanted = split(abstract)[name]
    wanted = {"backbone": wanted["backbone"]} if alone else wanted
    loaded = intact.read(folder, lambda: ocp.load_checkpointables(folder, {name: wanted})[name])
    params = loaded if which == "teacher" else loaded["params"]
    if verify:
        intact.check_arrays(folder, name, params if which == "teacher" else {"params": params}, digests)
    return Weights(params, meta, chosen)


def backbone_alone(meta: dict[str, Any]) -> bool:
    """Whether a checkpoint is an import that holds a teacher's backbone and nothing else."""
    return meta.get("imported", {}).get("backbone_alone", False)


def differences(found: Any, wanted: Any) -> list[str]:
    """What is another, missing or too much among the paths and shapes of two trees, a line each."""

    def shapes(tree):
        leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
        return {sharding.path_of(path): tuple(leaf.shape) for path, leaf in leaves}

    there, here = shapes(found), shapes(wanted)
    return [
        f"{path} is {there.get(path, 'absent')} there and {here.get(path, 'absent')} here"
        for path in sorted(there.keys() | here.keys())
        if there.get(path) != here.get(path)
    ]
