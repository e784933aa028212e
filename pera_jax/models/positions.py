"""Position embeddings: fixed sine-cosine tables, and bicubic resampling to another grid, a separable linear map."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float64

_A = -0.75  # the bicubic kernel's parameter
# DINO adds it to the new size to avoid a rounding error in the resize function it uses.
DINO_OFFSET = 0.1
ORDERS = ("sincos_xy", "sincos_yx")


def _kernel(distance: float) -> float:
    d = abs(distance)
    if d <= 1:
        return ((_A + 2) * d - (_A + 3)) * d * d + 1
    if d < 2:
        return ((_A * d - 5 * _A) * d + 8 * _A) * d - 4 * _A
    return 0.0


@functools.cache
def axis_map(old: int, new: int, offset: float = DINO_OFFSET) -> Float64[np.ndarray, "{new} {old}"]:
    """The matrix of one axis: bicubic, half-pixel centers, sampling scale `old / (new + offset)`,
    no antialiasing, taps beyond the border clamped to the edge."""
    matrix = np.zeros((new, old))
    for row in range(new):
        center = (row + 0.5) * old / (new + offset) - 0.5
        first = math.floor(center) - 1
        for tap in range(first, first + 4):
            matrix[row, min(max(tap, 0), old - 1)] += _kernel(center - tap)
    return matrix


def resample(
    grid: Float[jax.Array | np.ndarray, "h w D"], height: int, width: int, offset: float = DINO_OFFSET
) -> Float[jax.Array | np.ndarray, "{height} {width} D"]:
    """Resamples `grid` to another size, see `axis_map`; returns it unchanged if the size is the same."""
    if grid.shape[:2] == (height, width):
        return grid
    rows = jnp.asarray(axis_map(grid.shape[0], height, offset), grid.dtype)
    columns = jnp.asarray(axis_map(grid.shape[1], width, offset), grid.dtype)
    return jnp.einsum("ih,jw,hwd->ijd", rows, columns, grid, precision=jax.lax.Precision.HIGHEST)


@functools.cache
def sincos(order: str, side: int, width: int) -> Float64[np.ndarray, "1+{side}*{side} {width}"]:
    """The fixed embedding of `side` x `side` patches, raster order, after a zero row for the class token.

    Frequencies are `10000^(-i / (width / 4))` for i = 0 .. width / 4 - 1.

    Args:
      order: of the four parts of a row: "sincos_xy" is [sin column, cos column, sin row, cos row] (MAE,
        arXiv:2111.06377), "sincos_yx" is [sin row, cos row, sin column, cos column] (MoCo v3, arXiv:2104.02057).
      width: a multiple of 4.
    """
    frequencies = 10000.0 ** (-np.arange(width // 4) / (width // 4))
    rows, columns = (axis.reshape(-1, 1) * frequencies for axis in np.mgrid[:side, :side])  # [L, D / 4] each
    first, second = (columns, rows) if order == "sincos_xy" else (rows, columns)
    table = np.concatenate([np.sin(first), np.cos(first), np.sin(second), np.cos(second)], axis=1)  # [L, D]
    return np.concatenate([np.zeros((1, width)), table])
