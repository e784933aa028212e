"""Checks that a method declares and returns what training needs, so that a mistake in it is one sentence."""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from pera_jax.common.errors import UserError
from pera_jax.common.text import printable, several
from pera_jax.objectives.base import BACKBONE, Objective

_NEEDED = tuple(
    name for name, value in vars(Objective).items()
    if not name.startswith("_") and (callable(value) or isinstance(value, classmethod))
)  # fmt: skip


def group(method: Any, config: Mapping[str, Any]) -> str:
    """The name of a method's group of fields. Raises UserError: it has none, or `config` has a field of that name."""
    name = getattr(method, "name", None)
    if not isinstance(name, str) or not name.isidentifier():
        raise UserError(
            f"{_title(method)} has no valid name; set its attribute `name` to the name of its group of config fields"
        )
    if name in config:
        raise UserError(
            f"{_title(method)} has name = {name!r}, but config.{name} is a common field of every method; choose "
            "another name"
        )
    return name


def declarations(method: Any, module: str) -> None:
    """Checks what a method's class declares.

    Args:
      module: `config.objective`.

    Raises:
      UserError: names the attribute that is missing.
    """
    title = f"{_title(method)} of objective={printable(module)!r}"
    missing = [name for name in _NEEDED if not callable(getattr(method, name, None))]
    if missing:
        raise UserError(
            f"{title} has no method {missing[0]}; define it, as pera_jax/objectives/base.py describes it, or derive "
            "the class from pera_jax.objectives.base.Base, which has defaults for what is optional"
        )
    if not isinstance(getattr(method, "citation", None), str):
        raise UserError(f"{title} has no citation; set its attribute `citation` to authors, title and identifier")
    if method.teacher_keys and "one_minus_momentum" not in method.schedules():
        raise UserError(
            f"{title} has teacher_keys, but its schedules() has no 'one_minus_momentum'; add a schedule of the "
            "teacher's momentum with complement=True"
        )


def sized(own: ConfigDict, group: str) -> ConfigDict:
    """Returns a method's fields `own` if all integers in them can be sizes or counts; a checkpoint's may have been
    edited.

    Args:
      group: the name of the group of fields, such as "pera".

    Raises:
      UserError: names the first one that is not in [0, 2**31).
    """
    for name, value in own.items():
        if isinstance(value, ConfigDict):
            sized(value, f"{group}.{name}")
        elif isinstance(value, int) and not isinstance(value, bool) and not 0 <= value < 1 << 31:
            raise UserError(f"{group}.{name}={value} must be a number in [0, 2**31); correct it")
    return own


def fields(own: ConfigDict, group: str, networks: bool = False) -> None:
    """Checks what the names of a method's fields say.

    Args:
      group: the name of the group of fields, such as "pera".
      networks: whether `own` has the sizes of networks.

    Raises:
      UserError: a size of the groups `heads` or `decoder` that is not at least 1, or a negative weight of a loss term.
    """
    for name, value in own.items():
        if isinstance(value, ConfigDict):
            fields(value, f"{group}.{name}", name in ("heads", "decoder"))
        elif networks and (isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 1 << 31):
            raise UserError(f"{group}.{name}={value!r} must be a number in [1, 2**31)")
        elif name.endswith("_weight") and not value >= 0:
            raise UserError(f"{group}.{name}={value!r} must be >= 0 (0: without this term)")


def crops(objective: Objective) -> None:
    """Checks the sizes of the crop types that an objective uses. Raises UserError."""
    patch = objective.encoder.patch
    for kind, spec in objective.crops.items():
        if spec.size % patch:
            raise UserError(
                f"crops.{kind}_size={spec.size} is not a multiple of the patch size {patch}; choose a multiple of "
                f"{patch}"
            )


def parameters(objective: Objective, params: Mapping[str, Any]) -> None:
    """Checks the sub-trees of the result of `Objective.init`. Raises UserError: a missing one."""
    for key in (BACKBONE, *objective.teacher_keys):
        if key not in params:
            source = "needed for every method" if key == BACKBONE else "listed in its teacher_keys"
            raise UserError(
                f"{_title(type(objective))}.init returns no parameters {key!r}, which are {source}; it returns "
                f"{several(sorted(params), 8)}: correct the name"
            )


def metrics(objective: Objective, found: Any) -> None:
    """Checks the metrics that `Objective.update` returns, when the step is traced.

    Raises:
      UserError: "loss" is missing, or a metric is not a scalar.
    """
    title = _title(type(objective))
    if not isinstance(found, Mapping) or "loss" not in found:
        names = several(sorted(map(str, found)), 8) if isinstance(found, Mapping) else type(found).__name__
        raise UserError(
            f"the metrics of {title}.update must include 'loss', but are {names or 'empty'}; add the loss to the "
            "metrics (by default, they are the second result of its `loss`)"
        )
    for name, value in found.items():
        shape = getattr(value, "shape", () if isinstance(value, int | float) else None)
        if shape != ():
            what = type(value).__name__ if shape is None else f"an array of shape {list(shape)}"
            raise UserError(
                f"the metric {printable(str(name))!r} of {title}.update is {what}, expected a scalar; log a mean of "
                "it, or leave it out"
            )


def _title(method: Any) -> str:
    return f"the class {printable(getattr(method, '__name__', type(method).__name__))}"
