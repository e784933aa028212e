"""A run's own config.json as a config: `--config RUN/config.json`, also with `--config.FIELD=VALUE`.

ml_collections reads Python files that define `get_config`; this is one, whose argument is the JSON file.
"""

import pathlib
from typing import Any

from ml_collections import ConfigDict

from pera_jax.common import json_files
from pera_jax.common.errors import UserError
from pera_jax.common.text import printable
from pera_jax.config.defaults import default
from pera_jax.config.renamed import migrated


def get_config(path: str) -> ConfigDict:
    """The config that `path`, the config.json of a run, holds; fields that it does not know have their default.

    Raises:
      UserError: no such file, or one that is no config.
    """
    try:
        content = json_files.loads(pathlib.Path(path).read_bytes())
    except (OSError, json_files.Invalid) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"the config {path} cannot be read: {reason}; name the config.json of a run") from error
    if not isinstance(content, dict) or not isinstance(content.get("config"), dict):
        raise UserError(f"{path} is not the config.json of a run: it has no config; name another file")
    values = migrated(content["config"])
    config = default(values.get("objective", "pera"))
    _fill(config, values, path, "")
    return config


def _fill(config: ConfigDict, values: dict[str, Any], path: str, prefix: str) -> None:
    for name, value in values.items():
        field = f"{prefix}{name}"
        if name not in config:
            raise UserError(f"{path} has the field {printable(field)}, which this version does not know; remove it")
        if isinstance(config[name], ConfigDict) and isinstance(value, dict):
            _fill(config[name], value, path, f"{field}.")
            continue
        try:
            if value is None:  # ConfigDict takes it for everything
                raise TypeError
            config[name] = _tuples(value)  # raises where it is not of the type of the default
        except (TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"{path} has {field}={printable(value)}, which is not of the type of its default; mend it"
            ) from error


def _tuples(value: Any) -> Any:
    """JSON has lists where configs have tuples."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
