"""Configs by name or file: those that come with the program, a file of one's own, the config.json of a run."""

import ast
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
    """The folder of the configs that come with the program: beside the package in a checkout, in it where it is installed."""
    installed = _PACKAGE / "configs"
    return installed if installed.is_dir() else _PACKAGE.parent / "configs"


def names() -> list[str]:
    """The names of the configs that come with the program, sorted."""
    return sorted(file.stem for file in folder().glob("*.py"))


def find(config: str) -> tuple[str, str]:
    """The Python file that defines `get_config`, and the argument to call it with ("" for none).

    Args:
      config: "NAME" of `names()`, or a file "OWN.py", both also with ":ARGUMENT"; or "RUN/config.json".

    Raises:
      UserError: no such config.
    """
    text = str(paths.local(config))
    if text.endswith(".json"):
        return run_file.__file__, text
    name, _, argument = text.partition(":")
    if name in names():
        return str(folder() / f"{name}.py"), argument
    if not os.path.isfile(name):
        raise UserError(
            f"config {printable(name)} does not exist; name one of {several(names(), 20)}, a Python file of your own, or the "
            "config.json of a run"
        )
    return name, argument


def load(config: str | os.PathLike | ConfigDict, changes: Sequence[str] | Mapping[str, Any] = ()) -> ConfigDict:
    """The config of that name or file, see `find`; or a copy of one that is loaded already.

    Args:
      changes: {"field.of.config": value}, or "field.of.config=value" each, the value as Python writes it; words need no
        quotes.

    Raises:
      UserError: no such config, or a change that does not fit.
    """
    if isinstance(config, ConfigDict):
        config = config.copy_and_resolve_references()
    else:
        file, argument = find(os.fspath(config))
        config = runpy.run_path(file)["get_config"](argument or None)
    for field, value in changes.items() if isinstance(changes, Mapping) else map(assignment, changes):
        try:
            config.update_from_flattened_dict({new_name(field) or field: value})
        except (KeyError, AttributeError) as error:
            raise UserError(f"the config has no field {field}") from error
        except TypeError as error:
            raise UserError(f"{field}={value} is of another type than its default") from error
    return config


def assignment(change: str) -> tuple[str, Any]:
    """Name and value of "NAME=VALUE", the value as Python writes it; words need no quotes. Raises UserError."""
    name, equals, text = change.partition("=")
    if not equals:
        raise UserError(f"the change {change!r} is not of the form NAME=VALUE")
    try:
        return name, ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return name, text
