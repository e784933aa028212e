"""Metrics, health checks and charts that methods with prototypes share: the teacher's targets and features.

The health checks find a collapse of either. Their bounds are relative to the best possible value (the entropy over all
prototypes, a different prototype for each image of a batch), so they hold for any number of prototypes and any batch
size. Until the learning rate has reached its peak, a healthy teacher may give the same targets to all crops, so some
conditions wait for it.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float

from pera_jax.losses import prototypes
from pera_jax.objectives import watched
from pera_jax.objectives.watched import Condition, HealthChecks, Panel

# ---------------------------------------------------------------- metrics


def teacher_metrics(
    loss: Float[jax.Array, " V"],
    statistics: dict[str, Float[jax.Array, "..."]],
    token: Float[jax.Array, " D"],
    unit: Float[jax.Array, " E"],
) -> dict[str, jax.Array]:
    """The metrics that `checks` and the charts read.

    Args:
      loss, statistics: as `prototypes.class_term` and `crossed.crossed_term` return them.
      token: `prototypes.mean_direction` of the teacher's class tokens. unit: mean of its unit vectors.
    """
    teacher = prototypes.teacher_statistics(loss, statistics)
    return {
        "teacher/entropy": teacher["teacher_entropy"],
        "teacher/entropy_of_mean": teacher["teacher_entropy_of_mean"],
        "teacher/prototypes_in_use": teacher["prototypes_in_use"],
        "teacher/kl_to_uniform": jnp.log(len(statistics["mean"])) - teacher["teacher_entropy_of_mean"],
        "teacher/feature_variance": 1 - jnp.sum(jnp.square(token)),
        "teacher/unit_variance": 1 - jnp.sum(jnp.square(unit)),
        "kl": teacher["kl"],
    }


def started(center: Float[jax.Array, " K"]) -> str:
    """The sentence of `Objective.with_estimate` for a center that was estimated."""
    return f"the center starts as the teacher's mean output, of norm {float(jnp.linalg.norm(center)):.3g}"


# ---------------------------------------------------------------- health checks


class Remedies(NamedTuple):
    """What to do about each condition: the end of its text, which names the method's own fields."""

    few: str
    unused: str
    uniform: str
    features: str


def conditions(remedies: Remedies) -> tuple[Condition, ...]:
    """The conditions of a method, and those that are common to all methods."""
    return (
        Condition(
            "collapse to few prototypes", "spread", 0.35, 0.45, False,
            "the teacher's targets of a batch use only about {effective:.1f} of {prototypes} prototypes (KL of their "
            "mean to the uniform {kl_to_uniform:.2f} of {log_k:.2f} nats, mean entropy {entropy_nats:.2f}); "
            + remedies.few,
        ),
        Condition(
            "prototypes unused", "used", 0.35, 0.45, True,
            "only about {prototypes_used:.1f} of {prototypes} prototypes are the most probable one of any crop in a "
            "batch of {images} images; " + remedies.unused,
        ),
        Condition(
            "uniform teacher", "entropy", 0.985, 0.97, True,
            "the teacher's targets are nearly uniform and carry no information (entropy {entropy_nats:.2f} of "
            "{log_k:.2f} nats); " + remedies.uniform,
        ),
        Condition(
            "features collapse", "variance", 0.05, 0.10, True,
            "the teacher's class tokens are nearly the same for all crops (variance of their directions {variance:.4f} "
            "of 1); " + remedies.features,
        ),
        *watched.COMMON_CONDITIONS,
    )  # fmt: skip


def averaged(values: Mapping[str, float], floor: tuple[str, ...] = ("teacher/entropy",)) -> dict[str, float]:
    """The averaged quantities, from the metrics of a step; `excess` is the loss above its lower bound, the sum of the
    metrics `floor`."""
    return watched.common_averages(values) | {
        "entropy_nats": values["teacher/entropy"],
        "entropy_of_mean": values["teacher/entropy_of_mean"],
        "prototypes_used": values["teacher/prototypes_in_use"],
        "variance": values["teacher/feature_variance"],
        "excess": values["loss"] - sum(values[name] for name in floor),
    }


def checks(
    remedies: Remedies, prototypes: int, images: int, floor: tuple[str, ...] = ("teacher/entropy",)
) -> HealthChecks:
    """The health checks of a method with a number of prototypes, for a batch of `images`; `floor` as in `averaged`."""
    log_k, log_possible = math.log(prototypes), math.log(min(prototypes, images))

    def quantities(averages: Mapping[str, float]) -> dict[str, Any]:
        of_mean, used = averages["entropy_of_mean"], math.log(max(averages["prototypes_used"], 1.0))
        return {
            # the crops of one image may have the same target
            "spread": of_mean / log_possible if log_possible else 1.0,
            "used": used / log_possible if log_possible else 1.0,
            "entropy": averages["entropy_nats"] / log_k, "log_k": log_k,
            "effective": math.exp(of_mean), "kl_to_uniform": log_k - of_mean,
            "prototypes": prototypes, "images": images, "excess_name": "loss minus the teacher's entropy",
        }  # fmt: skip

    return HealthChecks(conditions(remedies), functools.partial(averaged, floor=floor), quantities)


# ---------------------------------------------------------------- charts

TEACHER = (
    Panel("Entropy of the teacher, nats", False, True,
          {"teacher/entropy": "of each view", "teacher/entropy_of_mean": "of their mean"}),
    Panel("KL of student from teacher, nats", False, True, {"kl": "kl"}),
    Panel("KL of their mean from uniform, nats", False, True, {"teacher/kl_to_uniform": "kl"}),
    Panel("Variance of directions (0: all equal)", False, True,
          {"teacher/feature_variance": "class tokens", "teacher/unit_variance": "head"}),
    Panel("Prototypes in use", True, True, {"teacher/prototypes_in_use": "prototypes"}),
)  # fmt: skip
CENTER = Panel("Norm of the center", False, True, {"teacher/center_norm": "center"})
MOMENTUM = Panel("Momentum of the teacher", False, False, {"hyper/momentum": "momentum"})
TEMPERATURES = Panel(
    "Temperatures", False, False, {"hyper/teacher_temperature": "teacher", "hyper/student_temperature": "student"}
)
