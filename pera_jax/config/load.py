"""Configs by name or file, for commands without absl's `--config`."""

import ast
import os
import runpy
from collections.abc import Sequence

from ml_collections import ConfigDict

from pera_jax.common import paths
from pera_jax.common.errors import UserError
from pera_jax.config import run_file
from pera_jax.config.renamed import new_name


def load(path: str, changes: Sequence[str] = ()) -> ConfigDict:
    """The config of `configs/NAME.py`, `configs/NAME.py:ARGUMENT` or `RUN/config.json`, for commands without absl's `--config`.

    Args:
      changes: "field.of.config=value" each, the value as Python writes it; words need no quotes.

    Raises:
      UserError: no such file, or a change that does not fit.
    """
    name, _, argument = paths.local(path).partition(":")
    if name.endswith(".json"):
        name, argument = run_file.__file__, path
    if not os.path.isfile(name):
        raise UserError(f"config {name} does not exist; name a file of configs/")
    config = runpy.run_path(name)["get_config"](argument or None)
    for change in changes:
        field, equals, text = change.partition("=")
        if not equals:
            raise UserError(f"the change {change!r} is not of the form field.of.config=value")
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = text
        try:
            config.update_from_flattened_dict({new_name(field) or field: value})
        except (KeyError, AttributeError) as error:
            raise UserError(f"the config has no field {field}") from error
        except TypeError as error:
            raise UserError(f"{field}={text} is of another type than its default") from error
    return config


