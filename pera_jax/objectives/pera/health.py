"""The health checks of a PerA run: those of methods with prototypes, with PerA's fields in their texts."""

from pera_jax.objectives import prototype_checks
from pera_jax.objectives.watched import HealthChecks

REMEDIES = prototype_checks.Remedies(
    few="set pera.loss.center_momentum=0.9, and raise pera.teacher_temperature or pera.loss.koleo_weight",
    unused="set pera.loss.center_momentum=0.9, or raise pera.loss.koleo_weight",
    uniform="lower schedules.learning_rate.peak or pera.teacher_temperature",
    features="lower schedules.learning_rate.peak, or raise pera.loss.koleo_weight",
)
CONDITIONS = prototype_checks.conditions(REMEDIES)


def checks(prototypes: int, images: int) -> HealthChecks:
    """The health checks for a number of prototypes and a batch of `images`."""
    return prototype_checks.checks(REMEDIES, prototypes, images)
