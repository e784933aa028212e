"""The photometric operations of independent views, inside the jitted step: color jitter, grayscale, blur, solarize.

Each happens with its own probability, in this order, then values are normalized; those of DINO (arXiv:2104.14294),
DINOv2 (arXiv:2304.07193) and MoCo v3 (arXiv:2104.02057). Jitter is that of `augment.color`. Unlike in PerA's views,
grayscale follows jitter and is independent of it. Blur and solarize apply to all bands, grayscale to red, green and
blue, and jitter as in `augment.color`.

Blur is separable, with one sigma per crop. There are two kernels:

* "boxes": that of Pillow's `ImageFilter.GaussianBlur(radius=sigma)` (DINO, MoCo v3), an approximation of a Gaussian by
  three passes of a box of fractional width and variance sigma^2 / 3, each of which extends the crop by its border. It
  is within 3 of 255 gray levels of Pillow, 0.2 to 0.7 on average on photographs: Pillow rounds to 8 bits after each
  pass, and by this leaves crops unchanged for sigma below about 0.15.
* "gaussian": exp(-d^2 / 2 sigma^2) at nine taps with reflected edges, that of torchvision's `GaussianBlur(9)` (DINOv2),
  within half a gray level. Below a sigma of 0.5 it blurs much less than Pillow, and near 2 it is truncated. The two
  kernels are up to 1.4 gray levels apart on average (at a sigma of 0.3), and up to 54 at the edges.

Solarize maps v to min(v, 1 - v). That is what inverting 8-bit values >= 128 does, exactly, and on values between two
8-bit ones as if these were rounded first.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Key, Real

from pera_jax.augment import color
from pera_jax.bands import Bands, rgb_indices
from pera_jax.common.errors import UserError

KERNELS = {"boxes": (3, "edge"), "gaussian": (1, "reflect")}  # passes, and what a crop is extended by before each
_WIDEST = 5.0  # the largest sigma in px
_REACH = 4  # of the kernel "gaussian", in px


@dataclasses.dataclass(frozen=True)
class PhotometricSpec:
    """The operations of one type of view.

    Attributes:
      jitter, grayscale, blur, solarize: probability of each.
      brightness, contrast, saturation: factors are uniform in [1 - s, 1 + s].
      hue: the shift is uniform in [-s, s] turns.
      sigma: range of the blur's sigma in px; uniform.
      kernel: of the blur, "boxes" or "gaussian".
    """

    jitter: float
    grayscale: float
    blur: float
    solarize: float
    brightness: float
    contrast: float
    saturation: float
    hue: float
    sigma: tuple[float, float] = (0.1, 2.0)
    kernel: str = "boxes"


@no_type_check  # as a pytree, it also holds what JAX puts in place of arrays: shapes, shardings, None
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Photometric:
    """All random draws of N crops.

    Attributes:
      jitter: factors and order; the factors are `color.UNCHANGED` for crops that are not jittered.
      grayscale, solarize: bool [N].
      weights: float32 [N, R + 1]: those of the blur's kernel at a distance of 0 to R px; (1, 0, ...) for crops that
        are not blurred. R is 0 if the probability of blur is 0.
      kernel: the same as in the spec; not an array.
    """

    jitter: color.Jitter
    grayscale: jax.Array
    weights: jax.Array
    solarize: jax.Array
    kernel: str = dataclasses.field(metadata=dict(static=True))


def spec_from(settings: Mapping[str, Any] | Any, kernel: str = "boxes") -> PhotometricSpec:
    """The spec of config fields (a ConfigDict or dict) that are named like its attributes, all but `kernel`."""
    low, high = settings["sigma"]
    names = [field.name for field in dataclasses.fields(PhotometricSpec) if field.name not in ("sigma", "kernel")]
    return PhotometricSpec(
        **{name: float(settings[name]) for name in names}, sigma=(float(low), float(high)), kernel=kernel
    )


def check(spec: PhotometricSpec, field: str, rgb: Sequence[str], names: Sequence[str]) -> None:
    """Checks a spec.

    Args:
      field: the config field that it is from, such as "dino.views.global_1".
      rgb: `config.data.rgb`; names: of the bands.

    Raises:
      UserError: a field is out of range, or saturation, hue or grayscale are used without red, green and blue bands.
      ValueError: an unknown kernel.
    """
    if spec.kernel not in KERNELS:
        raise ValueError(f"kernel {spec.kernel!r} must be one of {', '.join(KERNELS)}")
    known = rgb_indices(rgb, names) is not None
    for name in ("jitter", "grayscale", "blur", "solarize", "brightness", "contrast", "saturation", "hue"):
        value, highest = getattr(spec, name), 0.5 if name == "hue" else 1.0
        if not 0 <= value <= highest:
            raise UserError(f"{field}.{name}={value} must lie in [0, {highest:g}]")
        if not known and name in ("saturation", "hue", "grayscale") and value:
            raise UserError(
                f"{field}.{name}={value} needs red, green and blue bands, got bands {', '.join(names)}; "
                "set it to 0, or name the three bands in data.rgb"
            )
    low, high = spec.sigma
    if not 0 < low <= high <= _WIDEST:
        raise UserError(f"{field}.sigma={low:g},{high:g} must be two values in (0, {_WIDEST:g}] px, the smaller first")


def draw(key: Key[jax.Array, ""], number: int, spec: PhotometricSpec) -> Photometric:
    """Independent draws for each of `number` crops; leaves are [number, ...]."""
    jitter_key, jitter_happens, gray_happens, sigma_key, blur_happens, solarize_happens = jax.random.split(key, 6)

    def happens(key, probability):
        return jax.random.uniform(key, (number,), jnp.float32) < probability  # [N]

    jitter = color.draw(jitter_key, number, (spec.brightness, spec.contrast, spec.saturation, spec.hue))
    factors = jnp.where(happens(jitter_happens, spec.jitter)[:, None], jitter.factors, color.UNCHANGED)
    low, high = spec.sigma
    sigma = jax.random.uniform(sigma_key, (number,), jnp.float32, minval=low, maxval=high)
    weights = jnp.ones((number, 1), jnp.float32)
    if spec.blur:
        blurring = blur_weights(sigma, spec)  # [N, R + 1]
        same = jnp.pad(weights, ((0, 0), (0, blurring.shape[1] - 1)))
        weights = jnp.where(happens(blur_happens, spec.blur)[:, None], blurring, same)
    return Photometric(
        color.Jitter(factors, jitter.order),
        happens(gray_happens, spec.grayscale),
        weights,
        happens(solarize_happens, spec.solarize),
        spec.kernel,
    )


@jax.named_scope("photometric")
def apply(
    crops: Real[jax.Array | np.ndarray, "N H W C"], draws: Photometric, bands: Bands, rgb: color.Rgb, dtype=jnp.float32
) -> Float[jax.Array, "N H W C"]:
    """Applies row i of `draws` to crop i, then normalizes. An unchanged crop is `(bands.mapped(crop) - mean) / std`.

    As `color.apply`: on CPU a loop over crops, which computes only what changes each crop; elsewhere all crops at once.

    Args:
      crops: in the dtype of `bands`.
      bands: range that maps to [0, 1], mean and std of each channel.
      rgb: from `bands.rgb_indices`; if None, saturation, hue and grayscale must be off.

    Returns:
      The crops in `dtype`, computed in float32, or in `dtype` if that is wider.
    """
    wide = jnp.promote_types(jnp.float32, dtype)
    settings = dict(bands=bands, rgb=rgb, wide=wide, dtype=dtype)
    jitter = draws.jitter._replace(factors=draws.jitter.factors.astype(wide))
    return jax.lax.platform_dependent(
        crops,
        dataclasses.replace(draws, jitter=jitter, weights=draws.weights.astype(wide)),
        cpu=functools.partial(apply_by_crop, **settings),
        default=functools.partial(apply_together, **settings),
    )


def apply_by_crop(
    crops: Real[jax.Array | np.ndarray, "N H W C"], draws: Photometric, bands: Bands, rgb: color.Rgb, wide, dtype
) -> Float[jax.Array, "N H W C"]:
    """`apply` as a loop over crops, computed in `wide`."""

    blurred = functools.partial(_blurred, kernel=draws.kernel)

    def one_crop(crop):
        image, factors, operations, gray, weights, solarize = crop  # [H, W, C], [4], [4], [], [R + 1], []
        planes = color.jittered_crop(color.planes_of(image, bands, wide), factors, operations, rgb)
        if rgb:
            planes = color.grayscale(planes, rgb, gray)
        if weights.size > 1:
            planes = jax.lax.cond(weights[0] < 1, blurred, lambda planes, weights: planes, planes, weights)
        return color.normalized(_solarized(planes, solarize), bands, dtype)

    operations = color.operations_of(draws.jitter)
    rows = (crops, draws.jitter.factors, operations, draws.grayscale, draws.weights, draws.solarize)
    return jax.lax.map(one_crop, rows)


def apply_together(
    crops: Real[jax.Array | np.ndarray, "N H W C"], draws: Photometric, bands: Bands, rgb: color.Rgb, wide, dtype
) -> Float[jax.Array, "N H W C"]:
    """`apply` on all crops at once, computed in `wide`."""
    operations = color.operations_of(draws.jitter)
    planes = color.jittered_crops(color.planes_of(crops, bands, wide), draws.jitter.factors, operations, rgb)
    if rgb:
        planes = color.grayscale(planes, rgb, draws.grayscale[:, None, None])
    planes = _solarized(_blurred(planes, draws.weights, draws.kernel), draws.solarize[:, None, None])
    return color.normalized(planes, bands, dtype)


def _solarized(planes: color.Planes, chosen: jax.Array) -> color.Planes:
    return tuple(jnp.where(chosen, jnp.minimum(plane, 1 - plane), plane) for plane in planes)


def _blurred(planes: color.Planes, weights: jax.Array, kernel: str) -> color.Planes:
    """Planes [..., H, W], each convolved along H and W with its `weights` [..., R + 1]."""
    weights = [weight[..., None, None] for weight in jnp.moveaxis(weights, -1, 0)]  # R + 1 times [..., 1, 1]
    reach = len(weights) - 1
    if not reach:
        return planes
    passes, edges = KERNELS[kernel]

    def along(values, axis):
        size = values.shape[axis]
        extended = jnp.pad(values, [(reach, reach) if a == axis else (0, 0) for a in range(values.ndim)], mode=edges)
        # XLA would fuse passes into one kernel, which computes the products of all passes for each value.
        extended = jax.lax.optimization_barrier(extended)

        def shifted(by):
            return jax.lax.slice_in_dim(extended, reach + by, reach + by + size, axis=axis)

        pairs = [weights[by] * (shifted(-by) + shifted(by)) for by in range(1, reach + 1)]
        return sum(pairs, weights[0] * shifted(0))

    values = jnp.stack(planes)  # [C, ..., H, W]
    for axis in (values.ndim - 1, values.ndim - 2):
        for _ in range(passes):
            values = along(values, axis)
    return tuple(values)


def blur_weights(sigma: Float[jax.Array, " N"], spec: PhotometricSpec) -> Float[jax.Array, "N R1"]:
    """`Photometric.weights` of a blur by `sigma`, within `spec.sigma`."""
    return _gaussian(sigma) if spec.kernel == "gaussian" else _box(sigma, spec.sigma[1])


def _gaussian(sigma: jax.Array) -> jax.Array:
    """The weights [N, 5] of the kernel "gaussian" for sigma [N]."""
    weights = jnp.exp(-0.5 * (jnp.arange(_REACH + 1) / sigma[:, None]) ** 2)  # [N, R + 1]
    return weights / (2 * jnp.sum(weights, axis=1, keepdims=True) - weights[:, :1])


def _box(sigma: jax.Array, highest: float) -> jax.Array:
    """The weights [N, R + 1] of one pass of the kernel "boxes", for sigma [N] of at most `highest`.

    A box with weight 1 up to the distance l, and a <= 1 at l + 1, has the variance sigma^2 / 3 (Gwosdek et al.,
    Theoretical foundations of Gaussian convolution by extended box filtering, 2011).
    """
    reach = math.floor((math.sqrt(4 * highest**2 + 1) - 1) / 2) + 1
    whole = jnp.floor((jnp.sqrt(4 * sigma**2 + 1) - 1) / 2)  # l, [N]
    part = (2 * whole + 1) * (whole * (whole + 1) - sigma**2) / (2 * sigma**2 - 6 * (whole + 1) ** 2)  # a
    radius = (whole + part)[:, None]
    return jnp.clip(radius + 1 - jnp.arange(reach + 1), 0, 1) / (2 * radius + 1)  # [N, R + 1]
