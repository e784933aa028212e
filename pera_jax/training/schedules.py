"""Scheduled scalars: learning rate, weight decay, and those that an objective declares.

All are pure functions of the step, computed in float64 on the host and passed to the jitted step as scalars.
"""

import dataclasses
import fractions
import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from pera_jax.common.errors import UserError
from pera_jax.objectives.declared import Schedule

FORMS = '"20 epochs", "1500 steps", "96000 examples" or "10 percent"'
_DURATION = re.compile(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*(epoch|step|example|percent)s?\s*")


def parse_duration(
    value: Any, *, total_steps: int | None, steps_per_epoch: int, batch_size: int, name: str = "duration"
) -> int:
    """Converts a duration to a number of steps.

    Args:
      value: a number with a unit: "20 epochs", "1500 steps", "96000 examples" or "10 percent" (of the run). Epochs and
        percent may be fractional. A number without a unit is refused, because it is ambiguous.
      total_steps: length of the run in steps; None if this duration defines it, in which case percent is refused.
      steps_per_epoch: floor(images / global batch size).
      batch_size: global batch size in images.
      name: the config field; error messages start with it.

    Returns:
      A whole number of steps, rounded down (an epoch also drops its incomplete last batch), but at least 1 for a
      duration above zero.

    Raises:
      UserError: an invalid format, percent for the total itself, or epochs of less than one batch.
    """
    match = _DURATION.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise UserError(f"{name}={value!r} is not a duration; expected a number with a unit, like {FORMS}")
    amount, unit = fractions.Fraction(match[1]), match[2]
    if unit in ("step", "example") and amount.denominator != 1:
        raise UserError(f"{name}={value!r} must be a whole number of {unit}s; remove the fraction")
    if unit == "step":
        return int(amount)
    if unit == "example":
        steps = amount / batch_size
    elif unit == "epoch":
        if steps_per_epoch < 1:
            raise UserError(
                f"{name}={value!r} is in epochs, but the data has fewer images than batch_size={batch_size}; "
                "reduce the batch size or give the duration in steps"
            )
        steps = amount * steps_per_epoch
    else:
        if total_steps is None:
            raise UserError(f"{name}={value!r} cannot be a percentage of itself; give it in steps, epochs or examples")
        steps = amount * total_steps / 100
    return max(math.floor(steps), 1 if amount else 0)


def linear_ramp(step: int, *, start: float, end: float, steps: int) -> float:
    """`steps` values from `start` to `end`, both included; a ramp of one step has the start value; then `end`."""
    if step >= steps:
        return end
    fraction = step / (steps - 1) if steps > 1 else 0.0
    return start * (1.0 - fraction) + end * fraction  # exact at both ends


def cosine(step: int, *, start: float, end: float, steps: int) -> float:
    """end + (start - end) (1 + cos(pi t / T)) / 2 for t = 0 .. T-1, with t the step and T `steps`; then `end`."""
    if step >= steps:
        return end
    fraction = math.sin(math.pi / 2.0 * (steps - step) / steps) ** 2  # (1 + cos) / 2, accurate near the end too
    return start * fraction + end * (1.0 - fraction)


def warmup_cosine(step: int, *, start: float, peak: float, end: float, warmup: int, total: int) -> float:
    """A linear ramp from `start` to `peak` over `warmup` steps, then a cosine to `end` over the remaining ones."""
    if step < warmup:
        return linear_ramp(step, start=start, end=peak, steps=warmup)
    return cosine(step - warmup, start=peak, end=end, steps=total - warmup)


@dataclasses.dataclass(frozen=True)
class Schedules:
    """The scheduled scalars of a run; `curves` maps each name to a function of the step."""

    curves: Mapping[str, Callable[[int], float]]

    def at(self, step: int) -> dict[str, float]:
        """The values used in step number `step`, counted from 0, as Python floats (float64)."""
        if step < 0:
            raise ValueError(f"step {step} is negative")
        return {name: curve(step) for name, curve in self.curves.items()}


COMMON = {
    "learning_rate": Schedule("warmup_cosine", "schedules.learning_rate"),
    "weight_decay": Schedule("cosine", "schedules.weight_decay"),
}


def scalars(
    config: Any, declared: Mapping[str, Schedule], *, steps_per_epoch: int, total_steps: int
) -> Schedules:
    """The schedules of a run: `COMMON` and those that the objective `declared`.

    A momentum m is computed and passed as 1 - m, a cosine between the two differences: for m near 1, subtracting a
    float32 m from 1 would lose precision.

    Args:
      config: has the fields that the schedules refer to; each `warmup` is a duration (see `parse_duration`).
      steps_per_epoch: floor(images / global batch size).
      total_steps: length of the run in steps.

    Raises:
      UserError: a value out of range, or a warmup that is not a duration or is longer than the run.
    """
    lengths = dict(total_steps=total_steps, steps_per_epoch=steps_per_epoch, batch_size=config.batch_size)
    return Schedules({name: _curve(config, each, lengths) for name, each in (COMMON | dict(declared)).items()})


def _curve(config: Any, schedule: Schedule, lengths: dict[str, int]) -> Callable[[int], float]:
    field = functools.reduce(lambda settings, name: settings[name], schedule.field.split("."), config)
    total = lengths["total_steps"]

    def number(name: str) -> float:
        value, label = (field, schedule.field) if name == "" else (field[name], f"{schedule.field}.{name}")
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise UserError(f"{label}={value!r} must be a finite number")
        if value < 0 or (schedule.positive and value == 0) or value > schedule.highest:
            bounds = f"{'>' if schedule.positive else '>='} 0"
            bounds += f" and <= {schedule.highest:g}" if schedule.highest < math.inf else ""
            raise UserError(f"{label}={value} must be {bounds}")
        return 1.0 - float(value) if schedule.complement else float(value)

    def warmup() -> int:
        label = f"{schedule.field}.warmup"
        steps = parse_duration(field["warmup"], **lengths, name=label)
        if steps > total:
            raise UserError(
                f"{label}={field['warmup']!r} is {steps} steps, longer than the run of {total} steps; shorten it, for "
                "example by using percent"
            )
        return steps

    if schedule.form == "after":
        first = parse_duration(field, **lengths, name=schedule.field)
        return lambda step: float(step >= first)
    if schedule.form == "constant":
        value = number("")
        return lambda step: value
    ends = {
        name: number(name) for name in ("start", "peak", "end") if schedule.form == "warmup_cosine" or name != "peak"
    }
    if schedule.form == "cosine":
        return lambda step: cosine(step, **ends, steps=total)
    steps = warmup()
    if schedule.form == "ramp":
        return lambda step: linear_ramp(step, **ends, steps=steps)
    return lambda step: warmup_cosine(step, **ends, warmup=steps, total=total)
