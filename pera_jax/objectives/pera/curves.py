"""The charts of a PerA run in the report."""

from pera_jax.objectives import prototype_checks
from pera_jax.objectives.watched import Panel

CURVES = (
    ("Loss terms", (
        Panel("Class term, nats", False, True,
              {"loss/class": "all", "loss/class_global": "global part", "loss/class_local": "local part"}),
        Panel("KoLeo term", False, True, {"loss/koleo": "koleo"}),
        Panel("Pixel term", True, True, {"loss/pixel": "pixel"}),
    )),
    ("Teacher", (*prototype_checks.TEACHER, prototype_checks.CENTER)),
    ("Schedules", (prototype_checks.MOMENTUM, prototype_checks.TEMPERATURES)),
)  # fmt: skip
