"""Renamed config fields, so that earlier checkpoints load and old names on the command line still work.

Up to checkpoint format version 3, the fields of PerA were not in a group of their own.
"""

from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

RENAMED = {
    "optimiser": "optimizer",
    "data.normalise": "data.normalize",
    "stochastic_depth": "drop_path",
    "views.rgb": "data.rgb",
    "views.student_grey": "pera.views.student_grayscale",
    "views": "pera.views",
    "heads": "pera.heads",
    "masks": "pera.masks",
    "loss": "pera.loss",
    "schedules.momentum": "pera.teacher_momentum",
    "schedules.teacher_temperature": "pera.teacher_temperature",
    "schedules.student_temperature": "pera.student_temperature",
    "init_center_batches": "pera.center_batches",
}
"""Old name -> new name; for a group, applies to all fields in it."""


def new_name(field: str, config: ConfigDict | None = None) -> str | None:
    """The current name of the field "a.b.c"; None if it was not renamed.

    Args:
      config: that the field is of, if known. A field that it has keeps its name, and no field moves to a group that it
        lacks: PerA's earlier names mean nothing to another method.
    """
    for old, new in RENAMED.items():
        if field == old or field.startswith(f"{old}."):
            if config is not None and (new.split(".")[0] not in config or _has(config, field)):
                return None
            return new + field[len(old) :]
    return None


def _has(config: Any, field: str) -> bool:
    for name in field.split("."):
        if not isinstance(config, ConfigDict) or name not in config:
            return False
        config = config[name]
    return True


def migrated(config: dict[str, Any]) -> dict[str, Any]:
    """Converts a config from JSON to the current names; returns it unchanged if it has no old ones.

    Only configs of PerA can have them: fields were last renamed before there was another method.
    """
    old_groups = {"optimiser", "stochastic_depth", "views", "heads"}
    if config.get("objective", "pera") != "pera" or not old_groups & config.keys():
        return config
    result: dict[str, Any] = {}
    for field, value in leaves(config):
        *groups, name = (new_name(field) or field).split(".")
        place = result
        for group in groups:
            place = place.setdefault(group, {})
        place[name] = value
    return result


def leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested dicts, as (dotted name, value)."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
