"""Alarms: a run that goes wrong, told from the numbers of its steps.

What is watched is the objective's (`Objective.health_checks`). An alarm begins when most of the last steps are beyond its
bound, however far, and ends when most are within a second, milder one: a single step raises none.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from pera_jax.objectives.watched import HealthChecks

DECAY = 0.95  # of averages, for each step: they tell of the last 20
MOST = 0.85  # of the last steps are beyond a bound when an alarm begins: of steps in a row, the 37th
FIRST = 20  # steps whose loss the later ones are compared with
NOT_FINITE = "loss is not finite"


class Alarm(NamedTuple):
    """An alarm that begins: its name, and one sentence that says what is seen and what likely mends it."""

    name: str
    text: str


def metric(name: str) -> str:
    """The metric that is 1 while the alarm `name` is on."""
    return f"alarm/{name.replace(' ', '_')}"


class Alarms:
    """The averages of a run and which alarms are on, fed with every step."""

    def __init__(self, checks: HealthChecks, peak: float, state: Mapping[str, Any] | None = None):
        """
        Args:
          checks: of the objective. peak: of the learning rate.
          state: as `state` gave it, to resume from; None for a new run.
        """
        self._checks, self._peak = checks, peak
        state = state or {"steps": 0, "peaked": 0, "averages": {}, "shares": {}, "on": []}
        self._steps, self._peaked, self._averages = state["steps"], state["peaked"], dict(state["averages"])
        self._shares, self._on = dict(state["shares"]), set(state["on"])

    def update(self, values: Mapping[str, float], learning_rate: float) -> list[Alarm]:
        """The alarms that begin with the step that has these metrics and this learning rate."""
        self._steps += 1
        self._peaked |= int(learning_rate >= self._peak * (1 - 1e-6))  # it comes in float32
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
        """1 for each alarm that is on, 0 for the others."""
        return {metric(condition.name): int(condition.name in self._on) for condition in self._checks.conditions}

    def state(self) -> dict[str, Any]:
        """JSON to go on from."""
        return {
            "steps": self._steps, "peaked": self._peaked, "averages": dict(self._averages),
            "shares": dict(self._shares), "on": sorted(self._on),
        }  # fmt: skip

    def _seen(self, averages: Mapping[str, float]) -> dict[str, Any]:
        """What conditions compare and their sentences name, from the averages or from one step."""
        growth = averages["excess"] / max(self._averages["first"], 1.0)
        return {**averages, "growth": growth} | self._checks.quantities(averages)
