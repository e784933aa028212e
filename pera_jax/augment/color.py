"""Color jitter and normalization of crops inside the jitted step. Which crops are jittered, and how much, is up to the
method.

Brightness and contrast apply to all bands. Contrast blends red, green and blue with their mean luma, and any other band
with its own mean. Saturation, grayscale and hue apply to red, green and blue, and need the config to say which bands
these are.

Brightness, contrast and saturation have the common form `a v + b luma + c`; grayscale is saturation 0. These and the
hue shift are applied in a random order per crop, and values are clipped to [0, 1] after each. See `apply` for how this
is done on each platform without computing all 24 orders.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Key, Real

from pera_jax.bands import Bands

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
_NO_OP = 4  # the index of no operation
UNCHANGED = np.array([1, 1, 1, 0], np.float32)
GRAYSCALE = np.array([1, 1, 0, 0], np.float32)
_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601

# one array of values in [0, 1] per band; XLA vectorizes poorly with bands on the last axis
Planes = tuple[jax.Array, ...]


class Jitter(NamedTuple):
    """The color jitter of N crops.

    Attributes:
      factors: float32 [N, 4]: the factors of brightness, contrast and saturation (1: unchanged; saturation 0:
        grayscale), and the hue shift in turns, in [-0.5, 0.5] (0: unchanged).
      order: int32 [N, 4]: each row is a permutation of BRIGHTNESS, CONTRAST, SATURATION, HUE, in order of application.
    """

    factors: jax.Array
    order: jax.Array


Rgb = tuple[int, int, int] | None  # indices of the red, green and blue channels; None if there are none


def draw(key: Key[jax.Array, ""], number: int, strength: tuple[float, float, float, float]) -> Jitter:
    """A random jitter for each of `number` crops, in random order.

    Args:
      strength: s of brightness, contrast, saturation and hue: factors are uniform in [1 - s, 1 + s], the hue shift in
        [-s, s].
    """
    factor_key, order_key = jax.random.split(key)
    draws = jax.random.uniform(factor_key, (number, 4), jnp.float32, minval=-1.0, maxval=1.0)
    order = jnp.argsort(jax.random.uniform(order_key, (number, 4), jnp.float32), axis=1).astype(jnp.int32)
    return Jitter(UNCHANGED + jnp.array(strength, jnp.float32) * draws, order)


@jax.named_scope("color")
def apply(
    crops: Real[jax.Array | np.ndarray, "N H W C"], jitter: Jitter, bands: Bands, rgb: Rgb, dtype=jnp.float32
) -> Float[jax.Array, "N H W C"]:
    """Applies row i of `jitter` to crop i, then normalizes.

    Brightness multiplies. Contrast blends with the crop's mean luma, and saturation with each pixel's luma:
    f x + (1 - f) y. Hue rotates in HSV. Values are clipped to [0, 1] after each. An unchanged crop is
    `(bands.mapped(crop) - mean) / std`.

    On CPU, a loop over crops runs only the operations that change each crop, which is a quarter of the work. (It
    gathers crops that are sharded over several virtual CPU devices.) On other devices, which a loop would leave idle,
    all operations run on the whole batch, and each crop selects its own result.

    Args:
      crops: in the dtype of `bands`.
      bands: range that maps to [0, 1], mean and std of each channel.
      rgb: from `bands.rgb_indices`; if None, saturation and hue must be unchanged.

    Returns:
      The crops in `dtype`, computed in float32, or in `dtype` if that is wider.
    """
    wide = jnp.promote_types(jnp.float32, dtype)
    settings = dict(bands=bands, rgb=rgb, wide=wide, dtype=dtype)
    return jax.lax.platform_dependent(
        crops,
        jitter._replace(factors=jitter.factors.astype(wide)),
        cpu=functools.partial(apply_by_crop, **settings),
        default=functools.partial(apply_together, **settings),
    )


def apply_by_crop(
    crops: Real[jax.Array | np.ndarray, "N H W C"], jitter: Jitter, bands: Bands, rgb: Rgb, wide, dtype
) -> Float[jax.Array, "N H W C"]:
    """`apply` as a loop over crops, computed in `wide`."""

    def one_crop(crop):
        image, factors, operations = crop  # [H, W, C], [4], [4]
        return normalized(jittered_crop(planes_of(image, bands, wide), factors, operations, rgb), bands, dtype)

    return jax.lax.map(one_crop, (crops, jitter.factors, operations_of(jitter)))


def apply_together(
    crops: Real[jax.Array | np.ndarray, "N H W C"], jitter: Jitter, bands: Bands, rgb: Rgb, wide, dtype
) -> Float[jax.Array, "N H W C"]:
    """`apply` on all crops at once, computed in `wide`."""
    operations = operations_of(jitter)
    return normalized(jittered_crops(planes_of(crops, bands, wide), jitter.factors, operations, rgb), bands, dtype)


def jittered_crop(planes: Planes, factors: jax.Array, operations: jax.Array, rgb: Rgb) -> Planes:
    """The jitter of one crop, planes [H, W]: a loop over the operations that change it.

    Args:
      factors: [4], as in `Jitter`; operations: int32 [4], a row of `operations_of`.
    """
    brightness, contrast, saturation, turn = factors
    branches = [
        lambda planes: _affine(planes, rgb, brightness),
        lambda planes: _affine(planes, rgb, contrast, c=1 - contrast, means=_means(planes, rgb, (0, 1))),
    ]
    if rgb:
        branches.append(lambda planes: _colors(planes, _affine(planes, rgb, saturation, b=1 - saturation), rgb))
        branches.append(lambda planes: _hue(planes, rgb, turn))
    return jax.lax.fori_loop(
        0,
        jnp.sum(operations != _NO_OP),
        lambda step, planes: jax.lax.switch(operations[step], branches, planes),
        planes,
    )


def jittered_crops(planes: Planes, factors: jax.Array, operations: jax.Array, rgb: Rgb) -> Planes:
    """The jitter of N crops, planes [N, H, W]: one position of their orders after the other.

    At each position, every crop gets both an affine operation with its own coefficients and a hue shift, and selects
    one. A scan rather than four copies of its body, because XLA would fuse these into one kernel, which recomputes each
    band from three bands, each of them from three bands again, and so on.

    Args:
      factors: [N, 4], as in `Jitter`; operations: int32 [N, 4], from `operations_of`.
    """

    def position(state, inputs):
        planes, means = state
        operation, a, b, c, turn = (value[:, None, None] for value in inputs)  # [N, 1, 1]
        after = _affine(planes, rgb, a, b=b if rgb else None, c=c, means=means)
        if rgb:
            turned, saturated = _hue(planes, rgb, turn), _colors(planes, after, rgb)
            after = tuple(
                jnp.where(operation == HUE, hue, jnp.where(operation == SATURATION, gray, other))
                for hue, gray, other in zip(turned, saturated, after, strict=True)
            )
        return (after, _means(after, rgb, (1, 2))), None  # the means are computed here to fuse with what precedes

    inputs = [value.T for value in (operations, *_coefficients(factors, operations))]  # each [4, N]
    (planes, _), _ = jax.lax.scan(position, (planes, _means(planes, rgb, (1, 2))), inputs)
    return planes


def operations_of(jitter: Jitter) -> jax.Array:
    """int32 [N, 4]: `order` without the operations that change nothing, padded with `_NO_OP` at the end."""
    changes = jnp.take_along_axis(jitter.factors != UNCHANGED, jitter.order, axis=1)  # [N, 4]
    changing_first = jnp.argsort(~changes, axis=1, stable=True)
    return jnp.take_along_axis(jnp.where(changes, jitter.order, _NO_OP), changing_first, axis=1)


def _coefficients(factors: jax.Array, operations: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """a, b, c of each operation as a v + b luma + c mean, and its hue shift in turns: each [N, 4]."""
    factor = jnp.take_along_axis(factors, jnp.minimum(operations, HUE), axis=1)
    is_affine = operations < HUE
    a = jnp.where(is_affine, factor, 1)
    b = jnp.where(operations == SATURATION, 1 - factor, 0)
    c = jnp.where(operations == CONTRAST, 1 - factor, 0)
    return a, b, c, jnp.where(operations == HUE, factor, 0)


def planes_of(crops: jax.Array, bands: Bands, dtype) -> Planes:
    """Stored values [..., C] as one array [...] of values in [0, 1] per band."""
    values = bands.mapped(crops, dtype)
    return tuple(values[..., band] for band in range(len(bands)))


def normalized(planes: Planes, bands: Bands, dtype) -> jax.Array:
    """The inverse of `planes_of` for values in [0, 1], normalized to network inputs."""
    return jnp.stack(
        [(plane - mean) / std for plane, mean, std in zip(planes, bands.mean, bands.std, strict=True)], axis=-1
    ).astype(dtype)


def _luma(planes: Planes, rgb: tuple[int, int, int]) -> jax.Array:
    return sum(weight * planes[band] for weight, band in zip(_LUMA, rgb, strict=True))


def _means(planes: Planes, rgb: Rgb, axes: tuple[int, int]) -> Planes:
    """What contrast blends each band with: the mean luma for red, green and blue, its own mean for any other band."""
    luma = jnp.mean(_luma(planes, rgb), axis=axes, keepdims=True) if rgb else None
    return tuple(
        luma if rgb and band in rgb else jnp.mean(plane, axis=axes, keepdims=True) for band, plane in enumerate(planes)
    )


def _affine(planes: Planes, rgb: Rgb, a: jax.Array, *, b=None, c=None, means: Planes | None = None) -> Planes:
    """clip(a v + b luma + c mean); None for b or c means 0."""
    luma = 0 if b is None else b * _luma(planes, rgb)
    shifts = (luma,) * len(planes) if c is None else tuple(luma + c * mean for mean in means)
    return tuple(jnp.clip(a * plane + shift, 0, 1) for plane, shift in zip(planes, shifts, strict=True))


def grayscale(planes: Planes, rgb: tuple[int, int, int], chosen: jax.Array) -> Planes:
    """Luma for red, green and blue where `chosen` (bool, broadcast against a plane); other bands do not change."""
    luma = jnp.clip(_luma(planes, rgb), 0, 1)  # rounding makes white brighter than 1
    return _colors(planes, tuple(jnp.where(chosen, luma, plane) for plane in planes), rgb)


def _colors(planes: Planes, changed: Planes, rgb: tuple[int, int, int]) -> Planes:
    """`changed` for red, green and blue, `planes` for the other bands."""
    return tuple(changed[band] if band in rgb else plane for band, plane in enumerate(planes))


def _hue(planes: Planes, rgb: tuple[int, int, int], turn: jax.Array) -> Planes:
    """Rotates the hue of red, green and blue by `turn` (in [-0.5, 0.5]) in HSV; value and chroma do not change.

    The hue, in sixths of a turn, is represented multiplied by the chroma, which avoids a division by zero.
    """
    red, green, blue = (planes[band] for band in rgb)
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
    return tuple(turned[rgb.index(band)] if band in rgb else plane for band, plane in enumerate(planes))
