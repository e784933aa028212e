"""Alarms: detects from its metrics that a run is going wrong.

The conditions come from the objective (`Objective.health_checks`). An alarm begins when most recent steps are beyond
its bound, however far, and ends when most are within a second, milder bound, so that a single step never raises one.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from pera_jax.objectives.watched import HealthChecks

DECAY = 0.95  # of the moving averages, per step: they cover about the last 20 steps
MOST = 0.85  # fraction of recent steps beyond the bound at which an alarm begins: 37 consecutive steps
FIRST = 20  # number of first steps whose loss is the reference for later ones
NOT_FINITE = "loss is not finite"


class Alarm(NamedTuple):
    """An alarm that begins: its name, and one sentence with the symptom and a likely fix."""

    name: str
    text: str


def metric(name: str) -> str:
    """The metric that is 1 while the alarm `name` is on."""
    return f"alarm/{name.replace(' ', '_')}"


class Alarms:
    """The moving averages of a run and the alarms that are on; call `update` after every step."""

    def __init__(self, checks: HealthChecks, peak: float, state: Mapping[str, Any] | None = None):
        """
        Args:
          checks: the objective's health checks. peak: the peak learning rate.
          state: the result of `state`, to resume from; None for a new run.
        """
        self._checks, self._peak = checks, peak
        state = state or {"steps": 0, "peaked": 0, "averages": {}, "shares": {}, "on": []}
        self._steps, self._peaked, self._averages = state["steps"], state["peaked"], dict(state["averages"])
        self._shares, self._on = dict(state["shares"]), set(state["on"])

    def update(self, values: Mapping[str, float], learning_rate: float) -> list[Alarm]:
        """Updates the averages with one step's metrics and learning rate; returns the alarms that begin at this
        step."""
        self._steps += 1
        self._peaked |= int(learning_rate >= self._peak * (1 - 1e-6))  # it was rounded to float32
        for name, value in self._checks.averaged(values).items():
            self._averages[name] = value + DECAY * (self._averages.get(name, value) - value)
        if self._steps <= FIRST:
            self._averages["first"] = self._averages["excess"]
        seen, begun = self._seen(self._checks.averaged(values)), []
        for condition in self._checks.conditions:
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
        """Metrics with 1 for each alarm that is on and 0 for the others."""
        return {metric(condition.name): int(condition.name in self._on) for condition in self._checks.conditions}

    def state(self) -> dict[str, Any]:
        """The state to resume from, as JSON types."""
        return {
            "steps": self._steps, "peaked": self._peaked, "averages": dict(self._averages),
            "shares": dict(self._shares), "on": sorted(self._on),
        }  # fmt: skip

    def _seen(self, averages: Mapping[str, float]) -> dict[str, Any]:
        """The quantities that conditions and their texts refer to, from the averages or from one step."""
        excess, first = averages["excess"], self._averages["first"]
        growth = excess / first if first >= 1.0 else 1.0 + (excess - first) / max(-first, 1.0)
        return {**averages, "growth": growth} | self._checks.quantities(averages)
