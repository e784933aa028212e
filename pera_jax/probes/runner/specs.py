"""Which tasks are run on which data: what a config or the command line asks for, checked before anything is opened."""

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
    """One task on one data set.

    Attributes:
      name: of its result.
      data: where the labelled images lie, see `probes.samples` and `probes.scenes`.
      test_split: "" where there is none: leave-one-out.
      labels: the file of a table of labels, or "".
      image_size: px, to which whole images are resized; 0: the size of the global crops in training. Not for dense tasks.
      settings: all of the task's.
    """

    name: str
    task: str
    data: str
    train_split: str = "train"
    test_split: str = "test"
    labels: str = ""
    image_size: int = 0
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def described(self) -> dict[str, Any]:
        """As JSON."""
        return dataclasses.asdict(self) | {"settings": {name: _plain(value) for name, value in self.settings.items()}}


_FIELDS = {field.name: field.type for field in dataclasses.fields(Spec) if field.name not in ("name", "settings")}


def make(name: str, fields: Mapping[str, Any]) -> Spec:
    """The spec of these fields: those of `Spec`, and settings of the task beside them.

    Raises:
      UserError: no such task or setting, a value of another type.
    """
    task = fields.get("task")
    if task not in TASKS:
        raise UserError(f"{name} has the task {task!r}; choose from {', '.join(TASKS)}")
    if not fields.get("data"):
        raise UserError(f"{name} names no data; give --data, or {name}.data in the config")
    known = TASKS[task].SETTINGS
    own = {key: value for key, value in fields.items() if key in _FIELDS}
    for key, value in own.items():
        if not isinstance(value, _FIELDS[key]) or isinstance(value, bool):
            raise UserError(f"{name}.{key} is {value!r}, which is no {_FIELDS[key].__name__}")
    for field in ("data", "labels"):
        paths.local(own.get(field, ""), f"{name}.{field}")
    settings = dict(known)
    for key, value in fields.items():
        if key in _FIELDS:
            continue
        if key not in known:
            raise UserError(f"{name} has no setting {key!r}; the task {task} has {', '.join(known)}")
        settings[key] = _like(value, known[key], f"{name}.{key}")
    for field in ("image_size", "labels") if task in DENSE else ():
        if own.get(field):
            raise UserError(f"{name}.{field} is for whole images; the task {task} has masks and a window")
    if own.get("train_split") == "" and task in WHOLE_IMAGES:
        raise UserError(f"{name}.train_split is empty; name the split to fit on")
    return Spec(name=name, settings=settings, **own)


def _like(value: Any, default: Any, name: str) -> Any:
    """A setting's value in the type of its default."""
    value = tuple(value) if isinstance(value, list) else value
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not type(default):
        raise UserError(f"{name}={value!r} is of another type than its default {default!r}")
    if isinstance(default, tuple) and default:
        return tuple(_like(one, default[0], name) for one in value)
    return value


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def chosen(
    tasks: Sequence[str], fields: Mapping[str, Any], config: str | None, changes: Sequence[str] | Mapping[str, Any]
) -> list[Spec]:
    """`from_config` where a config is given, else `from_names`.

    Args:
      fields: None of those that are not given.

    Raises:
      UserError: as these; fields beside a config.
    """
    given = {name: value for name, value in fields.items() if value is not None}
    if not config:
        return from_names([tasks] if isinstance(tasks, str) else tasks, given, changes)
    if given:
        field = next(iter(given))
        raise UserError(f"{field} cannot be combined with a config of probes; change NAME.{field} of its tasks (--set)")
    return from_config(config, changes)


def from_config(path: str, changes: Sequence[str] | Mapping[str, Any]) -> list[Spec]:
    """The specs of a config, whose field `tasks` holds the fields of each by its name.

    Args:
      path: or its name.
      changes: {"NAME.FIELD": value}, or "NAME.FIELD=VALUE" each.

    Raises:
      UserError: as `make`; no such config.
    """
    config = configs.load(path)
    tasks = config.get("tasks")
    if not isinstance(tasks, ConfigDict) or not tasks:
        raise UserError(f"the config {path} names no tasks; it is no config of probes")
    return _changed({name: dict(fields) for name, fields in tasks.items()}, changes)


def from_names(
    tasks: Sequence[str], fields: Mapping[str, Any], changes: Sequence[str] | Mapping[str, Any]
) -> list[Spec]:
    """A spec for each task, all of the same fields. Raises UserError as `make`."""
    unknown = [task for task in tasks if task not in TASKS]
    if unknown or not tasks:
        raise UserError(f"there is no task {several(unknown)!r}; choose from {', '.join(TASKS)}")
    others = {} if set(tasks) <= set(DENSE) else {"image_size", "labels"}  # what dense tasks have no use for
    return _changed({
        task: {"task": task} | {k: v for k, v in fields.items() if task in WHOLE_IMAGES or k not in others}
        for task in tasks
    }, changes)  # fmt: skip


def _changed(tasks: dict[str, dict[str, Any]], changes: Sequence[str] | Mapping[str, Any]) -> list[Spec]:
    for place, value in changes.items() if isinstance(changes, Mapping) else map(configs.assignment, changes):
        name, dot, field = place.partition(".")
        if not dot:
            raise UserError(f"the change {place!r} is not of the form NAME.FIELD=VALUE")
        if name not in tasks:
            raise UserError(f"there is no {name!r} to change; there are {several(tasks, 10)}")
        tasks[name][field] = value
    return [make(name, fields) for name, fields in tasks.items()]
