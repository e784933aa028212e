"""Resampling that ignores nodata pixels.

Downsampling in both directions is an area-weighted mean. If either direction is upsampled, it is cubic convolution
(Keys, a = -1/2), with a kernel widened in downsampled directions. Nodata pixels have weight 0, and the other weights
are normalized to sum 1. A new pixel is valid if any pixel under it is.
"""

from collections.abc import Callable

import numpy as np

MOST_UNDER_ONE = 1 << 24  # maximum number of file pixels per new pixel
_MOST_READ = 1 << 22  # file pixels read at once, if possible
_SIDE = 256  # maximum block size in new pixels
_LEAST_WEIGHT = 0.5  # minimum valid weight of the cubic kernel; below it, its negative lobes dominate

Read = Callable[[int, int, int, int], tuple[np.ndarray, np.ndarray]]


def resample(
    read: Read,
    sides: tuple[int, int],
    window: tuple[float, float, float, float],
    columns: int,
    rows: int,
    dtype: np.dtype,
) -> tuple[np.ndarray, np.ndarray]:
    """
    Args:
      read: returns (pixels [C, height, width], data mask of the same shape) of a window (column, row, width, height) in
        whole pixels of the file.
      sides: width and height of the file, px.
      window: (column, row, width, height) to resample, in pixels of the file, possibly fractional.
      columns, rows: size of the result.
      dtype: of the result; integers are rounded and clipped.

    Returns:
      (pixels [C, rows, columns], data mask of the same shape). Nodata pixels are 0.
    """
    steps = window[2] / columns, window[3] / rows
    cubic = min(steps) < 1
    wide = max(1, min(columns, _SIDE, int(_MOST_READ / (steps[0] * steps[1]))))
    high = max(1, min(rows, _SIDE, int(_MOST_READ / (wide * steps[0] * steps[1]))))
    found = [
        [
            _block(
                read, sides, window[:2], steps, (left, top), (min(wide, columns - left), min(high, rows - top)), cubic
            )
            for left in range(0, columns, wide)
        ]
        for top in range(0, rows, high)
    ]
    values, valid = (
        np.concatenate([np.concatenate([b[k] for b in row], axis=2) for row in found], axis=1) for k in (0, 1)
    )
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        values = np.clip(np.floor(values + 0.5), limits.min, limits.max)
    return np.where(valid, values, 0).astype(dtype), valid


def _block(read, sides, origin, steps, corner, size, cubic) -> tuple[np.ndarray, np.ndarray]:
    """A block of `size` new pixels at `corner`: (float64 [C, height, width], bool of the same shape)."""
    names = ("cubic", "linear", "area") if cubic else ("area",)
    axes = [_Axis(*each, names) for each in zip(origin, steps, corner, size, sides, strict=True)]
    pixels, valid = read(axes[0].first, axes[1].first, axes[0].length, axes[1].length)
    if valid.all():
        across, down = (axis.weights[names[0]] for axis in axes)
        values = (down @ pixels.astype(np.float64) @ across.T) / np.outer(down.sum(axis=1), across.sum(axis=1))
        return values, np.ones(values.shape, bool)
    held, known = np.where(valid, pixels, 0).astype(np.float64), valid.astype(np.float64)

    def weighed(name: str) -> tuple[np.ndarray, np.ndarray]:
        across, down = (axis.weights[name] / axis.weights[name].sum(axis=1, keepdims=True) for axis in axes)
        weight = down @ known @ across.T
        with np.errstate(divide="ignore", invalid="ignore"):
            return down @ held @ across.T / weight, weight

    values, weight = weighed(names[0])
    if cubic:
        values = np.where(weight >= _LEAST_WEIGHT, values, weighed("linear")[0])
        weight = weighed("area")[1]
    return values, weight > 1e-9


class _Axis:
    """Weights of `length` file pixels, starting at `first`, along one axis.

    Attributes:
      weights: by kernel, float64 [new pixels, length], not normalized.
    """

    def __init__(self, origin: float, step: float, corner: int, size: int, side: int, kernels: tuple[str, ...]):
        edges = origin + (corner + np.arange(size + 1)) * step
        reach = 2 * max(1.0, step) if "cubic" in kernels else 0.0
        middles = (edges[1:] + edges[:-1]) / 2
        low, high = min(edges[0], middles[0] - reach), max(edges[-1], middles[-1] + reach)
        self.first = min(max(int(np.floor(low)), 0), side - 1)
        self.length = max(1, min(int(np.ceil(high)), side) - self.first)
        left = self.first + np.arange(self.length)
        apart = np.abs(left + 0.5 - middles[:, None]) / max(1.0, step)
        make = {
            "area": lambda: np.maximum(np.minimum(edges[1:, None], left + 1) - np.maximum(edges[:-1, None], left), 0),
            "linear": lambda: np.maximum(1 - apart, 0),
            "cubic": lambda: np.where(
                apart < 1,
                (1.5 * apart - 2.5) * apart**2 + 1,
                np.where(apart < 2, ((2.5 - 0.5 * apart) * apart - 4) * apart + 2, 0),
            ),
        }  # fmt: skip
        self.weights = {name: make[name]() for name in kernels}
