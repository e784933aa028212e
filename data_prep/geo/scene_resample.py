"""Pixels of another size, made without those that hold no data.

Where both sides of a pixel grow (or stay), it is the mean of the pixels of the file, weighed by the area that they share
with it. Where one side shrinks, it is a cubic convolution (Keys, a = -1/2), which widens with the pixel where the other
side grows. Pixels without data have no weight, and the weights of the others are raised to a sum of 1. A new pixel has
data where any pixel under it has.
"""

from collections.abc import Callable

import numpy as np

MOST_UNDER_ONE = 1 << 24  # pixels of the file that one new pixel may be made of
_MOST_READ = 1 << 22  # pixels of the file, as far as possible, that are read at once
_SIDE = 256  # of the new pixels that are made at once
_LEAST_WEIGHT = 0.5  # with less of the cubic kernel's on data, its negative lobes would count too much

Read = Callable[[int, int, int, int], tuple[np.ndarray, np.ndarray]]


def resample(
    read: Read, sides: tuple[int, int], window: tuple[float, float, float, float], columns: int, rows: int, dtype: np.dtype
) -> tuple[np.ndarray, np.ndarray]:
    """
    Args:
      read: (pixels [C, height, width], bool of the same shape: where there is data) of a window (column, row, width,
        height) in whole pixels of the file.
      sides: width and height of the file, px.
      window: (column, row, width, height) to be resampled, in pixels of the file, which may be fractions.
      columns, rows: of the result; dtype: of its pixels, rounded and clipped where that is one of integers.

    Returns:
      (pixels [C, rows, columns], bool of the same shape). What has no data is 0.
    """
    steps = window[2] / columns, window[3] / rows
    cubic = min(steps) < 1
    wide = max(1, min(columns, _SIDE, int(_MOST_READ / (steps[0] * steps[1]))))
    high = max(1, min(rows, _SIDE, int(_MOST_READ / (wide * steps[0] * steps[1]))))
    found = [
        [
            _block(read, sides, window[:2], steps, (left, top), (min(wide, columns - left), min(high, rows - top)), cubic)
            for left in range(0, columns, wide)
        ]
        for top in range(0, rows, high)
    ]
    values, valid = (np.concatenate([np.concatenate([b[k] for b in row], axis=2) for row in found], axis=1) for k in (0, 1))
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        values = np.clip(np.floor(values + 0.5), limits.min, limits.max)
    return np.where(valid, values, 0).astype(dtype), valid


def _block(read, sides, origin, steps, corner, size, cubic) -> tuple[np.ndarray, np.ndarray]:
    """`size` new pixels from `corner` on: (float64 [C, height, width], bool)."""
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
    """The weights of the pixels of the file along one side: those from `first` on, `length` of them.

    Attributes:
      weights: by kernel, float64 [new pixels, length], not yet of sum 1.
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
                apart < 1, (1.5 * apart - 2.5) * apart**2 + 1, np.where(apart < 2, ((2.5 - 0.5 * apart) * apart - 4) * apart + 2, 0)
            ),
        }  # fmt: skip
        self.weights = {name: make[name]() for name in kernels}
