"""Specs of probes, which task runs on which data, from a config or the command line; checked before data is opened."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from pera_jax import config as configs
from pera_jax.common import paths
from pera_jax.common.errors import UserError
from pera_jax.common.text import several
from pera_jax.probes.classification import knn, linear, logistic
from pera_jax.probes.dense import change, segmentation

WHOLE_IMAGES = {"knn": knn, "linear": linear, "logistic": logistic}
DENSE = {"segmentation": segmentation, "change": change}
TASKS = WHOLE_IMAGES | DENSE


@dataclasses.dataclass(frozen=True)
class Spec:
    """One task on one dataset.

    Attributes:
      name: name of the result.
      task: one of `TASKS`.
      data: path of the labeled images, see `data.labelled.samples` and `data.labelled.scenes`.
      test_split: "" for leave-one-out.
      labels: CSV file of labels, or "".
      image_size: px, to which images are resized; 0 for the size of the global crops in training. Not for dense tasks.
      settings: all settings of the task.
    """

    name: str
    task: str
    data: str
    train_split: str = "train"
    test_split: str = "test"
    labels: str = ""
    image_size: int = 0
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return dataclasses.asdict(self) | {"settings": {name: _plain(value) for name, value in self.settings.items()}}


_FIELDS = {field.name: field.type for field in dataclasses.fields(Spec) if field.name not in ("name", "settings")}


def make(name: str, fields: Mapping[str, Any]) -> Spec:
    """A spec from fields of `Spec` and settings of the task.

    Raises:
      UserError: an unknown task or setting, or a value of the wrong type.
    """
    task = fields.get("task")
    if task not in TASKS:
        raise UserError(f"unknown task {task!r} in {name}; expected one of {', '.join(TASKS)}")
    if not fields.get("data"):
        raise UserError(f"{name} has no data; give --data, or {name}.data in the config")
    known = TASKS[task].SETTINGS
    own = {key: value for key, value in fields.items() if key in _FIELDS}
    for key, value in own.items():
        if not isinstance(value, _FIELDS[key]) or isinstance(value, bool):
            raise UserError(f"expected {name}.{key} as {_FIELDS[key].__name__}, got {value!r}; change its value")
    for field in ("data", "labels"):
        paths.local(own.get(field, ""), f"{name}.{field}")
    settings = dict(known)
    for key, value in fields.items():
        if key in _FIELDS:
            continue
        if key not in known:
            raise UserError(f"unknown setting {key!r} in {name}; the settings of {task} are {', '.join(known)}")
        settings[key] = _like(value, known[key], f"{name}.{key}")
    for field in ("image_size", "labels") if task in DENSE else ():
        if own.get(field):
            raise UserError(f"{name}.{field} does not apply to the dense task {task}; remove it")
    if own.get("train_split") == "" and task in WHOLE_IMAGES:
        raise UserError(f"{name}.train_split is empty; give the name of the training split")
    return Spec(name=name, settings=settings, **own)


def _like(value: Any, default: Any, name: str) -> Any:
    """A setting's value, converted to the type of its default."""
    value = tuple(value) if isinstance(value, list) else value
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not type(default):
        raise UserError(f"expected {name} as {type(default).__name__}, such as the default {default!r}, got {value!r}")
    if isinstance(default, tuple) and default:
        return tuple(_like(one, default[0], name) for one in value)
    return value


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def chosen(
    tasks: Sequence[str], fields: Mapping[str, Any], config: str | None, changes: Sequence[str] | Mapping[str, Any]
) -> list[Spec]:
    """The specs of a config if one is given, or else of `tasks`; see `from_config` and `from_names`.

    Args:
      fields: fields of `Spec`; None for the default.

    Raises:
      UserError: as these functions; fields combined with a config.
    """
    given = {name: value for name, value in fields.items() if value is not None}
    if not config:
        return from_names([tasks] if isinstance(tasks, str) else tasks, given, changes)
    if given:
        field = next(iter(given))
        raise UserError(f"{field} cannot be combined with a probe config; change NAME.{field} of its tasks with --set")
    return from_config(config, changes)


def from_config(path: str, changes: Sequence[str] | Mapping[str, Any]) -> list[Spec]:
    """The specs in the field `tasks` of a config, which maps names to fields.

    Args:
      path: name or path of the config.
      changes: overrides, {"NAME.FIELD": value} or a list of "NAME.FIELD=VALUE".

    Raises:
      UserError: as `make`; a config that does not exist.
    """
    config = configs.load(path)
    tasks = config.get("tasks")
    if not isinstance(tasks, ConfigDict) or not tasks:
        raise UserError(f"{path} is not a probe config: it has no tasks; give a config with a field tasks")
    return _changed({name: dict(fields) for name, fields in tasks.items()}, changes)


def from_names(
    tasks: Sequence[str], fields: Mapping[str, Any], changes: Sequence[str] | Mapping[str, Any]
) -> list[Spec]:
    """One spec per task, all with the same fields. Raises UserError as `make`."""
    unknown = [task for task in tasks if task not in TASKS]
    if unknown or not tasks:
        raise UserError(f"unknown task {several(unknown)!r}; expected one or more of {', '.join(TASKS)}")
    others = {} if set(tasks) <= set(DENSE) else {"image_size", "labels"}  # fields that dense tasks do not have
    return _changed({
        task: {"task": task} | {k: v for k, v in fields.items() if task in WHOLE_IMAGES or k not in others}
        for task in tasks
    }, changes)  # fmt: skip


def _changed(tasks: dict[str, dict[str, Any]], changes: Sequence[str] | Mapping[str, Any]) -> list[Spec]:
    for path, value in changes.items() if isinstance(changes, Mapping) else map(configs.assignment, changes):
        name, dot, field = path.partition(".")
        if not dot:
            raise UserError(f"expected NAME.FIELD=VALUE, got {path!r}; name the task and the field")
        if name not in tasks:
            raise UserError(f"unknown name {name!r} in NAME.FIELD=VALUE; expected one of {several(tasks, 10)}")
        tasks[name][field] = value
    return [make(name, fields) for name, fields in tasks.items()]
