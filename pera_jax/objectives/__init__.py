"""The pre-training methods, by name: the one place that knows which there are.

`config.objective` is one of `METHODS`, or the dotted name of a module of one's own that defines `OBJECTIVE`
(`objectives.base.Objective`); its fields are `config.<OBJECTIVE.name>`.
"""

import importlib
from typing import Any

import jax
from ml_collections import ConfigDict

from pera_jax.bands import Bands
from pera_jax.common.errors import UserError
from pera_jax.common.text import printable
from pera_jax.objectives.base import Layout, Objective, stream

METHODS = {"pera": "pera_jax.objectives.pera"}


def method(name: str) -> type[Objective]:
    """The class of a method. Raises UserError: neither registered nor an importable module with `OBJECTIVE`."""
    try:
        return importlib.import_module(METHODS.get(name, str(name))).OBJECTIVE
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise UserError(
            f"objective={printable(str(name))!r} is not one of {', '.join(METHODS)}, nor an importable module that defines "
            "OBJECTIVE; choose one of these"
        ) from error


def default_config(name: str) -> ConfigDict:
    """The fields of the method `name`: what `config.<OBJECTIVE.name>` is by default."""
    return method(name).default_config()


def validate(config: ConfigDict, layout: Layout) -> None:
    """Checks the method's fields of a config, and the common ones as far as the method has its own demands."""
    method(config.objective).validate(config, layout)


def from_config(config: ConfigDict, bands: Bands, device: jax.Device | None = None) -> Objective:
    """The objective that a config describes, for images of these bands.

    Args:
      device: one of those that it will run on, see `attention.choose`.

    Raises:
      UserError: a config that describes none.
    """
    return method(config.objective).from_config(config, bands, device)


def from_metadata(meta: dict[str, Any]) -> Objective:
    """The objective that a checkpoint was trained with. Raises UserError: a meta that describes none."""
    try:
        config = ConfigDict(meta["config"])
        config.model.attention = "auto"  # the machine that reads it need not have the kernels of the one that trained
        return from_config(config, Bands.from_metadata(meta))
    except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError, OverflowError) as error:
        reason = error.args[0] if error.args else type(error).__name__
        raise UserError(f"the run's config describes no network of this program ({reason}); restore its meta") from error


def untrained(meta: dict[str, Any]) -> dict[str, Any]:
    """The student's parameters before the first step, made again from the seed in a checkpoint's `meta`."""
    objective, key = from_metadata(meta), jax.random.key(meta["config"]["seed"])
    return jax.jit(lambda: objective.init(stream(key, "init")))()
