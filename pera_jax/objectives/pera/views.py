"""The two views of each crop: what colors of student and teacher may change (Shen et al., section 3; released config).

The student's view is changed with probability 0.8 (one changed crop in ten turns grayscale, the others get color jitter), the
teacher's gets color jitter with probability 0.1. Geometry is shared and was settled on the host; every crop and, for each
crop, student and teacher draw independently.
"""

from typing import Any

import jax
import jax.numpy as jnp

from pera_jax.augment import color
from pera_jax.bands import rgb_indices
from pera_jax.common.errors import UserError


def check(settings: Any, rgb: tuple[str, ...], names: tuple[str, ...]) -> None:
    """Checks `config.pera.views`.

        brightness, contrast, saturation: factors uniform in 1 +- the value; hue: shift uniform in +- the value, turns
        student_change: fraction of the student's views that change; student_grayscale: fraction of the changed ones
        teacher_jitter: fraction of the teacher's views that change

    Args:
      rgb: `config.data.rgb`; names: of the bands.

    Raises:
      UserError: a field that is out of range, or saturation, hue or grayscale where it is not known which bands are red,
        green and blue.
    """
    known = rgb_indices(rgb, names) is not None
    for field in ("brightness", "contrast", "saturation", "hue", "student_change", "student_grayscale", "teacher_jitter"):
        highest = 0.5 if field == "hue" else 1.0
        if not 0 <= settings[field] <= highest:
            raise UserError(f"pera.views.{field}={settings[field]} must lie in [0, {highest:g}]")
        if not known and field in ("saturation", "hue", "student_grayscale") and settings[field]:
            raise UserError(
                f"pera.views.{field}={settings[field]} needs to know which bands are red, green and blue, and the bands are "
                f"{', '.join(names)}; set it to 0, or name the three in data.rgb"
            )


def draw_jitter(key: jax.Array, number: int, settings: Any) -> tuple[color.Jitter, color.Jitter]:
    """Independent draws for the student's and the teacher's views of `number` crops; `settings` as in `check`."""
    student_key, teacher_key, change_key, gray_key, teacher_change_key = jax.random.split(key, 5)
    reach = tuple(settings[name] for name in ("brightness", "contrast", "saturation", "hue"))

    def happens(key, probability):
        return jax.random.uniform(key, (number, 1), jnp.float32) < probability  # [N, 1]

    student, teacher = color.draw(student_key, number, reach), color.draw(teacher_key, number, reach)
    changed = jnp.where(happens(gray_key, settings["student_grayscale"]), color.GRAYSCALE, student.factors)
    student_factors = jnp.where(happens(change_key, settings["student_change"]), changed, color.UNCHANGED)
    teacher_changed = happens(teacher_change_key, settings["teacher_jitter"])
    teacher_factors = jnp.where(teacher_changed, teacher.factors, color.UNCHANGED)
    return color.Jitter(student_factors, student.order), color.Jitter(teacher_factors, teacher.order)
