"""Finds the module of a method by its name, and says what is wrong with a module that cannot be used."""

import contextlib
import importlib
import os
import pathlib
import sys
import traceback
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

from pera_jax.common.errors import UserError
from pera_jax.common.text import first_line, printable


@contextlib.contextmanager
def importable_from(folder: str | os.PathLike) -> Iterator[None]:
    """In this context, modules are also looked for in `folder`, after all other places.

    A config file is loaded in it, so that the module of its method may lie beside it. What was imported stays imported.
    """
    place = os.path.abspath(folder)
    sys.path.append(place)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # the config file itself may have changed the path
            del sys.path[len(sys.path) - 1 - sys.path[::-1].index(place)]


def objective_of(name: str, methods: Mapping[str, str]) -> Any:
    """`OBJECTIVE` of the module `methods[name]`, or of the module `name`.

    Raises:
      UserError: there is no such module, it cannot be imported, or it defines no `OBJECTIVE`.
    """
    module = _import(name, methods)
    if not hasattr(module, "OBJECTIVE"):
        raise UserError(
            f"objective={printable(name)!r}: {_file_of(module)} defines no OBJECTIVE; add a line "
            "OBJECTIVE = YourClass to it"
        )
    return module.OBJECTIVE


def _import(name: str, methods: Mapping[str, str]) -> ModuleType:
    module = methods.get(name, name)
    try:
        return importlib.import_module(module)
    except (UserError, MemoryError):
        raise
    except Exception as error:
        place = _place(error)
        if _is_missing(error, module) or not place:
            raise UserError(
                f"objective={printable(name)!r} is not one of {', '.join(methods)}, nor a module that can be found in "
                "the current folder, on PYTHONPATH or beside the config file; correct the name, or add the module's "
                "folder to PYTHONPATH"
            ) from error
        reason = error.msg if isinstance(error, SyntaxError) else first_line(error)
        raise UserError(
            f"objective={printable(name)!r}: its module cannot be imported: {type(error).__name__}: {reason} "
            f"({place}); correct the module"
        ) from error


def _is_missing(error: Exception, module: str) -> bool:
    """Whether the module itself, or a package that it is in, was not found; not something that it imports."""
    if not isinstance(error, ModuleNotFoundError) or error.name is None:
        return False
    return f"{module}.".startswith(f"{error.name}.")


def _place(error: Exception) -> str:
    """FILE:LINE in the module's folder where its import failed; "" if no code of it ran."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)[1:]  # without `_import`
        if not frame.filename.startswith("<frozen ") and frame.filename != importlib.__file__
    ]
    if not frames:
        return ""
    folder = pathlib.Path(frames[0].filename).parent
    last = [frame for frame in frames if pathlib.Path(frame.filename).is_relative_to(folder)][-1]
    return f"{last.filename}:{last.lineno}"


def _file_of(module: ModuleType) -> str:
    return printable(getattr(module, "__file__", None) or f"the folder {module.__name__}")
