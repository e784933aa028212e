"""Loads configs: those of this package by name, other Python files by path, or the config.json of a run."""

import ast
import functools
import os
import pathlib
import runpy
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from pera_jax.common import paths
from pera_jax.common.errors import UserError
from pera_jax.common.text import printable, several
from pera_jax.config import run_file
from pera_jax.config.renamed import new_name

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
      config: one of `names()` or a path "FILE.py", optionally followed by ":ARGUMENT"; or "RUN/config.json".

    Raises:
      UserError: the config does not exist.
    """
    text = str(paths.local(config))
    if text.endswith(".json"):
        return run_file.__file__, text
    name, _, argument = text.partition(":")
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
      config: a name or path, see `find`; or a loaded config, which is copied.
      changes: overrides, as {"model.width": 384} or ["model.width=384"]. In strings, values are Python literals; other
        text is a string.

    Raises:
      UserError: the config does not exist, an unknown field, or a value of the wrong type.
    """
    if isinstance(config, ConfigDict):
        config = config.copy_and_resolve_references()
    else:
        file, argument = find(os.fspath(config))
        config = runpy.run_path(file)["get_config"](*([argument] if argument else []))
    for field, value in changes.items() if isinstance(changes, Mapping) else map(assignment, changes):
        try:
            config.update_from_flattened_dict({new_name(field) or field: value})
        except (KeyError, AttributeError) as error:
            raise UserError(f"the config has no field {field}; pera_jax/config/defaults.py lists the fields") from error
        except TypeError as error:
            default = functools.reduce(getattr, (new_name(field) or field).split("."), config)
            raise UserError(
                f"expected {field} as {run_file.expected_type(default)}, got {value!r}; change its value"
            ) from error
    return config


def assignment(change: str) -> tuple[str, Any]:
    """Splits "NAME=VALUE"; VALUE is a Python literal, or else a string. Raises UserError."""
    name, equals, text = change.partition("=")
    if not equals:
        raise UserError(f"expected NAME=VALUE, got {change!r}")
    try:
        return name, ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return name, text
