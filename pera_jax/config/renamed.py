"""Fields of configs that have another name now: for the checkpoints of earlier versions, and for who writes the old name.

Up to format version 3 of the checkpoints the fields of PerA stood beside the common ones.
"""

from collections.abc import Iterator
from typing import Any

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
"""Old name: new name. Of a group of fields all that lie below it."""


def new_name(field: str) -> str | None:
    """The name that the field "a.b.c" has now; None where it is none of the old ones."""
    for old, new in RENAMED.items():
        if field == old or field.startswith(f"{old}."):
            return new + field[len(old) :]
    return None


def migrated(config: dict[str, Any]) -> dict[str, Any]:
    """A config out of JSON with the present names; one that has them already is returned as it is."""
    if not any(old.split(".")[0] in config for old in ("optimiser", "stochastic_depth", "views", "heads")):
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
    """The fields of nested dicts that are no dicts themselves, by their dotted names."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
