"""Verifies that a checkpoint holds what was saved, and tells damage from removal and from failures of the machine.

The digests of the arrays (`common.digests`), of the data position and of the `meta` itself are saved in the `meta`, as
its entry `digests`. A checkpoint of format version 2 has no digests; its arrays are only checked for shapes and finite
values.
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
import ml_dtypes  # noqa: F401  makes np.dtype("bfloat16") work
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
_WITHOUT_DIGESTS = 2  # the last format version without digests
_SUPPORTED = (2, 3, 4)
_ARRAYS = ("state", "teacher")
_LATE_SECONDS = 0.1  # wait for threads that still read after a failure
_EMPTY_SECONDS = 1.0  # maximum time for which a folder that is being removed exists without files


class Damaged(UserError):
    """A checkpoint that cannot be read, or whose values differ from those that were saved. Others of the run may be
    intact.

    Attributes:
      reason: the message without its fix.
    """

    def __init__(self, reason: str):
        super().__init__(f"{reason}; use another checkpoint")
        self.reason = reason


class Removed(UserError):
    """A checkpoint that training removed while it was read, because of `checkpoint.keep_last`."""


# ---------------------------------------------------------------- saving


def with_digests(items: dict[str, Any]) -> dict[str, Any]:
    """Adds the digests of a checkpoint's items to its `meta`. Waits for the arrays; every process must call it."""
    found = {name: _text(digests.leaf_digests(items[name])) for name in _ARRAYS if name in items}
    meta = items["meta"] | {ENTRY: found | {"data": digests.json_digest(items["data"])}}
    meta[ENTRY]["meta"] = digests.json_digest(meta)  # includes the digests so far
    return items | {"meta": meta}


def _text(found: dict[str, str]) -> str:
    return "\n".join(f"{path} {digest}" for path, digest in found.items())


# ---------------------------------------------------------------- loading


def read(folder: pathlib.Path, load: Callable[[], T]) -> T:
    """Calls `load`, which reads from a checkpoint's folder, and returns its result.

    Raises:
      EnvironmentFault: the machine failed repeatedly; the checkpoint is not at fault.
      Removed: files of the folder were removed meanwhile.
      Damaged: any other failure; Orbax raises many types of errors if files are missing, truncated or modified.
    """
    before = list_files(folder)
    what = f"the checkpoint {folder} cannot be read"
    try:
        # Several hosts would not retry in step with each other.
        with _without_tracebacks():
            found = patiently(load, what) if jax.process_count() == 1 else load()
    except UserError:
        raise
    except Exception as error:
        fault = environment_fault(error)
        if fault:
            raise EnvironmentFault(f"{what}: {fault}, and re-run the same command; the data is not damaged") from error
        if isinstance(error, jax.errors.JaxRuntimeError):  # another host is lost
            raise
        if not still_has(folder, before):
            raise Removed(f"the checkpoint {folder} was removed while it was read; use a later one") from error
        if not before:
            raise Damaged(f"{what}: the folder is empty") from error
        raise Damaged(f"{what}: {first_line(error)}") from error
    if not still_has(folder, before):
        raise Removed(f"the checkpoint {folder} was removed while it was read; use a later one")
    return found


@contextlib.contextmanager
def _without_tracebacks() -> Iterator[None]:
    """Suppresses what other tasks of Orbax and threads of TensorStore print after the first error of a load."""
    logs, hook = [logging.getLogger(name) for name in ("asyncio", "absl")], sys.unraisablehook
    levels = [log.level for log in logs]

    def without_late_errors(raised):
        closed = isinstance(raised.exc_value, RuntimeError) and str(raised.exc_value) == "Event loop is closed"
        if not (closed or inspect.iscoroutine(raised.object)):  # other tasks of the same load
            hook(raised)

    for log in logs:
        log.setLevel(logging.CRITICAL + 1)
    sys.unraisablehook = without_late_errors
    try:
        yield
    except Exception:
        time.sleep(_LATE_SECONDS)
        warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)  # Orbax abandons them
        gc.collect()  # the error of a task that is never awaited is logged on its deletion, so delete it here
        raise
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)
        sys.unraisablehook = hook


def list_files(folder: pathlib.Path) -> set[pathlib.Path]:
    """Everything in a folder, at any depth; empty if the folder does not exist."""
    try:
        return set(folder.rglob("*"))
    except FileNotFoundError:
        return set()


def still_has(folder: pathlib.Path, before: set[pathlib.Path]) -> bool:
    """Whether a folder still has all files of `before`. A removal deletes one file after the other, and the folder
    last."""
    if not before:
        time.sleep(_EMPTY_SECONDS)
    return folder.is_dir() and list_files(folder) >= before


def on_all_hosts(load: Callable[[], T]) -> T:
    """Calls `load` on every host and returns its result; raises Damaged or UserError on all hosts if any of them
    does."""
    found = error = None
    try:
        found = load()
    except UserError as raised:
        error = raised
    kind = distributed.max_over_hosts(0 if error is None else 1 if isinstance(error, Damaged) else 2)
    if kind == 1:
        raise error or Damaged("the checkpoint cannot be read on another host")
    if kind == 2:
        raise (
            error
            if error and not isinstance(error, Damaged)
            else UserError("another host failed; see its own error message")
        )
    return found


def load_meta(folder: pathlib.Path) -> dict[str, Any]:
    """Loads the `meta` of a checkpoint's folder, with current config names.

    Raises:
      UserError: an unsupported format version.
      Damaged: the checkpoint cannot be read, or its `meta` does not match its digest.
    """
    return load_meta_and_digests(folder)[0]


def load_meta_and_digests(folder: pathlib.Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """As `load_meta`; also returns the digests, or None for a checkpoint without."""
    stored = read(folder, lambda: ocp.load_checkpointables(folder, {"meta": None})["meta"])
    meta, found = _parse_meta(folder, stored)
    step = meta.get("step")
    if step is not None and folder.name != str(step):  # the folder was renamed
        raise Damaged(f"the checkpoint {folder} is not of step {folder.name}: it was saved at step {step}")
    return meta, found


def _parse_meta(folder: pathlib.Path, stored: Any) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Splits a stored `meta` into (`meta` without digests, digests or None), the inverse of `with_digests`, and checks
    both.

    Raises:
      Damaged: the `meta` does not match its digest, or is invalid.
      UserError: an unsupported format version.
    """
    if not isinstance(stored, dict) or not isinstance(stored.get("format_version"), int):
        raise Damaged(f"the checkpoint {folder} cannot be read: its meta has no format version")
    version, meta = stored["format_version"], {name: value for name, value in stored.items() if name != ENTRY}
    found = stored.get(ENTRY)
    if isinstance(found, dict):
        others = {name: value for name, value in found.items() if name != "meta"}
        if found.get("meta") != digests.json_digest(meta | {ENTRY: others}):
            raise Damaged(f"the checkpoint {folder} is damaged: its meta does not match its digest")
    elif found is not None or version > _WITHOUT_DIGESTS:
        raise Damaged(f"the checkpoint {folder} is damaged: the digests are missing from its meta")
    if version not in _SUPPORTED:
        raise UserError(
            f"the checkpoint {folder} has format version {version}, expected {_SUPPORTED[0]} to {_SUPPORTED[-1]}; use "
            "the version of pera_jax that wrote it"
        )
    if isinstance(meta.get("config"), dict):
        meta |= {"config": migrated(meta["config"])}
    try:
        meta_fields.check_meta(meta)
    except json_files.Invalid as error:
        if found is not None:  # it matches its digest, so it was saved like this
            raise UserError(
                f"the checkpoint {folder} does not fit this version of pera_jax: in its meta, {error}; use the version "
                "that wrote it"
            ) from error
        raise Damaged(f"the checkpoint {folder} is damaged: in its meta, {error}") from error
    return meta, found


def saved_shapes(found: dict[str, Any], name: str) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of each leaf of an item when it was saved, by path "a/b/c"."""
    result = {}
    for path, (described, _) in _parsed(found, name).items():
        dtype, _, sides = described.rstrip("]").partition("[")
        result[path] = jax.ShapeDtypeStruct([int(side) for side in sides.split(",") if side], np.dtype(dtype))
    return result


def check_shapes(folder: pathlib.Path, stored: Any, wanted: Any) -> None:
    """Raises Misfit if leaves are missing, unexpected, or differ in shape from those of `wanted`."""
    differing = differences(stored, wanted)
    if differing:
        raise Misfit(
            f"the checkpoint {folder} does not fit this config: {every(differing)}; use the config that it was trained "
            "with"
        )


def shapes_of(tree: Any) -> dict[str, tuple[int, ...]]:
    """The shape of each leaf of a tree, by path "a/b/c"."""
    return {path_of(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def differences(found: Any, wanted: Any) -> list[str]:
    """One line for each leaf whose shape differs, or that only one of two trees has."""
    before, now = shapes_of(found), shapes_of(wanted)
    return [
        f"expected {path} {now.get(path, 'absent')}, got {before.get(path, 'absent')}"
        for path in sorted(before.keys() | now.keys())
        if before.get(path) != now.get(path)
    ]


def check_json(folder: pathlib.Path, name: str, value: Any, found: dict[str, Any] | None) -> None:
    """Raises Damaged if a JSON item does not match its digest."""
    if found is not None and found.get(name) != digests.json_digest(value):
        raise Damaged(f"the checkpoint {folder} is damaged: its {name} does not match its digest")


def check_arrays(folder: pathlib.Path, name: str, tree: Any, found: dict[str, Any] | None) -> None:
    """Checks the arrays of an item, or a subtree of it with full paths, against the digests `found`.

    Every process must call it if the arrays are sharded over several hosts.

    Raises:
      Damaged: values differ from those that were saved; without digests: values are not finite.
      Misfit: leaves differ in dtype or shape from those that were saved.
    """
    if found is None:
        wrong = digests.not_finite(tree)
        if wrong:
            raise Damaged(
                f"the checkpoint {folder} is damaged: its {name} has NaN or infinite values in {several(wrong)}"
            )
        return
    saved, now = (
        _parsed(found, name),
        {path: tuple(each.split(" ")) for path, each in digests.leaf_digests(tree).items()},
    )
    other = [f"expected {path} {each[0]}, got {saved.get(path, ('absent',))[0]}" for path, each in now.items()
             if saved.get(path, ("",))[0] != each[0]]  # fmt: skip
    if other:  # the program has changed, not the checkpoint
        raise Misfit(
            f"the checkpoint {folder} does not fit this version of pera_jax: {every(other)}; use the version that "
            "wrote it"
        )
    wrong = [path for path, each in now.items() if each != saved[path]]
    if wrong:
        raise Damaged(f"the checkpoint {folder} is damaged: its {name} does not match its digests in {several(wrong)}")


def _parsed(found: dict[str, Any], name: str) -> dict[str, tuple[str, str]]:
    lines = (line.rsplit(" ", 2) for line in str(found.get(name, "")).splitlines())
    return {line[0]: (line[1], line[2]) for line in lines if len(line) == 3}
