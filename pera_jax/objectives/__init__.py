"""The registry of pre-training methods; nothing else names a method.

`config.objective` is one of `METHODS`, or the dotted name of your own module that defines `OBJECTIVE`
(an `objectives.base.Objective`); its fields are in `config.<OBJECTIVE.name>`.
"""

from typing import Any

import jax
from ml_collections import ConfigDict

from pera_jax.bands import Bands
from pera_jax.common.errors import UserError
from pera_jax.objectives import check, lookup
from pera_jax.objectives.base import Layout, Objective, stream

METHODS = {
    "pera": "pera_jax.objectives.pera",
    "dino": "pera_jax.objectives.dino",
    "dinov2": "pera_jax.objectives.dinov2",
    "mae": "pera_jax.objectives.mae",
    "mocov3": "pera_jax.objectives.mocov3",
}


def method(name: str) -> type[Objective]:
    """The class of a method. Raises UserError: neither registered nor an importable module with `OBJECTIVE`."""
    return lookup.objective_of(str(name), METHODS)


def default_config(name: str) -> ConfigDict:
    """The default of `config.<OBJECTIVE.name>` for the method `name`."""
    return method(name).default_config()


def validate(config: ConfigDict, layout: Layout) -> None:
    """Checks the method's own fields of a config, and its requirements on the common fields."""
    found = method(config.objective)
    check.declarations(found, config.objective)
    check.fields(config[found.name], found.name)
    found.validate(config, layout)


def from_config(config: ConfigDict, bands: Bands, device: jax.Device | None = None) -> Objective:
    """Builds the objective of a config, for images with these bands.

    Args:
      device: one of the devices that it will run on, see `attention.choose`.

    Raises:
      UserError: the config is invalid, or a crop is no multiple of the patch size.
    """
    objective = method(config.objective).from_config(config, bands, device)
    check.crops(objective)
    return objective


def from_metadata(meta: dict[str, Any]) -> Objective:
    """The objective that a checkpoint was trained with. Raises UserError if `meta` is invalid."""
    try:
        config = ConfigDict(meta["config"])
        config.model.attention = "auto"  # this machine may lack the kernels of the one that trained it
        return from_config(config, Bands.from_metadata(meta))
    except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError, OverflowError) as error:
        reason = error.args[0] if error.args else type(error).__name__
        raise UserError(
            f"the config in the checkpoint's meta is invalid ({reason}); use another checkpoint of the run"
        ) from error


def untrained(meta: dict[str, Any]) -> dict[str, Any]:
    """The student's parameters before the first step, recreated from the seed in a checkpoint's `meta`."""
    objective, key = from_metadata(meta), jax.random.key(meta["config"]["seed"])
    return jax.jit(lambda: objective.init(stream(key, "init")))()
