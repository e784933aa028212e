"""What a method declares: scheduled scalars, parameters that are not trained, its official program's format."""

import re
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple


class Schedule(NamedTuple):
    """The declaration of a scalar that depends on the step; `training.schedules` evaluates it in float64 on the host.

    Attributes:
      form: "constant" (the field is a number), "cosine" (fields `start`, `end`), "ramp" (`start`, `end`, `warmup`),
        "warmup_cosine" (`start`, `peak`, `end`, `warmup`) or "after" (the field is a duration; 0.0 during it, then
        1.0).
      field: the config field, such as "schedules.learning_rate".
      positive: whether 0 is not allowed.
      highest: the largest allowed value.
      complement: whether 1 minus the value is passed to the step, because float32 is imprecise for an EMA momentum near
        1.
    """

    form: str
    field: str
    positive: bool = False
    highest: float = float("inf")
    complement: bool = False


class Official:
    """The state dictionary of a method's official program, for import, export and comparisons; derive from it.

    Attributes:
      backbone: prefix of the names of the student's ViT.
      unused: regex of arrays that the official program keeps and never uses.
    """

    backbone: ClassVar[str]
    unused: ClassVar[str] = r"$^"

    def is_unused(self, name: str) -> bool:
        return re.search(self.unused, name) is not None

    def entries(self, objective: Any) -> list[Any]:
        """The `tables.Entry` of each array; paths start with "params" (the student), "teacher" or "objective" (its
        state)."""
        raise NotImplementedError

    def constants(self, objective: Any) -> dict[str, Any]:
        """The arrays that are computed here instead of stored, such as fixed position embeddings."""
        return {}

    def set_sizes(self, config: Any, arrays: Mapping[str, Any]) -> list[str]:
        """Sets the method's own fields of `config` from the arrays by name; returns notes on what it had to assume."""
        return []


class Freeze(NamedTuple):
    """Parameters that are not trained, for good or at first.

    Attributes:
      pattern: path regex, as in "prototype_head/gain$".
      until: the scalar, a `Schedule` of the form "after", from which on they are trained; "" for never. Parameters that
        are frozen for good are not averaged either: the teacher keeps its own.
      moments: whether Adam's moments are updated while they are frozen, so that only the learning rate is 0. If not,
        the gradient is dropped, and Adam's count of these parameters starts when they are first trained.
    """

    pattern: str
    until: str = ""
    moments: bool = False


class Layout(NamedTuple):
    """The layout of a batch, against which configs are checked."""

    batch_shards: int  # number of shards of a batch (data x fsdp)
    weight_shards: int  # number of shards of the prototypes (fsdp x tensor)
    hosts: int  # number of processes that read data
