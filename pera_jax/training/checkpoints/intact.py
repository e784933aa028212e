"""Whether what is read from a checkpoint is what was saved, and why not: damage, removal, or the machine that reads.

At a save the digests of the arrays (`common.digests`), of the data position and of the `meta` itself are written into the
`meta`, as its entry `digests`. A checkpoint of format version 2 has none; of its arrays only shapes and NaN are checked.
"""

import contextlib
import gc
import inspect
import logging
import pathlib
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import ml_dtypes  # noqa: F401  NumPy knows bfloat16 by its name with it
import numpy as np

from pera_jax.common import digests, json_files
from pera_jax.common.environment import EnvironmentFault, environment_fault, patiently
from pera_jax.common.errors import Misfit, UserError
from pera_jax.common.text import every, first_line, several
from pera_jax.config.renamed import migrated
from pera_jax.parallel import distributed
from pera_jax.parallel.sharding import path_of
from pera_jax.training.checkpoints import meta_fields, ocp

T = TypeVar("T")

ENTRY = "digests"
FORMAT_VERSION = 4
_WITHOUT_DIGESTS = 2  # the last version without
_READ = (2, 3, 4)
_ARRAYS = ("state", "teacher")
_LATE_SECONDS = 0.1
_EMPTY_SECONDS = 1.0  # that a folder which is being removed is there without a file, at most


class Damaged(UserError):
    """A checkpoint that cannot be read, or that holds other values than were saved; the one before it may be whole."""


class Removed(UserError):
    """A checkpoint that was removed while it was read, as training does with old ones."""


# ---------------------------------------------------------------- at the save


def sealed(items: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's items with their digests in `meta`. Waits for the arrays; with several hosts all must call it."""
    found = {name: _text(digests.leaf_digests(items[name])) for name in _ARRAYS if name in items}
    meta = items["meta"] | {ENTRY: found | {"data": digests.json_digest(items["data"])}}
    meta[ENTRY]["meta"] = digests.json_digest(meta)  # of all that is there by now
    return items | {"meta": meta}


def _text(found: dict[str, str]) -> str:
    return "\n".join(f"{path} {digest}" for path, digest in found.items())


# ---------------------------------------------------------------- at the reading


def read(folder: pathlib.Path, load: Callable[[], T]) -> T:
    """What `load` gives of a checkpoint's folder.

    Raises:
      EnvironmentFault: the machine could not do it, several times: no damage, nothing is to be moved away.
      Removed: the folder has lost files meanwhile.
      Damaged: `load` failed in another way; Orbax raises many kinds of errors on files that are missing, cut or changed.
    """
    before = files_of(folder)
    what = f"the checkpoint {folder} cannot be read"
    try:
        # Several hosts would not try again together.
        with _without_tracebacks():
            found = patiently(load, what) if jax.process_count() == 1 else load()
    except UserError:
        raise
    except Exception as error:
        fault = environment_fault(error)
        if fault:
            raise EnvironmentFault(f"{what}: {fault}, and start again; the data are not damaged") from error
        if isinstance(error, jax.errors.JaxRuntimeError):  # another host is lost
            raise
        if not kept(folder, before):
            raise Removed(f"the checkpoint {folder} was removed while it was read; take a later one") from error
        if not before:
            raise Damaged(f"{what}: the folder is empty") from error
        raise Damaged(f"{what}: {first_line(error)}") from error
    if not kept(folder, before):
        raise Removed(f"the checkpoint {folder} was removed while it was read; take a later one")
    return found


@contextlib.contextmanager
def _without_tracebacks() -> Iterator[None]:
    """Keeps what Orbax's other tasks and TensorStore's threads print after the first error of a load off the terminal."""
    logs, hook = [logging.getLogger(name) for name in ("asyncio", "absl")], sys.unraisablehook
    levels = [log.level for log in logs]

    def without_late_answers(raised):
        closed = isinstance(raised.exc_value, RuntimeError) and str(raised.exc_value) == "Event loop is closed"
        if not (closed or inspect.iscoroutine(raised.object)):  # the others of a load whose first error is told
            hook(raised)

    for log in logs:
        log.setLevel(logging.CRITICAL + 1)
    sys.unraisablehook = without_late_answers
    try:
        yield
    except Exception:
        time.sleep(_LATE_SECONDS)  # for the threads that still read
        warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)  # those that Orbax gives up
        gc.collect()  # what became of a task that nobody waits for is logged when it goes
        raise
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)
        sys.unraisablehook = hook


def files_of(folder: pathlib.Path) -> set[pathlib.Path]:
    """What lies in a folder, at any depth; nothing where it is gone."""
    try:
        return set(folder.rglob("*"))
    except FileNotFoundError:
        return set()


def kept(folder: pathlib.Path, before: set[pathlib.Path]) -> bool:
    """Whether a folder has lost nothing since it held `before`, as it does in a removal, file by file and itself at last."""
    if not before:
        time.sleep(_EMPTY_SECONDS)
    return folder.is_dir() and files_of(folder) >= before


def agreed(load: Callable[[], T]) -> T:
    """What `load` gives, on every host or on none: raises Damaged or UserError on all hosts where it does on one."""
    found = error = None
    try:
        found = load()
    except UserError as wrong:
        error = wrong
    kind = distributed.max_over_hosts(0 if error is None else 1 if isinstance(error, Damaged) else 2)
    if kind == 1:
        raise error or Damaged("the checkpoint cannot be read on another host")
    if kind == 2:
        raise error if error and not isinstance(error, Damaged) else UserError("another host failed; see its own error message")
    return found


def load_meta(folder: pathlib.Path) -> dict[str, Any]:
    """The `meta` of a checkpoint's folder, as it was saved.

    Raises:
      UserError: a checkpoint of another format version.
      Damaged: one that cannot be read, or whose `meta` is not what was saved.
    """
    return meta_of(folder)[0]


def meta_of(folder: pathlib.Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The `meta`, and the digests of a checkpoint that has some."""
    stored = read(folder, lambda: ocp.load_checkpointables(folder, {"meta": None})["meta"])
    meta, found = _unsealed(folder, stored)
    step = meta.get("step")
    if step is not None and folder.name != str(step):  # a folder that was renamed, or took the place of another
        raise Damaged(f"the checkpoint {folder} is not of step {folder.name}: it was saved at step {step}")
    return meta, found


def _unsealed(folder: pathlib.Path, stored: Any) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """A stored `meta` as (what was handed to `sealed`, digests or None for a checkpoint that was written without).

    Raises:
      Damaged: a `meta` that is not as it was written.
      UserError: of a format version that this program does not read.
    """
    if not isinstance(stored, dict) or not isinstance(stored.get("format_version"), int):
        raise Damaged(f"the checkpoint {folder} cannot be read: its meta has no format version")
    version, meta = stored["format_version"], {name: value for name, value in stored.items() if name != ENTRY}
    found = stored.get(ENTRY)
    if isinstance(found, dict):
        others = {name: value for name, value in found.items() if name != "meta"}
        if found.get("meta") != digests.json_digest(meta | {ENTRY: others}):
            raise Damaged(f"the checkpoint {folder} is damaged: its meta is not what was saved")
    elif found is not None or version > _WITHOUT_DIGESTS:
        raise Damaged(f"the checkpoint {folder} is damaged: its meta has lost its digests")
    if version not in _READ:
        raise UserError(
            f"the checkpoint {folder} has format version {version}, this program reads {', '.join(map(str, _READ))}; use the "
            "version of the program that wrote it"
        )
    if isinstance(meta.get("config"), dict):
        meta |= {"config": migrated(meta["config"])}
    try:
        meta_fields.check_meta(meta)
    except json_files.Invalid as error:
        if found is not None:  # it is what was saved
            raise UserError(f"the checkpoint {folder} does not fit this program: in its meta, {error}") from error
        raise Damaged(f"the checkpoint {folder} is damaged: in its meta, {error}") from error
    return meta, found


def saved_shapes(found: dict[str, Any], name: str) -> dict[str, jax.ShapeDtypeStruct]:
    """Each leaf of an item by its path, "a/b/c", as it was saved."""
    result = {}
    for path, (described, _) in _parsed(found, name).items():
        dtype, _, sides = described.rstrip("]").partition("[")
        result[path] = jax.ShapeDtypeStruct([int(side) for side in sides.split(",") if side], np.dtype(dtype))
    return result


def check_shapes(folder: pathlib.Path, stored: Any, wanted: Any) -> None:
    """Raises UserError where leaves are missing, too many or of another shape than the `wanted` ones."""
    differing = differences(stored, wanted)
    if differing:
        raise Misfit(f"the checkpoint {folder} does not fit this config: {every(differing)}")


def shapes_of(tree: Any) -> dict[str, tuple[int, ...]]:
    """The shape of each leaf of a tree by its path, "a/b/c"."""
    return {path_of(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def differences(found: Any, wanted: Any) -> list[str]:
    """What is another, missing or too much among the paths and shapes of two trees, a line each."""

    there, here = shapes_of(found), shapes_of(wanted)
    return [
        f"{path} is {there.get(path, 'absent')} there and {here.get(path, 'absent')} here"
        for path in sorted(there.keys() | here.keys())
        if there.get(path) != here.get(path)
    ]


def check_json(folder: pathlib.Path, name: str, value: Any, found: dict[str, Any] | None) -> None:
    """Raises Damaged where an item of JSON is not what was saved."""
    if found is not None and found.get(name) != digests.json_digest(value):
        raise Damaged(f"the checkpoint {folder} is damaged: its {name} is not what was saved")


def check_arrays(folder: pathlib.Path, name: str, tree: Any, found: dict[str, Any] | None) -> None:
    """Compares an item's arrays, or some of them under their own paths, with what was saved.

    With several hosts all must call it where the arrays are spread over them.

    Raises:
      Damaged: leaves with other values, or, without digests, with values that are not finite; names some of them.
      UserError: leaves of another dtype or shape than were saved.
    """
    if found is None:
        wrong = digests.not_finite(tree)
        if wrong:
            raise Damaged(
                f"the checkpoint {folder} is damaged: {several(wrong)} of its {name} hold(s) values that are not finite"
            )
        return
    saved, now = _parsed(found, name), {path: tuple(each.split(" ")) for path, each in digests.leaf_digests(tree).items()}
    other = [f"{path} is {saved.get(path, ('absent',))[0]} there and {each[0]} here" for path, each in now.items()
             if saved.get(path, ("",))[0] != each[0]]  # fmt: skip
    if other:  # the program has changed, not the checkpoint
        raise Misfit(f"the checkpoint {folder} does not fit this program: {every(other)}")
    wrong = [path for path, each in now.items() if each != saved[path]]
    if wrong:
        raise Damaged(
            f"the checkpoint {folder} is damaged: {several(wrong)} of its {name} do(es) not hold the values that were saved"
        )


def _parsed(found: dict[str, Any], name: str) -> dict[str, tuple[str, str]]:
    lines = (line.rsplit(" ", 2) for line in str(found.get(name, "")).splitlines())
    return {line[0]: (line[1], line[2]) for line in lines if len(line) == 3}
