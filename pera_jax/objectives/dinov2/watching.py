"""The metrics of a DINOv2 run, its health checks, and its charts in the report."""

from typing import Any

import jax
import jax.numpy as jnp

from pera_jax.losses import prototypes
from pera_jax.objectives import prototype_checks
from pera_jax.objectives.watched import HealthChecks, Panel

REMEDIES = prototype_checks.Remedies(
    few="set dinov2.targets=sinkhorn, and raise dinov2.teacher_temperature or dinov2.loss.koleo_weight",
    unused="set dinov2.targets=sinkhorn, or raise dinov2.loss.koleo_weight",
    uniform="lower schedules.learning_rate.peak or dinov2.teacher_temperature",
    features="lower schedules.learning_rate.peak, or raise dinov2.loss.koleo_weight",
)
CURVES = (
    ("Loss terms", (
        Panel("Class term, nats", False, True,
              {"loss/class": "all", "loss/class_global": "global part", "loss/class_local": "local part"}),
        Panel("Patch term, nats", False, True, {"loss/patch": "all", "loss/patch_lowest": "lower bound"}),
        Panel("KoLeo term", False, True, {"loss/koleo": "koleo"}),
    )),
    ("Teacher", (
        *prototype_checks.TEACHER,
        Panel("Patches: entropy of the teacher, nats", False, True,
              {"teacher/patch_entropy": "of each patch", "teacher/patch_entropy_of_mean": "of their mean"}),
        Panel("Patches: KL of student from teacher, nats", False, True, {"kl_patch": "kl"}),
        Panel("Patches: prototypes in use", True, True, {"teacher/patch_prototypes_in_use": "prototypes"}),
        Panel("Norms of the centers", False, True,
              {"teacher/center_norm": "class tokens", "teacher/patch_center_norm": "patches"}),
    )),
    ("Schedules", (prototype_checks.MOMENTUM, prototype_checks.TEMPERATURES)),
)  # fmt: skip


def checks(number: int, images: int) -> HealthChecks:
    """The health checks for a `number` of prototypes of class tokens and a batch of `images`."""
    return prototype_checks.checks(REMEDIES, number, images, floor=("teacher/entropy", "loss/patch_lowest"))


def metrics(aux: dict[str, Any]) -> dict[str, jax.Array]:
    """The metrics of a step, without those of the centers, from the `aux` of the whole batch."""
    per_crop = aux["per_crop"]
    masked = jnp.maximum(aux["masked"], 1e-12)  # 0 if all masks are empty
    patch_statistics = {name: each / masked for name, each in aux["patch_statistics"].items()}
    patch = prototypes.teacher_statistics(aux["patch"][None] / masked, patch_statistics)
    found = {
        "loss": aux["loss"],
        "loss/class": jnp.mean(per_crop),
        "loss/class_global": jnp.sum(per_crop[:2]) / len(per_crop),
        "loss/class_local": jnp.sum(per_crop[2:]) / len(per_crop),
        "loss/patch": aux["patch"],
        "loss/patch_lowest": masked * patch["teacher_entropy"],  # if the student's probabilities are the teacher's
        "loss/koleo": aux["koleo"],
        "teacher/patch_entropy": patch["teacher_entropy"],
        "teacher/patch_entropy_of_mean": patch["teacher_entropy_of_mean"],
        "teacher/patch_prototypes_in_use": patch["prototypes_in_use"],
        "kl_patch": patch["kl"],
    }  # fmt: skip
    return found | prototype_checks.teacher_metrics(per_crop, aux["statistics"], aux["token"], aux["unit"])
