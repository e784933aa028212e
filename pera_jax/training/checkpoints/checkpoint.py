"""Restores checkpoints of a run, written with Orbax by `checkpoint_store`.

RUN/checkpoints/STEP has up to four checkpointables: `state` (parameters, optimizer state, step, state of the
objective), `teacher` (weights, stored separately so that evaluation reads nothing else; absent if the method has no
teacher), `data` (the position in the stream of batches) and `meta` (model sizes, bands with their ranges, mean and std,
dataset fingerprint, git revision, resolved config). Writing a checkpoint is atomic.

With several hosts, each writes its shards to the same folder on shared storage; process 0 moves and removes folders.
"""

import dataclasses
import hashlib
import os
import pathlib
import re
import time
from collections.abc import Callable
from typing import Any, TypeVar

from pera_jax.common import paths
from pera_jax.common.errors import UserError
from pera_jax.common.text import several
from pera_jax.training import step as steps
from pera_jax.training.checkpoints import intact, ocp
from pera_jax.training.checkpoints.intact import Damaged, Removed, differences, load_meta  # noqa: F401  part of this module's API

T = TypeVar("T")

FOLDER = "checkpoints"
_STEP = re.compile(r"0|[1-9][0-9]*")  # as a folder's name
_RETRY_SECONDS = 60.0  # how long to retry if each latest checkpoint is removed while it is read
_REMOVAL_SECONDS = 0.3  # wait after a failure, so that a removal in progress becomes visible
# Orbax and TensorStore raise these on a full disk, a lost mount or missing permissions.
WRITE_ERRORS = (OSError, ValueError, RuntimeError)


def split(state: steps.TrainState) -> dict[str, Any]:
    """Splits a state into the checkpointables `state` and, if there is a teacher, `teacher`."""
    fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    teacher = fields.pop("teacher")
    return {"state": fields} | ({"teacher": teacher} if teacher else {})


def restore(
    folder: pathlib.Path, abstract: steps.TrainState, verify: bool = True
) -> tuple[steps.TrainState, dict[str, Any]]:
    """Restores the state, sharded like `abstract`, and the data position from a checkpoint's folder.

    Every process must call it. It succeeds on all of them or on none.

    Args:
      abstract: shapes, dtypes and shardings of the state.
      verify: check arrays and position against the digests.

    Raises:
      Misfit: leaves are missing, unexpected, or differ in shape.
      Damaged: the checkpoint cannot be read, or its values differ from those that were saved.
    """
    wanted = split(abstract)
    _, digests = intact.on_all_hosts(lambda: intact.load_meta_and_digests(folder))
    if digests is not None:
        intact.check_shapes(folder, {name: intact.saved_shapes(digests, name) for name in wanted}, wanted)

    def load():
        stored = ocp.checkpointables_metadata(folder).metadata
        return {name: stored[name] for name in wanted}

    def items():
        stored = intact.read(folder, load)
        if digests is None:
            intact.check_shapes(folder, stored, wanted)
        elif differences(stored, wanted):
            raise Damaged(f"the checkpoint {folder} cannot be read: arrays of its {' or '.join(wanted)} are missing")
        return intact.read(folder, lambda: ocp.load_checkpointables(folder, wanted | {"data": None}))

    found = intact.on_all_hosts(items)

    def check():
        if verify:
            intact.check_json(folder, "data", found["data"], digests)
            for name in wanted:
                intact.check_arrays(folder, name, found[name], digests)

    intact.on_all_hosts(check)
    return steps.TrainState(teacher=found.get("teacher", {}), **found["state"]), found["data"]


def set_aside(folder: pathlib.Path) -> pathlib.Path:
    """Moves a damaged checkpoint to RUN/damaged_STEP, so that its step can be saved again; returns the new folder."""
    place = folder.parent.parent / f"damaged_{folder.name}"
    while place.exists():
        place = place.with_name(place.name + "_")
    os.replace(folder, place)
    return place


def saved_steps(run: str | pathlib.Path) -> list[int]:
    """Steps of a run's complete checkpoints in ascending order; empty if the folder has none.

    Raises UserError if `run` is a URL.
    """
    folder = pathlib.Path(paths.local(run)).absolute() / FOLDER
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if _STEP.fullmatch(path.name) and path.is_dir())


def folder_of(run: str | pathlib.Path, step: int | None) -> tuple[pathlib.Path, int]:
    """The folder of a run's checkpoint `step` (None: the latest), and the step.

    Raises:
      UserError: the run or step does not exist.
    """
    finished = saved_steps(run)
    if not (pathlib.Path(run) / FOLDER).is_dir():
        raise UserError(f"{run} is not a run folder: it has no {FOLDER}/; give the --workdir of a training")
    if not finished:
        raise UserError(f"{run} has no finished checkpoint yet; wait for the first one, or give another run")
    if step is not None and step not in finished:
        raise UserError(f"{run} has no checkpoint of step {step}; choose one of {several(finished, 10)}")
    chosen = finished[-1] if step is None else step
    return pathlib.Path(run).absolute() / FOLDER / str(chosen), chosen


def identity(folder: pathlib.Path) -> str:
    """SHA-256 of Orbax's metadata of a save, with its times: differs if a step was saved again. "" if it cannot be
    read."""
    try:
        return hashlib.sha256((folder / "_CHECKPOINT_METADATA").read_bytes()).hexdigest()
    except OSError:
        return ""


def read_while_present(run: str | pathlib.Path, step: int | None, read: Callable[[int], T]) -> T:
    """Calls `read` on a checkpoint of a run that may still be training, which removes old checkpoints; returns its
    result.

    Args:
      step: None for the latest; if training removes it meanwhile, the new latest one is read instead.
      read: called with the step; everything that one call reads is from the same checkpoint.

    Raises:
      UserError: the run or step does not exist; or raised by `read`.
      Removed: the checkpoint of `step` was removed meanwhile, or that of every latest step for a minute.
    """
    end = time.monotonic() + _RETRY_SECONDS
    while True:
        folder, chosen = folder_of(run, step)
        before, found, failure = intact.list_files(folder), None, None
        try:
            found = read(chosen)
        except Exception as error:  # any type: the checkpoint may be half removed
            failure = error
            time.sleep(_REMOVAL_SECONDS)
        # Files are removed one by one: if all are still there after reading, they were there while reading.
        if intact.still_has(folder, before):
            if failure is not None:
                raise failure
            return found
        if step is not None or time.monotonic() > end:
            left = several(saved_steps(run), 5)
            raise Removed(
                f"training removed the checkpoint of step {chosen} of {run} while it was read; choose one of {left}"
            )
