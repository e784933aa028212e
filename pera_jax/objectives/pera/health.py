"""The health checks of a PerA run: collapse of the teacher's targets or of its features.

The bounds are relative to the best possible value (the entropy over all prototypes, a different prototype for each
image of a batch), so they hold for any number of prototypes and any batch size. Until the learning rate has reached its
peak, a healthy teacher may give the same targets to all crops, so some conditions wait for it.
"""

import math
from collections.abc import Mapping
from typing import Any

from pera_jax.objectives import watched
from pera_jax.objectives.watched import Condition, HealthChecks

CONDITIONS = (
    Condition(
        "collapse to few prototypes", "spread", 0.35, 0.45, False,
        "the teacher's targets of a batch use only about {effective:.1f} of {prototypes} prototypes (KL of their mean "
        "to the uniform {kl_to_uniform:.2f} of {log_k:.2f} nats, mean entropy {entropy_nats:.2f}); set "
        "pera.loss.center_momentum=0.9, and raise pera.teacher_temperature or pera.loss.koleo_weight",
    ),
    Condition(
        "prototypes unused", "used", 0.35, 0.45, True,
        "only about {prototypes_used:.1f} of {prototypes} prototypes are the most probable one of any crop in a batch "
        "of {images} images; set pera.loss.center_momentum=0.9, or raise pera.loss.koleo_weight",
    ),
    Condition(
        "uniform teacher", "entropy", 0.985, 0.97, True,
        "the teacher's targets are nearly uniform and carry no information (entropy {entropy_nats:.2f} of {log_k:.2f} "
        "nats); lower schedules.learning_rate.peak or pera.teacher_temperature",
    ),
    Condition(
        "features collapse", "variance", 0.05, 0.10, True,
        "the teacher's class tokens are nearly the same for all crops (variance of their directions {variance:.4f} of "
        "1); lower schedules.learning_rate.peak, or raise pera.loss.koleo_weight",
    ),
    *watched.COMMON_CONDITIONS,
)  # fmt: skip


def averaged(values: Mapping[str, float]) -> dict[str, float]:
    """The averaged quantities, from the metrics of a step; `excess` is the loss above its lower bound, the teacher's
    entropy."""
    return watched.common_averages(values) | {
        "entropy_nats": values["teacher/entropy"],
        "entropy_of_mean": values["teacher/entropy_of_mean"],
        "prototypes_used": values["teacher/prototypes_in_use"],
        "variance": values["teacher/feature_variance"],
        "excess": values["loss"] - values["teacher/entropy"],
    }


def checks(prototypes: int, images: int) -> HealthChecks:
    """The health checks for a number of prototypes and a batch of `images`."""
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

    return HealthChecks(CONDITIONS, averaged, quantities)
