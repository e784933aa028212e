"""The photometric operations of independent views, inside the jitted step: color jitter, grayscale, blur, solarize.

Each happens with its own probability, in this order, then values are normalized; those of DINO (arXiv:2104.14294),
DINOv2 (arXiv:2304.07193) and MoCo v3 (arXiv:2104.02057). Jitter is that of `augment.color`. Unlike in PerA's views,
grayscale follows jitter and is independent of it. Jitter, blur and solarize apply to all bands as far as
`augment.color` defines them, grayscale to red, green and blue.

Blur is a separable convolution with a symmetric kernel of each crop's sigma; beyond an edge, the crop is extended by
its border. There are two kernels:

* "boxes": that of Pillow's `ImageFilter.GaussianBlur(radius=sigma)` (DINO, MoCo v3), which is the box of variance
  sigma^2 / 3, of fractional width, convolved three times: 13 taps for sigma up to 2. Pillow differs by rounding to 8
  bits after each of its six passes, and extends edges before each pass.
* "gaussian": exp(-d^2 / 2 sigma^2) at nine taps, as torchvision's `GaussianBlur(9)` (DINOv2), whose edges are
  reflected. For sigma below 0.5 it blurs much less than Pillow, and beyond 1.8 it is truncated.

Solarize maps v to min(v, 1 - v). That is what inverting 8-bit values >= 128 does, exactly, and on values between two
8-bit ones as if these were rounded first.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Key, Real

from pera_jax.augment import color
from pera_jax.bands import Bands, rgb_indices
from pera_jax.common.errors import UserError

KERNELS = ("boxes", "gaussian")
_WIDEST = 5.0  # the largest sigma in px
_REACH = 4  # of the kernel "gaussian", in px
_BOXES = 3  # passes of the kernel "boxes"


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


class Photometric(NamedTuple):
    """All random draws of N crops.

    Attributes:
      jitter: factors and order; the factors are `color.UNCHANGED` for crops that are not jittered.
      grayscale, solarize: bool [N].
      kernel: float32 [N, R + 1]: the weights of the blur at a distance of 0 to R px; (1, 0, ...) for crops that are
        not blurred. R is 0 if the probability of blur is 0.
    """

    jitter: color.Jitter
    grayscale: jax.Array
    kernel: jax.Array
    solarize: jax.Array


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
    unchanged = jnp.ones((number, 1), jnp.float32)
    if spec.blur:
        kernel = _gaussian(sigma) if spec.kernel == "gaussian" else _boxes(sigma, high)  # [N, R + 1]
        unchanged = jnp.pad(unchanged, ((0, 0), (0, kernel.shape[1] - 1)))
        kernel = jnp.where(happens(blur_happens, spec.blur)[:, None], kernel, unchanged)
    else:
        kernel = unchanged
    return Photometric(
        color.Jitter(factors, jitter.order),
        happens(gray_happens, spec.grayscale),
        kernel,
        happens(solarize_happens, spec.solarize),
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
        draws._replace(jitter=jitter, kernel=draws.kernel.astype(wide)),
        cpu=functools.partial(apply_by_crop, **settings),
        default=functools.partial(apply_together, **settings),
    )


def apply_by_crop(
    crops: Real[jax.Array | np.ndarray, "N H W C"], draws: Photometric, bands: Bands, rgb: color.Rgb, wide, dtype
) -> Float[jax.Array, "N H W C"]:
    """`apply` as a loop over crops, computed in `wide`."""

    def one_crop(crop):
        image, factors, operations, gray, kernel, solarize = crop  # [H, W, C], [4], [4], [], [R + 1], []
        planes = color.jittered_crop(color.planes_of(image, bands, wide), factors, operations, rgb)
        if rgb:
            planes = color.grayscale(planes, rgb, gray)
        if kernel.size > 1:
            planes = jax.lax.cond(kernel[0] < 1, _blurred, lambda planes, kernel: planes, planes, kernel)
        return color.normalized(_solarized(planes, solarize), bands, dtype)

    operations = color.operations_of(draws.jitter)
    rows = (crops, draws.jitter.factors, operations, draws.grayscale, draws.kernel, draws.solarize)
    return jax.lax.map(one_crop, rows)


def apply_together(
    crops: Real[jax.Array | np.ndarray, "N H W C"], draws: Photometric, bands: Bands, rgb: color.Rgb, wide, dtype
) -> Float[jax.Array, "N H W C"]:
    """`apply` on all crops at once, computed in `wide`."""
    planes = color.jittered_crops(color.planes_of(crops, bands, wide), draws.jitter, rgb)
    if rgb:
        planes = color.grayscale(planes, rgb, draws.grayscale[:, None, None])
    planes = _solarized(_blurred(planes, draws.kernel), draws.solarize[:, None, None])
    return color.normalized(planes, bands, dtype)


def _solarized(planes: color.Planes, chosen: jax.Array) -> color.Planes:
    return tuple(jnp.where(chosen, jnp.minimum(plane, 1 - plane), plane) for plane in planes)


def _blurred(planes: color.Planes, kernel: jax.Array) -> color.Planes:
    """Planes [..., H, W], each convolved over H and W with its kernel, of which `kernel` [..., R + 1] is one half."""
    weights = [weight[..., None, None] for weight in jnp.moveaxis(kernel, -1, 0)]  # R + 1 times [..., 1, 1]
    reach = len(weights) - 1

    def along(plane, axis):
        size = plane.shape[axis]
        extended = jnp.pad(plane, [(reach, reach) if a == axis else (0, 0) for a in range(plane.ndim)], mode="edge")
        # XLA would fuse both directions into one kernel, which computes (2 R + 1)^2 products per value.
        extended = jax.lax.optimization_barrier(extended)

        def shifted(by):
            return jax.lax.slice_in_dim(extended, reach + by, reach + by + size, axis=axis)

        pairs = [weights[by] * (shifted(-by) + shifted(by)) for by in range(1, reach + 1)]
        return sum(pairs, weights[0] * shifted(0))

    if not reach:
        return planes
    return tuple(along(along(plane, plane.ndim - 2), plane.ndim - 1) for plane in planes)


def _gaussian(sigma: jax.Array) -> jax.Array:
    """Half of each Gaussian kernel of 9 taps, [N, 5], for sigma [N]."""
    weights = jnp.exp(-0.5 * (jnp.arange(_REACH + 1) / sigma[:, None]) ** 2)  # [N, R + 1]
    return weights / (2 * jnp.sum(weights, axis=1, keepdims=True) - weights[:, :1])


def _boxes(sigma: jax.Array, highest: float) -> jax.Array:
    """Half of each kernel "boxes", [N, R + 1], for sigma [N] of at most `highest`.

    A box of integer radius l with weight 1, and weight a <= 1 at a distance of l + 1, has the variance sigma^2 / 3
    (Gwosdek et al., Theoretical foundations of Gaussian convolution by extended box filtering, 2011).
    """
    side = math.floor((math.sqrt(4 * highest**2 + 1) - 1) / 2) + 1  # px from the middle of the widest box to its end
    whole = jnp.floor((jnp.sqrt(4 * sigma**2 + 1) - 1) / 2)  # l, [N]
    part = (2 * whole + 1) * (whole * (whole + 1) - sigma**2) / (2 * sigma**2 - 6 * (whole + 1) ** 2)  # a
    radius = (whole + part)[:, None]
    box = jnp.clip(radius + 1 - jnp.abs(jnp.arange(-side, side + 1)), 0, 1) / (2 * radius + 1)  # [N, 2 side + 1]
    kernel = box
    for _ in range(_BOXES - 1):
        shifts = [jnp.pad(kernel, ((0, 0), (by, 2 * side - by))) for by in range(2 * side + 1)]
        kernel = sum(shift * box[:, by, None] for by, shift in enumerate(shifts))
    return kernel[:, _BOXES * side :]
