"""Two looks of each crop: colour jitter, grey, normalisation (Shen et al., section 3; released configuration).

The student's view is changed with probability 0.8 (one changed crop in ten goes grey, the others get colour jitter),
the teacher's gets colour jitter with probability 0.1. Geometry is shared and was settled on the host; every crop and,
for each crop, student and teacher draw independently. Runs inside the jitted step, so one 8-bit crop per pair is all
that crosses to the device.

Brightness, contrast and saturation are one form, `a v + b luma + c`, and grey is saturation 0. They and the hue shift
are applied in an order of the crop's own, with values clipped to [0, 1] after each. How that is done without paying
for all 24 orders depends on the platform: see `look`.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pera_jax.errors import UserError

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
_NOTHING = 4  # in place of an operation that leaves the crop as it is
_UNCHANGED = np.array([1, 1, 1, 0], np.float32)
_GREY = np.array([1, 1, 0, 0], np.float32)
_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601

Planes = tuple[jax.Array, ...]  # one array of values in [0, 1] per band: bands in the innermost axis do not vectorise


class Jitter(NamedTuple):
    """What happens to the colours of N crops.

    factors: float32 [N, 4], of brightness, contrast and saturation (1 changes nothing, saturation 0 is grey), and the
      hue shift in turns (0 changes nothing; within +-0.5).
    order: int32 [N, 4], each row a permutation of BRIGHTNESS, CONTRAST, SATURATION, HUE: what is done first, then, ...
    """

    factors: jax.Array
    order: jax.Array


def check(settings: Any, bands: int) -> None:
    """Raises UserError for a field of `settings`, the config's `views`, that is out of its range or asks for saturation,
    hue or grey of crops that are not red, green, blue.

        brightness, contrast, saturation: factors uniform in 1 +- the value; hue: shift uniform in +- the value, turns
        student_change: share of the student's views that change; student_grey: share of the changed ones
        teacher_jitter: share of the teacher's views that change
    """
    for field in ("brightness", "contrast", "saturation", "hue", "student_change", "student_grey", "teacher_jitter"):
        limit = 0.5 if field == "hue" else 1.0
        if not 0 <= settings[field] <= limit:
            raise UserError(f"views.{field} is {settings[field]}: it must be from 0 to {limit:g}")
        if bands != 3 and field in ("saturation", "hue", "student_grey") and settings[field]:
            raise UserError(
                f"views.{field} is {settings[field]}, but the images have {bands} bands and it is defined for red, "
                "green and blue only: set it to 0"
            )


def draw_jitter(key: jax.Array, number: int, settings: Any) -> tuple[Jitter, Jitter]:
    """Independent draws for the student's and the teacher's views of `number` crops; `settings` as in `check`."""
    student_key, teacher_key, change_key, grey_key, teacher_change_key = jax.random.split(key, 5)

    def happens(key, probability):
        return jax.random.uniform(key, (number, 1), jnp.float32) < probability  # [N, 1]

    student, teacher = _draw_colours(student_key, number, settings), _draw_colours(teacher_key, number, settings)
    changed = jnp.where(happens(grey_key, settings["student_grey"]), _GREY, student.factors)
    student_factors = jnp.where(happens(change_key, settings["student_change"]), changed, _UNCHANGED)
    teacher_changed = happens(teacher_change_key, settings["teacher_jitter"])
    teacher_factors = jnp.where(teacher_changed, teacher.factors, _UNCHANGED)
    return Jitter(student_factors, student.order), Jitter(teacher_factors, teacher.order)


def _draw_colours(key: jax.Array, number: int, settings: Any) -> Jitter:
    factor_key, order_key = jax.random.split(key)
    reach = jnp.array([settings[name] for name in ("brightness", "contrast", "saturation", "hue")], jnp.float32)
    draws = jax.random.uniform(factor_key, (number, 4), jnp.float32, minval=-1.0, maxval=1.0)
    order = jnp.argsort(jax.random.uniform(order_key, (number, 4), jnp.float32), axis=1).astype(jnp.int32)
    return Jitter(_UNCHANGED + reach * draws, order)


def look(crops: jax.Array, jitter: Jitter, mean: Sequence[float], std: Sequence[float], dtype=jnp.float32) -> jax.Array:
    """One look of each crop: its colours changed as its row of `jitter` says, then normalised.

    Brightness multiplies; contrast blends with the crop's mean luma and saturation with each pixel's luma:
    f x + (1 - f) y; hue turns in HSV. Values are clipped to [0, 1] after each. A crop whose row changes nothing comes
    out as (crop / 255 - mean) / std.

    On CPU a loop over crops runs just the operations that change each crop: a quarter of the work. (Crops sharded over
    several virtual CPU devices are gathered for it.) On other devices, which a loop would leave idle, all crops are
    worked on together, and each keeps what it wants.

    Args:
      crops: uint8 [N, H, W, C]. Where C is not 3, luma is the mean of the bands, and saturation and hue must be
        unchanged.
      mean, std: [C], of values in [0, 1].

    Returns:
      [N, H, W, C] in `dtype`, computed in float32 or, where `dtype` is wider, in it.
    """
    wide = jnp.promote_types(jnp.float32, dtype)
    mean, std = jnp.asarray(mean, wide), jnp.asarray(std, wide)
    return jax.lax.platform_dependent(
        crops,
        jitter._replace(factors=jitter.factors.astype(wide)),
        mean,
        std,
        cpu=functools.partial(look_by_crop, dtype=dtype),
        default=functools.partial(look_together, dtype=dtype),
    )


def look_by_crop(crops: jax.Array, jitter: Jitter, mean: jax.Array, std: jax.Array, dtype) -> jax.Array:
    """`look` as a loop over crops; computes in the dtype of `mean`."""

    def one_crop(crop):
        image, factors, operations = crop  # [H, W, C], [4], [4]
        brightness, contrast, saturation, turn = factors
        branches = [
            lambda planes: _affine(planes, brightness, None, None),
            lambda planes: _affine(planes, contrast, None, (1 - contrast) * jnp.mean(_luma(planes))),
            lambda planes: _affine(planes, saturation, 1 - saturation, None),
        ]
        if image.shape[-1] == 3:
            branches.append(lambda planes: _hue(planes, turn))
        planes = jax.lax.fori_loop(
            0,
            jnp.sum(operations != _NOTHING),
            lambda step, planes: jax.lax.switch(operations[step], branches, planes),
            _planes(image, mean.dtype),
        )
        return _normalise(planes, mean, std, dtype)

    return jax.lax.map(one_crop, (crops, jitter.factors, _operations(jitter)))


def look_together(crops: jax.Array, jitter: Jitter, mean: jax.Array, std: jax.Array, dtype) -> jax.Array:
    """`look` for all crops at once, one place of their orders after the other; computes in the dtype of `mean`.

    At each place every crop gets an affine operation with its own coefficients and a hue shift, and keeps the one that
    is its own. A scan, and not four copies of its body: it keeps the compiler from fusing the places into one kernel,
    in which each band is computed from three, each of them from three again, and so on.
    """
    operations = _operations(jitter)

    def mean_luma(planes):
        return jnp.mean(_luma(planes), axis=(1, 2), keepdims=True)  # [N, 1, 1]

    def place(state, here):
        planes, average = state
        operation, a, b, c, turn = (value[:, None, None] for value in here)  # [N, 1, 1]
        planes_after = _affine(planes, a, b, c * average)
        if len(planes) == 3:
            turned = _hue(planes, turn)
            planes_after = tuple(
                jnp.where(operation == HUE, hue, other) for hue, other in zip(turned, planes_after, strict=True)
            )
        return (planes_after, mean_luma(planes_after)), None  # measured here, it costs no pass of its own

    planes = _planes(crops, mean.dtype)
    places = [value.T for value in (operations, *_coefficients(jitter.factors, operations))]  # each [4, N]
    (planes, _), _ = jax.lax.scan(place, (planes, mean_luma(planes)), places)
    return _normalise(planes, mean, std, dtype)


def _operations(jitter: Jitter) -> jax.Array:
    """int32 [N, 4]: `order` without operations that change nothing, and `_NOTHING` in the places left at the end."""
    changes = jnp.take_along_axis(jitter.factors != _UNCHANGED, jitter.order, axis=1)  # [N, 4]
    kept_first = jnp.argsort(~changes, axis=1, stable=True)
    return jnp.take_along_axis(jnp.where(changes, jitter.order, _NOTHING), kept_first, axis=1)


def _coefficients(factors: jax.Array, operations: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Of each operation as a v + b luma + c mean(luma), and its hue shift in turns: each [N, 4]."""
    factor = jnp.take_along_axis(factors, jnp.minimum(operations, HUE), axis=1)
    is_affine = operations < HUE
    a = jnp.where(is_affine, factor, 1)
    b = jnp.where(operations == SATURATION, 1 - factor, 0)
    c = jnp.where(operations == CONTRAST, 1 - factor, 0)
    return a, b, c, jnp.where(operations == HUE, factor, 0)


def _planes(crops: jax.Array, dtype) -> Planes:
    return tuple(crops[..., band].astype(dtype) / 255 for band in range(crops.shape[-1]))


def _normalise(planes: Planes, mean: jax.Array, std: jax.Array, dtype) -> jax.Array:
    return jnp.stack([(plane - mean[band]) / std[band] for band, plane in enumerate(planes)], axis=-1).astype(dtype)


def _luma(planes: Planes) -> jax.Array:
    weights = _LUMA if len(planes) == 3 else (1 / len(planes),) * len(planes)
    return sum(weight * plane for weight, plane in zip(weights, planes, strict=True))


def _affine(planes: Planes, a: jax.Array, b: jax.Array | None, c: jax.Array | None) -> Planes:
    """clip(a v + b luma + c): brightness, contrast and saturation, b or c None where it is 0."""
    shift = 0 if b is None else b * _luma(planes)
    shift = shift if c is None else shift + c
    return tuple(jnp.clip(a * plane + shift, 0, 1) for plane in planes)


def _hue(planes: Planes, turn: jax.Array) -> Planes:
    """Turns the hue by `turn` (within +-0.5) in HSV, keeping the largest and the smallest of the three values.

    The hue, in sixths of a turn, is kept times the chroma, which spares the division and its case of no chroma.
    """
    red, green, blue = planes
    high, low = jnp.maximum(jnp.maximum(red, green), blue), jnp.minimum(jnp.minimum(red, green), blue)
    chroma = high - low
    hue = jnp.where(
        high == red, green - blue, jnp.where(high == green, 2 * chroma + blue - red, 4 * chroma + red - green)
    )
    hue = hue + 6 * turn * chroma
    hue = jnp.where(hue < 0, hue + 6 * chroma, hue)
    hue = jnp.where(hue >= 6 * chroma, hue - 6 * chroma, hue)
    return (
        low + jnp.clip(jnp.abs(hue - 3 * chroma) - chroma, 0, chroma),
        low + jnp.clip(2 * chroma - jnp.abs(hue - 2 * chroma), 0, chroma),
        low + jnp.clip(2 * chroma - jnp.abs(hue - 4 * chroma), 0, chroma),
    )
