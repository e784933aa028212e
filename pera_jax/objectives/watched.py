"""What of a run is watched and shown: the conditions that raise alarms, charts, and the picture of what the networks see."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


@dataclasses.dataclass(frozen=True)
class Condition:
    """A state of a run that raises an alarm.

    Attributes:
      quantity: what is watched, by its name in `HealthChecks.quantities`.
      begins, ends: its bounds; the alarm is for values beyond `begins`, which lies on the far side of `ends`.
      after_peak: whether it counts only once the learning rate has come to its peak.
      text: one sentence with places, "{growth:.1f}", for the quantities.
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
        "the {excess_name} has come to {excess:.2f}, {growth:.1f} times what it was in the first steps; "
        "lower schedules.learning_rate.peak or optimizer.clip_norm",
    ),
)  # fmt: skip


class HealthChecks(NamedTuple):
    """What of a run is watched.

    Attributes:
      conditions: in the order in which their metrics are written.
      averaged: from the metrics of a step, what is averaged over steps; with `update` and `excess`, of which the second is
        compared with the first steps as the quantity `growth`.
      quantities: from such averages, what `Condition`s name, beside the averages themselves.
    """

    conditions: tuple[Condition, ...]
    averaged: Callable[[Mapping[str, float]], dict[str, float]]
    quantities: Callable[[Mapping[str, float]], dict[str, Any]]


class Panel(NamedTuple):
    """A chart of the report: title, logarithmic where it can be, smoothed, {metric: its name in the chart}."""

    title: str
    logarithmic: bool
    smoothed: bool
    metrics: dict[str, str]


class Preview(NamedTuple):
    """What the networks see, for the report.

    Attributes:
      columns: by name, uint8 [number, H, W, 3] each.
      reading: sentences on how to read the picture; caption: one on these images.
      tints: names and colors (0 to 255) that mark parts of a column.
    """

    columns: dict[str, Any]
    reading: str
    caption: str
    tints: dict[str, tuple[int, int, int]]


def common_averages(values: Mapping[str, float]) -> dict[str, float]:
    """What `COMMON_CONDITIONS` watch, from the metrics of a step."""
    return {"update": values["norm/update"] / values["norm/parameters"], "excess": values["loss"]}
