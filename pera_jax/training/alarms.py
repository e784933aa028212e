"""Alarms: a run that goes wrong, told from the numbers of its steps.

What is watched is relative to what is possible (the entropy of so many prototypes, a prototype for each image of a batch,
the norm of the parameters), so the same bounds hold for any number of prototypes and any batch. An alarm begins when
most of the last steps are beyond its bound, however far, and ends when most are within a second, milder one: a single step
raises none. Until the learning rate has come to its peak a healthy teacher may say the same of all crops, so some conditions
wait for it.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

DECAY = 0.95  # of averages, for each step: they tell of the last 20
MOST = 0.85  # of the last steps are beyond a bound when an alarm begins: of steps in a row, the 37th
FIRST = 20  # steps whose loss the later ones are compared with
NOT_FINITE = "loss is not finite"


class Alarm(NamedTuple):
    """An alarm that begins: its name, and one sentence that says what is seen and what likely mends it."""

    name: str
    text: str


@dataclasses.dataclass(frozen=True)
class Condition:
    """
    Attributes:
      quantity: what is watched, by its name in `Alarms._seen`.
      begins, ends: its bounds; the alarm is for values beyond `begins`, which lies on the far side of `ends`.
      after_peak: whether it counts only once the learning rate has come to its peak.
      text: a sentence with places for what `Alarms._seen` gives.
    """

    name: str
    quantity: str
    begins: float
    ends: float
    after_peak: bool
    text: str

    def beyond(self, value: float, bound: float) -> bool:
        return value < bound if self.begins < self.ends else value > bound


CONDITIONS = (
    Condition(
        "collapse to few prototypes", "spread", 0.35, 0.45, False,
        "the teacher's targets of a whole batch fall on about {effective:.1f} of {prototypes} prototypes (KL of their mean "
        "to the uniform {kl_to_uniform:.2f} of {log_k:.2f} nats, mean entropy {entropy_nats:.2f}); let the centre follow "
        "with loss.center_momentum=0.9, and raise schedules.teacher_temperature or loss.koleo_weight",
    ),
    Condition(
        "prototypes unused", "used", 0.35, 0.45, True,
        "about {prototypes_used:.1f} of {prototypes} prototypes are the most probable of any crop of a batch of {images} "
        "images; let the centre follow with loss.center_momentum=0.9, or raise loss.koleo_weight",
    ),
    Condition(
        "uniform teacher", "entropy", 0.985, 0.97, True,
        "the teacher's targets are nearly uniform and say nothing (entropy {entropy_nats:.2f} of {log_k:.2f} nats); lower "
        "schedules.learning_rate.peak or schedules.teacher_temperature",
    ),
    Condition(
        "features collapse", "variance", 0.05, 0.10, True,
        "the teacher's class tokens are nearly the same for all crops (variance of their directions {variance:.4f} of 1); "
        "lower schedules.learning_rate.peak, or raise loss.koleo_weight",
    ),
    Condition(
        "updates too large", "update", 0.02, 0.01, False,
        "each step changes the parameters by {update:.1%} of their norm; lower schedules.learning_rate.peak",
    ),
    Condition(
        "loss diverges", "growth", 1.5, 1.2, False,
        "the loss less the teacher's entropy has come to {excess:.2f}, {growth:.1f} times what it was in the first steps; "
        "lower schedules.learning_rate.peak or optimiser.clip_norm",
    ),
)  # fmt: skip


def metric(name: str) -> str:
    """The metric that is 1 while the alarm `name` is on."""
    return f"alarm/{name.replace(' ', '_')}"


class Alarms:
    """The averages of a run and which alarms are on, fed with every step."""

    def __init__(self, prototypes: int, images: int, peak: float, state: Mapping[str, Any] | None = None):
        """
        Args:
          prototypes: K. images: of a batch. peak: of the learning rate.
          state: as `state` gave it, to go on from; None for a new run.
        """
        self._prototypes, self._images, self._peak = prototypes, images, peak
        state = state or {"steps": 0, "peaked": 0, "averages": {}, "shares": {}, "on": []}
        self._steps, self._peaked, self._averages = state["steps"], state["peaked"], dict(state["averages"])
        self._shares, self._on = dict(state["shares"]), set(state["on"])

    def update(self, values: Mapping[str, float], learning_rate: float) -> list[Alarm]:
        """The alarms that begin with the step that has these metrics and this learning rate."""
        self._steps += 1
        self._peaked |= int(learning_rate >= self._peak * (1 - 1e-6))  # it comes in float32
        for name, value in _watched(values).items():
            self._averages[name] = value + DECAY * (self._averages.get(name, value) - value)
        if self._steps <= FIRST:
            self._averages["first"] = self._averages["excess"]
        seen, begun = self._seen(_watched(values)), []
        for condition in CONDITIONS:
            on, value = condition.name in self._on, seen[condition.quantity]
            if on:
                counts = not condition.beyond(value, condition.ends)
            else:
                counts = condition.beyond(value, condition.begins) and bool(self._peaked or not condition.after_peak)
            share = counts + DECAY * (self._shares.get(condition.name, 0.0) - counts)
            self._shares[condition.name] = share if share < MOST else 0.0
            if share >= MOST:
                self._on ^= {condition.name}
                if not on:
                    begun.append(Alarm(condition.name, condition.text.format(**self._seen(self._averages))))
        return begun

    def metrics(self) -> dict[str, int]:
        """1 for each alarm that is on, 0 for the others."""
        return {metric(condition.name): int(condition.name in self._on) for condition in CONDITIONS}

    def state(self) -> dict[str, Any]:
        """JSON to go on from."""
        return {
            "steps": self._steps, "peaked": self._peaked, "averages": dict(self._averages),
            "shares": dict(self._shares), "on": sorted(self._on),
        }  # fmt: skip

    def _seen(self, of: Mapping[str, float]) -> dict[str, float]:
        """What `_watched` gives, of a step or on average, relative to what is possible, and what sentences say beside it."""
        log_k, log_possible = math.log(self._prototypes), math.log(min(self._prototypes, self._images))
        of_mean, used = of["entropy_of_mean"], math.log(max(of["prototypes_used"], 1.0))
        return {
            **of, "spread": of_mean / log_possible if log_possible else 1.0,  # the crops of one image may well be alike
            "used": used / log_possible if log_possible else 1.0,
            "entropy": of["entropy_nats"] / log_k, "log_k": log_k,
            "effective": math.exp(of_mean), "kl_to_uniform": log_k - of_mean,
            "growth": of["excess"] / max(self._averages["first"], 1.0),
            "prototypes": self._prototypes, "images": self._images,
        }  # fmt: skip


def _watched(values: Mapping[str, float]) -> dict[str, float]:
    """What is averaged, from the metrics of a step."""
    return {
        "entropy_nats": values["teacher/entropy"],
        "entropy_of_mean": values["teacher/entropy_of_mean"],
        "prototypes_used": values["teacher/prototypes_in_use"],
        "variance": values["teacher/feature_variance"],
        "update": values["norm/update"] / values["norm/parameters"],
        "excess": values["loss"] - values["teacher/entropy"],
    }
