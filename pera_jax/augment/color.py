"""Color changes of crops inside the jitted step, then normalization: the engine, whatever a method's policy.

Brightness and contrast are for all bands; contrast blends the three bands that are red, green and blue with their mean
luma, any other with its own mean. Saturation, grayscale and hue are for the three, where the config says which they are.

Brightness, contrast and saturation are one form, `a v + b luma + c`, and grayscale is saturation 0. They and the hue shift
are applied in an order of the crop's own, with values clipped to [0, 1] after each. How that is done without paying
for all 24 orders depends on the platform: see `apply`.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pera_jax.bands import Bands

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
_NOTHING = 4  # in place of an operation that leaves the crop as it is
UNCHANGED = np.array([1, 1, 1, 0], np.float32)
GRAYSCALE = np.array([1, 1, 0, 0], np.float32)
_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601

Planes = tuple[jax.Array, ...]  # one array of values in [0, 1] per band: bands in the innermost axis do not vectorize


class Jitter(NamedTuple):
    """What happens to the colors of N crops.

    factors: float32 [N, 4], of brightness, contrast and saturation (1 changes nothing, saturation 0 is grayscale), and the
      hue shift in turns (0 changes nothing; within +-0.5).
    order: int32 [N, 4], each row a permutation of BRIGHTNESS, CONTRAST, SATURATION, HUE: what is done first, then, ...
    """

    factors: jax.Array
    order: jax.Array


Rgb = tuple[int, int, int] | None  # the channels that are red, green and blue, where there are such


def draw(key: jax.Array, number: int, reach: tuple[float, float, float, float]) -> Jitter:
    """A jitter for each of `number` crops: factors uniform in 1 +- reach (the hue shift in +- reach), in a random order.

    Args:
      reach: of brightness, contrast, saturation and hue.
    """
    factor_key, order_key = jax.random.split(key)
    draws = jax.random.uniform(factor_key, (number, 4), jnp.float32, minval=-1.0, maxval=1.0)
    order = jnp.argsort(jax.random.uniform(order_key, (number, 4), jnp.float32), axis=1).astype(jnp.int32)
    return Jitter(UNCHANGED + jnp.array(reach, jnp.float32) * draws, order)


@jax.named_scope("color")
def apply(crops: jax.Array, jitter: Jitter, bands: Bands, rgb: Rgb, dtype=jnp.float32) -> jax.Array:
    """Each crop with its colors changed as its row of `jitter` says, then normalized.

    Brightness multiplies; contrast blends with the crop's mean luma and saturation with each pixel's luma:
    f x + (1 - f) y; hue turns in HSV. Values are clipped to [0, 1] after each. A crop whose row changes nothing comes
    out as (bands.mapped(crop) - mean) / std.

    On CPU a loop over crops runs just the operations that change each crop: a quarter of the work. (Crops sharded over
    several virtual CPU devices are gathered for it.) On other devices, which a loop would leave idle, all crops are
    worked on together, and each keeps what it wants.

    Args:
      crops: [N, H, W, C] of the bands' dtype.
      bands: what maps to [0, 1], mean and std.
      rgb: from `bands.rgb_places`; where it is None saturation and hue must be unchanged.

    Returns:
      [N, H, W, C] in `dtype`, computed in float32 or, where `dtype` is wider, in it.
    """
    wide = jnp.promote_types(jnp.float32, dtype)
    settings = dict(bands=bands, rgb=rgb, wide=wide, dtype=dtype)
    return jax.lax.platform_dependent(
        crops,
        jitter._replace(factors=jitter.factors.astype(wide)),
        cpu=functools.partial(apply_by_crop, **settings),
        default=functools.partial(apply_together, **settings),
    )


def apply_by_crop(crops: jax.Array, jitter: Jitter, bands: Bands, rgb: Rgb, wide, dtype) -> jax.Array:
    """`apply` as a loop over crops; computes in `wide`."""

    def one_crop(crop):
        image, factors, operations = crop  # [H, W, C], [4], [4]
        brightness, contrast, saturation, turn = factors
        branches = [
            lambda planes: _affine(planes, rgb, brightness),
            lambda planes: _affine(planes, rgb, contrast, c=1 - contrast, means=_means(planes, rgb, (0, 1))),
        ]
        if rgb:
            branches.append(lambda planes: _colors(planes, _affine(planes, rgb, saturation, b=1 - saturation), rgb))
            branches.append(lambda planes: _hue(planes, rgb, turn))
        planes = jax.lax.fori_loop(
            0,
            jnp.sum(operations != _NOTHING),
            lambda step, planes: jax.lax.switch(operations[step], branches, planes),
            _planes(image, bands, wide),
        )
        return _normalize(planes, bands, dtype)

    return jax.lax.map(one_crop, (crops, jitter.factors, _operations(jitter)))


def apply_together(crops: jax.Array, jitter: Jitter, bands: Bands, rgb: Rgb, wide, dtype) -> jax.Array:
    """`apply` for all crops at once, one place of their orders after the other; computes in `wide`.

    At each place every crop gets an affine operation with its own coefficients and a hue shift, and keeps the one that
    is its own. A scan, and not four copies of its body: it keeps the compiler from fusing the places into one kernel,
    in which each band is computed from three, each of them from three again, and so on.
    """
    operations = _operations(jitter)

    def place(state, here):
        planes, means = state
        operation, a, b, c, turn = (value[:, None, None] for value in here)  # [N, 1, 1]
        after = _affine(planes, rgb, a, b=b if rgb else None, c=c, means=means)
        if rgb:
            turned, saturated = _hue(planes, rgb, turn), _colors(planes, after, rgb)
            after = tuple(
                jnp.where(operation == HUE, hue, jnp.where(operation == SATURATION, grey, other))
                for hue, grey, other in zip(turned, saturated, after, strict=True)
            )
        return (after, _means(after, rgb, (1, 2))), None  # measured here, it costs no pass of its own

    planes = _planes(crops, bands, wide)
    places = [value.T for value in (operations, *_coefficients(jitter.factors, operations))]  # each [4, N]
    (planes, _), _ = jax.lax.scan(place, (planes, _means(planes, rgb, (1, 2))), places)
    return _normalize(planes, bands, dtype)


def _operations(jitter: Jitter) -> jax.Array:
    """int32 [N, 4]: `order` without operations that change nothing, and `_NOTHING` in the places left at the end."""
    changes = jnp.take_along_axis(jitter.factors != UNCHANGED, jitter.order, axis=1)  # [N, 4]
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


def _planes(crops: jax.Array, bands: Bands, dtype) -> Planes:
    values = bands.mapped(crops, dtype)
    return tuple(values[..., band] for band in range(len(bands)))


def _normalize(planes: Planes, bands: Bands, dtype) -> jax.Array:
    return jnp.stack(
        [(plane - mean) / std for plane, mean, std in zip(planes, bands.mean, bands.std, strict=True)], axis=-1
    ).astype(dtype)


def _luma(planes: Planes, rgb: tuple[int, int, int]) -> jax.Array:
    return sum(weight * planes[at] for weight, at in zip(_LUMA, rgb, strict=True))


def _means(planes: Planes, rgb: Rgb, axes: tuple[int, int]) -> Planes:
    """What contrast blends each band with: the mean luma of the three colors, the mean of any other band."""
    luma = jnp.mean(_luma(planes, rgb), axis=axes, keepdims=True) if rgb else None
    return tuple(
        luma if rgb and at in rgb else jnp.mean(plane, axis=axes, keepdims=True) for at, plane in enumerate(planes)
    )


def _affine(planes: Planes, rgb: Rgb, a: jax.Array, *, b=None, c=None, means: Planes | None = None) -> Planes:
    """clip(a v + b luma + c mean), b or c None where it is 0."""
    luma = 0 if b is None else b * _luma(planes, rgb)
    shifts = (luma,) * len(planes) if c is None else tuple(luma + c * mean for mean in means)
    return tuple(jnp.clip(a * plane + shift, 0, 1) for plane, shift in zip(planes, shifts, strict=True))


def _colors(planes: Planes, changed: Planes, rgb: tuple[int, int, int]) -> Planes:
    """`changed` for the three colors, `planes` for the other bands."""
    return tuple(changed[at] if at in rgb else plane for at, plane in enumerate(planes))


def _hue(planes: Planes, rgb: tuple[int, int, int], turn: jax.Array) -> Planes:
    """Turns the hue of the three colors by `turn` (within +-0.5) in HSV, keeping the largest and the smallest of the
    three values.

    The hue, in sixths of a turn, is kept times the chroma, which spares the division and its case of no chroma.
    """
    red, green, blue = (planes[at] for at in rgb)
    high, low = jnp.maximum(jnp.maximum(red, green), blue), jnp.minimum(jnp.minimum(red, green), blue)
    chroma = high - low
    hue = jnp.where(
        high == red, green - blue, jnp.where(high == green, 2 * chroma + blue - red, 4 * chroma + red - green)
    )
    hue = hue + 6 * turn * chroma
    hue = jnp.where(hue < 0, hue + 6 * chroma, hue)
    hue = jnp.where(hue >= 6 * chroma, hue - 6 * chroma, hue)
    turned = (
        low + jnp.clip(jnp.abs(hue - 3 * chroma) - chroma, 0, chroma),
        low + jnp.clip(2 * chroma - jnp.abs(hue - 2 * chroma), 0, chroma),
        low + jnp.clip(2 * chroma - jnp.abs(hue - 4 * chroma), 0, chroma),
    )
    return tuple(turned[rgb.index(at)] if at in rgb else plane for at, plane in enumerate(planes))
