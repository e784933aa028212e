"""The config.json of a run as a config: `--config RUN/config.json`, optionally with `--config.FIELD=VALUE`."""

import pathlib
from typing import Any

from ml_collections import ConfigDict

from pera_jax.common import json_files
from pera_jax.common.errors import UserError
from pera_jax.common.text import printable
from pera_jax.config.defaults import default
from pera_jax.config.renamed import migrated


def get_config(path: str) -> ConfigDict:
    """The config in the config.json of a run; fields missing from it have their defaults.

    Args:
      path: the config.json.

    Raises:
      UserError: the file cannot be read, is not a config.json, or has an unknown or invalid field.
    """
    try:
        content = json_files.loads(pathlib.Path(path).read_bytes())
    except (OSError, json_files.Invalid) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"the config {path} cannot be read: {reason}; give the config.json of a run") from error
    if not isinstance(content, dict) or not isinstance(content.get("config"), dict):
        raise UserError(f"{path} is not the config.json of a run: it has no entry 'config'; give another file")
    values = migrated(content["config"])
    config = default(values.get("objective", "pera"))
    _fill(config, values, path, "")
    return config


def _fill(config: ConfigDict, values: dict[str, Any], path: str, prefix: str) -> None:
    for name, value in values.items():
        field = f"{prefix}{name}"
        if name not in config:
            raise UserError(
                f"{path} has an unknown field {printable(field)}; remove it, or use the version of pera_jax that wrote "
                "it"
            )
        if isinstance(config[name], ConfigDict) and isinstance(value, dict):
            _fill(config[name], value, path, f"{field}.")
            continue
        try:
            if value is None:  # ConfigDict accepts None for any type
                raise TypeError
            config[name] = _tuples(value)  # raises if the type differs from that of the default
        except (TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"expected {field} in {path} as {expected_type(config[name])}, got {printable(value)}; correct it"
            ) from error


def expected_type(default: Any) -> str:
    """Describes the type of a config field for error messages."""
    if isinstance(default, ConfigDict):
        return "a group of fields"
    return f"{type(default).__name__}, such as the default {printable(repr(default))}"


def _tuples(value: Any) -> Any:
    """Converts the lists of JSON to the tuples of configs."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
