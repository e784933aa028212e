"""What a method declares for monitoring: health checks that raise alarms, charts, and the report's preview picture."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


@dataclasses.dataclass(frozen=True)
class Condition:
    """A state of a run that raises an alarm.

    Attributes:
      quantity: the name of the quantity in `HealthChecks.quantities`.
      begins, ends: the alarm begins when the quantity is beyond `begins` and ends when it is no longer beyond `ends`;
        low values are bad if `begins < ends`, else high values.
      after_peak: whether the condition applies only after the learning rate has reached its peak.
      text: one sentence with format fields for the quantities, such as "{growth:.1f}".
    """

    name: str
    quantity: str
    begins: float
    ends: float
    after_peak: bool
    text: str

    def beyond(self, value: float, bound: float) -> bool:
        return value < bound if self.begins < self.ends else value > bound


COMMON_CONDITIONS = (
    Condition(
        "updates too large", "update", 0.02, 0.01, False,
        "each step changes the parameters by {update:.1%} of their norm; lower schedules.learning_rate.peak",
    ),
    Condition(
        "loss diverges", "growth", 1.5, 1.2, False,
        "the {excess_name} has risen from {first:.2f} in the first steps to {excess:.2f}; "
        "lower schedules.learning_rate.peak or optimizer.clip_norm",
    ),
)  # fmt: skip


class HealthChecks(NamedTuple):
    """The health checks of a run.

    Attributes:
      conditions: in the order of their metrics.
      averaged: maps the metrics of a step to the values that are averaged over steps; must include `update` and
        `excess`. Its average over the first steps is the quantity `first`, and `growth` is 1 plus the rise of `excess`
        since then, as a fraction of |first| or of 1 if that is more: the ratio of the two where `first` is at least 1.
      quantities: maps these averages to further quantities that the conditions refer to.
    """

    conditions: tuple[Condition, ...]
    averaged: Callable[[Mapping[str, float]], dict[str, float]]
    quantities: Callable[[Mapping[str, float]], dict[str, Any]]


class Panel(NamedTuple):
    """A chart of the report: title, logarithmic scale if all values are positive, smoothing, {metric: label}."""

    title: str
    logarithmic: bool
    smoothed: bool
    metrics: dict[str, str]


class Preview(NamedTuple):
    """The report's picture of the networks' inputs and outputs.

    Attributes:
      columns: uint8 [number, H, W, 3] by column name.
      reading: how to read the picture. caption: a sentence about these images.
      tints: RGB colors (0 to 255) by name, for the legend.
    """

    columns: dict[str, Any]
    reading: str
    caption: str
    tints: dict[str, tuple[int, int, int]]


def common_averages(values: Mapping[str, float]) -> dict[str, float]:
    """The values that `COMMON_CONDITIONS` need, from the metrics of a step."""
    return {"update": values["norm/update"] / values["norm/parameters"], "excess": values["loss"]}
