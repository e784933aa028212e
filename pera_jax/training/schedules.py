"""What changes from step to step: learning rate, weight decay, teacher momentum, temperatures (Shen et al., section 4).

Everything is float64 on the host, a pure function of the step, and enters the jitted step as a few scalars.
"""

import dataclasses
import fractions
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from pera_jax.common.errors import UserError

FORMS = '"20 epochs", "1500 steps", "96000 examples" or "10 percent"'
_DURATION = re.compile(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*(epoch|step|example|percent)s?\s*")


def parse_duration(
    value: Any, *, total_steps: int | None, steps_per_epoch: int, batch_size: int, name: str = "duration"
) -> int:
    """A duration as a number of steps.

    Args:
      value: a number and its unit: "20 epochs", "1500 steps", "96000 examples" or "10 percent" (of the run). Epochs and
        percent may be fractions. A number without a unit is refused: it could mean any of them.
      total_steps: length of the run in steps; None where this duration defines it, so that percent is refused.
      steps_per_epoch: floor(images / global batch).
      batch_size: global batch, images.
      name: what the duration is for; error messages start with it.

    Returns:
      Whole steps. Fractions of a step are cut off (as an epoch leaves out what does not fill a batch), but a duration
      above zero lasts at least one step.

    Raises:
      UserError: another form, percent of a total that is being defined, epochs of less than one batch.
    """
    match = _DURATION.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise UserError(f"{name} is {value!r}, which is not a duration: write a number and its unit, like {FORMS}")
    amount, unit = fractions.Fraction(match[1]), match[2]
    if unit in ("step", "example") and amount.denominator != 1:
        raise UserError(f"{name} is {value!r}, but {unit}s are counted whole: write it without the fraction")
    if unit == "step":
        return int(amount)
    if unit == "example":
        steps = amount / batch_size
    elif unit == "epoch":
        if steps_per_epoch < 1:
            raise UserError(
                f"{name} is {value!r}, but the data hold fewer images than one global batch of {batch_size}: "
                "make the batch smaller or give the duration in steps"
            )
        steps = amount * steps_per_epoch
    else:
        if total_steps is None:
            raise UserError(f"{name} is {value!r}, a share of itself: give it in steps, epochs or examples")
        steps = amount * total_steps / 100
    return max(math.floor(steps), 1 if amount else 0)


def linear_ramp(step: int, *, start: float, end: float, steps: int) -> float:
    """`steps` values from `start` to `end`, both included; a ramp of one step has the start value; then `end`."""
    if step >= steps:
        return end
    share = step / (steps - 1) if steps > 1 else 0.0
    return start * (1.0 - share) + end * share  # this form meets both ends exactly


def cosine(step: int, *, start: float, end: float, steps: int) -> float:
    """end + (start - end) (1 + cos(pi t / T)) / 2 for t = 0 .. T-1, with t the step and T `steps`; then `end`."""
    if step >= steps:
        return end
    share = math.sin(math.pi / 2.0 * (steps - step) / steps) ** 2  # (1 + cos) / 2, with all its digits near the end
    return start * share + end * (1.0 - share)


def warmup_cosine(step: int, *, start: float, peak: float, end: float, warmup: int, total: int) -> float:
    """A linear ramp from `start` to `peak` over `warmup` steps, then a cosine to `end` over the remaining ones."""
    if step < warmup:
        return linear_ramp(step, start=start, end=peak, steps=warmup)
    return cosine(step - warmup, start=peak, end=end, steps=total - warmup)


@dataclasses.dataclass(frozen=True)
class Schedules:
    """The hyperparameters of a run by step. `curves` maps each name to its function of the step."""

    curves: Mapping[str, Callable[[int], float]]

    def at(self, step: int) -> dict[str, float]:
        """The values that step number `step` (from 0) trains with: Python floats, that is, float64."""
        if step < 0:
            raise ValueError(f"step {step} is negative")
        return {name: curve(step) for name, curve in self.curves.items()}


def hyperparameters(
    settings: Mapping[str, Any], *, steps_per_epoch: int, total_steps: int, batch_size: int
) -> Schedules:
    """The run's schedules: `learning_rate`, `weight_decay`, `one_minus_momentum`, `teacher_temperature` and
    `student_temperature`.

    The momentum is given as m and computed as 1 - m, as a cosine between the two differences: near m = 1 subtracting
    a float32 m from 1 would leave few digits.

    Args:
      settings: the config's `schedules`, a mapping of
        learning_rate {start, peak, end, warmup}, weight_decay {start, end}, momentum {start, end},
        teacher_temperature {start, end, warmup}, student_temperature; each `warmup` is a duration (`parse_duration`).
      steps_per_epoch: floor(images / global batch).
      total_steps: length of the run, steps.
      batch_size: global batch, images.

    Raises:
      UserError: a value out of its range, or a warm-up that is no duration or longer than the run.
    """

    def number(*path: str, low: float = 0.0, high: float = math.inf, open_low: bool = False) -> float:
        value = settings[path[0]] if len(path) == 1 else settings[path[0]][path[1]]
        name = ".".join(("schedules", *path))
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise UserError(f"{name} is {value!r}: it must be a finite number")
        if not (low < value if open_low else low <= value) or value > high:
            bounds = f"{'above' if open_low else 'at least'} {low:g}" + (
                f" and at most {high:g}" if high < math.inf else ""
            )
            raise UserError(f"{name} is {value}: it must be {bounds}")
        return float(value)

    def warmup(field: str) -> int:
        name = f"schedules.{field}.warmup"
        steps = parse_duration(
            settings[field]["warmup"],
            total_steps=total_steps, steps_per_epoch=steps_per_epoch, batch_size=batch_size, name=name,
        )  # fmt: skip
        if steps > total_steps:
            raise UserError(
                f"{name} is {settings[field]['warmup']!r}, {steps} steps, longer than the run of {total_steps} steps: "
                "shorten it, for instance by giving it in percent"
            )
        return steps

    rate = {name: number("learning_rate", name) for name in ("start", "peak", "end")}
    decay = {name: number("weight_decay", name) for name in ("start", "end")}
    difference = {name: 1.0 - number("momentum", name, high=1.0) for name in ("start", "end")}
    teacher = {name: number("teacher_temperature", name, open_low=True) for name in ("start", "end")}
    student = number("student_temperature", open_low=True)
    rate_warmup, teacher_warmup = warmup("learning_rate"), warmup("teacher_temperature")
    return Schedules(
        {
            "learning_rate": lambda step: warmup_cosine(step, **rate, warmup=rate_warmup, total=total_steps),
            "weight_decay": lambda step: cosine(step, **decay, steps=total_steps),
            "one_minus_momentum": lambda step: cosine(step, **difference, steps=total_steps),
            "teacher_temperature": lambda step: linear_ramp(step, **teacher, steps=teacher_warmup),
            "student_temperature": lambda step: student,
        }
    )
