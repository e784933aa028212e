"""Checkpoints of a run, by Orbax: the state, the data position, and everything that is needed to use the weights.

RUN/checkpoints/STEP holds four checkpointables: `state` (parameters, optimizer, step, what the objective keeps
beside them), `teacher` (its weights, apart, so that evaluation reads only them; absent without a teacher), `data` (the position in the stream of batches) and `meta` (model shape,
bands, their ranges, mean and std, data fingerprint, git revision, resolved config). A step's folder appears whole or not at all.

With several hosts each writes its part, into one folder that all of them see; what is moved or removed, process 0 does.
A training writes them by `checkpoint_store`.
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
from pera_jax.training.checkpoints.intact import Damaged, Removed, differences, load_meta  # noqa: F401  of what is read here

T = TypeVar("T")

FOLDER = "checkpoints"
_STEP = re.compile(r"0|[1-9][0-9]*")  # as a folder's name
_PATIENCE = 60.0  # seconds in which one checkpoint after the other may be removed while it is read
_MOMENT = 0.3  # seconds in which a removal that is under way goes on
# What a full disk, a lost mount or a denied write look like: Orbax and TensorStore wrap the system's error in several.
WRITE_ERRORS = (OSError, ValueError, RuntimeError)


def split(state: steps.TrainState) -> dict[str, Any]:
    """The checkpointables `state` and, where there is a teacher, `teacher`."""
    fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    teacher = fields.pop("teacher")
    return {"state": fields} | ({"teacher": teacher} if teacher else {})


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
    _, digests = intact.agreed(lambda: intact.meta_of(folder))
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
            raise Damaged(f"the checkpoint {folder} cannot be read: it has lost parts of {' or '.join(wanted)}")
        return intact.read(folder, lambda: ocp.load_checkpointables(folder, wanted | {"data": None}))

    found = intact.agreed(items)

    def check():
        if verify:
            intact.check_json(folder, "data", found["data"], digests)
            for name in wanted:
                intact.check_arrays(folder, name, found[name], digests)

    intact.agreed(check)
    return steps.TrainState(teacher=found.get("teacher", {}), **found["state"]), found["data"]


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
    return sorted(int(path.name) for path in folder.iterdir() if _STEP.fullmatch(path.name) and path.is_dir())


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
        raise UserError(f"{run} has no checkpoint of step {step}; there are {several(finished, 10)}")
    chosen = finished[-1] if step is None else step
    return pathlib.Path(run).absolute() / FOLDER / str(chosen), chosen


def identity(folder: pathlib.Path) -> str:
    """SHA-256 of what Orbax notes of a save, its times among it: differs where a step was saved again. "" without."""
    try:
        return hashlib.sha256((folder / "_CHECKPOINT_METADATA").read_bytes()).hexdigest()
    except OSError:
        return ""


def while_kept(run: str | pathlib.Path, step: int | None, read: Callable[[int], T]) -> T:
    """What `read` gives for a checkpoint that stays there while it is read, beside a training that removes old ones.

    Args:
      step: None for the latest; where that is removed meanwhile, the next one that is the latest is read.
      read: takes the step; whatever is read together is of one checkpoint.

    Raises:
      UserError: no such run or step; what `read` raises.
      Removed: the checkpoint of `step` was removed meanwhile, or one after the other for a minute.
    """
    end = time.monotonic() + _PATIENCE
    while True:
        folder, chosen = folder_of(run, step)
        before, found, failure = intact.files_of(folder), None, None
        try:
            found = read(chosen)
        except Exception as error:  # what a reader raises that finds half of it
            failure = error
            time.sleep(_MOMENT)  # a removal goes on
        # Files are removed one by one: what is still there after reading was there while reading.
        if intact.kept(folder, before):
            if failure is not None:
                raise failure
            return found
        if step is not None or time.monotonic() > end:
            left = several(saved_steps(run), 5)
            raise Removed(f"training removed the checkpoint of step {chosen} of {run} while it was read; there are {left}")
