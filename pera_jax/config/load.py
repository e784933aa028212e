"""Loads configs: those of this package by name, other Python files by path, or the config.json of a run."""

import ast
import functools
import inspect
import os
import pathlib
import runpy
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from pera_jax.common import environment, paths
from pera_jax.common.errors import UserError
from pera_jax.common.text import first_line, printable, several
from pera_jax.config import run_file
from pera_jax.config.renamed import new_name
from pera_jax.objectives.lookup import importable_from

_PACKAGE = pathlib.Path(__file__).resolve().parents[1]


def folder() -> pathlib.Path:
    """The folder of this package's configs: in the package if it is installed, beside it in a checkout."""
    installed = _PACKAGE / "configs"
    return installed if installed.is_dir() else _PACKAGE.parent / "configs"


def names() -> list[str]:
    """The names of this package's configs, sorted."""
    return sorted(file.stem for file in folder().glob("*.py"))


def find(config: str) -> tuple[str, str]:
    """The Python file that defines `get_config`, and the argument to call it with ("" for none).

    Args:
      config: one of `names()` or a path "FILE.py", optionally followed by ":ARGUMENT".

    Raises:
      UserError: the config does not exist.
    """
    name, _, argument = str(paths.local(config)).partition(":")
    if name in names():
        return str(folder() / f"{name}.py"), argument
    if not os.path.isfile(name):
        raise UserError(
            f"config {printable(name)} does not exist; expected one of {several(names(), 20)}, a Python file, or the "
            "config.json of a run"
        )
    return name, argument


def load(config: str | os.PathLike | ConfigDict, changes: Sequence[str] | Mapping[str, Any] = ()) -> ConfigDict:
    """Loads a config, and overrides fields of it.

    Args:
      config: a name or path, see `find`; the path "RUN/config.json"; or a loaded config, which is copied.
      changes: overrides, as {"model.width": 384} or ["model.width=384"]. In strings, values are Python literals; other
        text is a string.

    Raises:
      UserError: the config does not exist or cannot be loaded, an unknown field, or a value of the wrong type.
    """
    if isinstance(config, ConfigDict):
        config = config.copy_and_resolve_references()
    else:
        path = os.fspath(config)
        config = run_file.get_config(str(paths.local(path))) if path.endswith(".json") else _from_python(*find(path))
    for field, value in changes.items() if isinstance(changes, Mapping) else map(assignment, changes):
        field = new_name(field, config) or field
        try:
            config.update_from_flattened_dict({field: value})
        except (KeyError, AttributeError) as error:
            raise UserError(f"the config has no field {field}; pera_jax/config/defaults.py lists the fields") from error
        except TypeError as error:
            default = functools.reduce(getattr, field.split("."), config)
            raise UserError(
                f"expected {field} as {run_file.expected_type(default)}, got {value!r}; change its value"
            ) from error
    return config


def _from_python(file: str, argument: str) -> ConfigDict:
    """What `get_config` of a Python file returns. Raises UserError if it raises, or is no such function."""
    given = [argument] if argument else []
    try:
        with importable_from(os.path.dirname(file)):  # where the module of its method may lie
            get_config = runpy.run_path(file).get("get_config")
            if not callable(get_config):
                raise UserError(f"{file} has no function get_config; define one that returns the config")
            _check_arguments(file, get_config, given)
            config = get_config(*given)
    except (Exception, SystemExit) as error:
        if isinstance(error, UserError) or environment.environment_fault(error):
            raise
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
        if isinstance(error, SyntaxError) and error.filename == file:
            lines, error = [error.lineno], error.msg
        line = f" in line {lines[-1]}" if lines else ""
        kind = "SyntaxError" if isinstance(error, str) else type(error).__name__
        raise UserError(f"the config {file} fails{line} ({kind}: {first_line(error)}); correct the file") from None
    if not isinstance(config, ConfigDict):
        raise UserError(
            f"expected a ConfigDict from get_config in {file}, got {type(config).__name__}; start from "
            "pera_jax.config.default() and return it"
        )
    return config


def _check_arguments(file: str, get_config: Callable, given: list[str]) -> None:
    try:
        inspect.signature(get_config).bind(*given)
    except TypeError as error:
        fix = f"remove :{given[0]}" if given else f"give one as in {file}:smoke"
        takes = f"takes no argument {given[0]!r}" if given else "needs an argument"
        raise UserError(f"get_config in {file} {takes}; {fix}, or change its parameters") from error


def assignment(change: str) -> tuple[str, Any]:
    """Splits "NAME=VALUE"; VALUE is a Python literal, or else a string. Raises UserError."""
    name, equals, text = change.partition("=")
    if not equals:
        raise UserError(f"expected NAME=VALUE, got {change!r}")
    try:
        return name, ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return name, text
