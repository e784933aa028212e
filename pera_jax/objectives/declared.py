"""What a method declares about its training: scheduled scalars, and parameters that are not trained."""

from typing import NamedTuple


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
