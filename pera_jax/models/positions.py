"""Bicubic resampling of the position embedding to another grid size, as a fixed separable linear map."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float64

_A = -0.75  # the bicubic kernel's parameter
_OFFSET = 0.1  # DINO adds it to the new size to avoid a rounding error in the resize function it uses


def _kernel(distance: float) -> float:
    d = abs(distance)
    if d <= 1:
        return ((_A + 2) * d - (_A + 3)) * d * d + 1
    if d < 2:
        return ((_A * d - 5 * _A) * d + 8 * _A) * d - 4 * _A
    return 0.0


@functools.cache
def axis_map(old: int, new: int) -> Float64[np.ndarray, "{new} {old}"]:
    """The matrix of one axis: bicubic, half-pixel centers, sampling scale `old / (new + 0.1)`,
    no antialiasing, taps beyond the border clamped to the edge."""
    matrix = np.zeros((new, old))
    for row in range(new):
        center = (row + 0.5) * old / (new + _OFFSET) - 0.5
        first = math.floor(center) - 1
        for tap in range(first, first + 4):
            matrix[row, min(max(tap, 0), old - 1)] += _kernel(center - tap)
    return matrix


def resample(
    grid: Float[jax.Array | np.ndarray, "h w D"], height: int, width: int
) -> Float[jax.Array | np.ndarray, "{height} {width} D"]:
    """Resamples `grid` to another size; returns it unchanged if the size is the same."""
    if grid.shape[:2] == (height, width):
        return grid
    rows = jnp.asarray(axis_map(grid.shape[0], height), grid.dtype)
    columns = jnp.asarray(axis_map(grid.shape[1], width), grid.dtype)
    return jnp.einsum("ih,jw,hwd->ijd", rows, columns, grid, precision=jax.lax.Precision.HIGHEST)
