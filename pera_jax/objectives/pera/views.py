"""The two views of each crop: the color augmentation of student and teacher (Shen et al., section 3; released config).

The student's view is augmented with probability 0.8 (a tenth of these become grayscale, the others get color jitter),
the teacher's view gets color jitter with probability 0.1. Both share the crop, which the host has made. Draws are
independent between crops, and between student and teacher.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Key, Real

from pera_jax.augment import color
from pera_jax.bands import Bands, rgb_indices
from pera_jax.common.errors import UserError
from pera_jax.objectives.base import CropSpec
from pera_jax.objectives.pera import masks
from pera_jax.objectives.pera.masks import Masks
from pera_jax.parallel import sharding


@no_type_check  # as a pytree, it also holds what JAX puts in place of arrays: shapes, shardings, None
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Views:
    """Both views of the crops of one type, batch-major: crop v of image b is row `b * V + v`."""

    student: jax.Array  # [B V, H, W, C], normalized
    teacher: jax.Array  # [B V, H, W, C], normalized
    masks: Masks


@no_type_check  # as `Views`
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Draws:
    """All random draws for the crops of one type and a whole batch. Leaves are [B, V, ...]."""

    student: color.Jitter
    teacher: color.Jitter
    masks: Masks


def check(settings: Any, rgb: Sequence[str], names: Sequence[str]) -> None:
    """Checks `config.pera.views`.

        brightness, contrast, saturation: factors uniform in 1 +- the value; hue: shift uniform in +- the value, turns
        student_change: fraction of the student's views that change; student_grayscale: fraction of the changed ones
        teacher_jitter: fraction of the teacher's views that change

    Args:
      rgb: `config.data.rgb`; names: of the bands.

    Raises:
      UserError: a field is out of range, or saturation, hue or grayscale are used without red, green and blue bands.
    """
    known = rgb_indices(rgb, names) is not None
    for field in (
        "brightness",
        "contrast",
        "saturation",
        "hue",
        "student_change",
        "student_grayscale",
        "teacher_jitter",
    ):
        highest = 0.5 if field == "hue" else 1.0
        if not 0 <= settings[field] <= highest:
            raise UserError(f"pera.views.{field}={settings[field]} must lie in [0, {highest:g}]")
        if not known and field in ("saturation", "hue", "student_grayscale") and settings[field]:
            raise UserError(
                f"pera.views.{field}={settings[field]} needs red, green and blue bands, got bands {', '.join(names)}; "
                "set it to 0, or name the three bands in data.rgb"
            )


def draw_jitter(key: Key[jax.Array, ""], number: int, settings: Any) -> tuple[color.Jitter, color.Jitter]:
    """Independent jitters for the student's and the teacher's views of `number` crops; `settings` as in `check`."""
    student_key, teacher_key, change_key, gray_key, teacher_change_key = jax.random.split(key, 5)
    strength = tuple(settings[name] for name in ("brightness", "contrast", "saturation", "hue"))

    def happens(key, probability):
        return jax.random.uniform(key, (number, 1), jnp.float32) < probability  # [N, 1]

    student, teacher = color.draw(student_key, number, strength), color.draw(teacher_key, number, strength)
    changed = jnp.where(happens(gray_key, settings["student_grayscale"]), color.GRAYSCALE, student.factors)
    student_factors = jnp.where(happens(change_key, settings["student_change"]), changed, color.UNCHANGED)
    teacher_changed = happens(teacher_change_key, settings["teacher_jitter"])
    teacher_factors = jnp.where(teacher_changed, teacher.factors, color.UNCHANGED)
    return color.Jitter(student_factors, student.order), color.Jitter(teacher_factors, teacher.order)


def draw(
    key: Key[jax.Array, ""], number: int, crops: dict[str, CropSpec], parts: dict[str, masks.Counts], settings: Any
) -> dict[str, Draws]:
    """All random draws for the crops of `number` images, by crop type; leaves are [B, V, ...]."""
    draws = {}
    for index, (name, counts) in enumerate(parts.items()):
        view_key, mask_key = jax.random.split(jax.random.fold_in(key, index))
        total = number * crops[name].number
        drawn = Draws(*draw_jitter(view_key, total, settings), masks.sample(mask_key, total, counts))
        draws[name] = jax.tree.map(lambda x: rearrange(x, "(b v) ... -> b v ...", b=number), drawn)
    return draws


def make(
    crops: dict[str, Real[jax.Array | np.ndarray, "B _V _H _W C"]],
    draws: dict[str, Draws],
    bands: Bands,
    rgb: color.Rgb,
    dtype: Any,
) -> dict[str, Views]:
    """Two views of each crop and its masks, from crops in the stored dtype."""

    def view(crops, jitter):
        return color.apply(crops, jitter, bands, rgb, dtype)  # [B V, H, W, C]

    result = {}
    for name, drawn in draws.items():
        flat, drawn = jax.tree.map(lambda x: rearrange(x, "b v ... -> (b v) ..."), (crops[name], drawn))  # [B V, ...]
        student, teacher = (sharding.per_shard(view, flat, jitter) for jitter in (drawn.student, drawn.teacher))
        result[name] = Views(student, teacher, drawn.masks)
    return result
