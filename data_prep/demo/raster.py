"""Drawing with arrays: coordinates, distances, coverage and noise, for overhead scenes.

Shapes are signed distances in pixels (negative inside) over the whole picture; `cover` turns a distance into coverage
in [0, 1] with an edge one pixel wide, which is all the antialiasing there is. All arrays are float32 [S, S] unless said
otherwise; colors are float32 [3] in [0, 1].
"""

import dataclasses

import numpy as np
from PIL import Image, ImageFilter


@dataclasses.dataclass(frozen=True)
class Frame:
    """A coordinate system on the picture: `u` and `v` in pixels of the scene, origin at the center."""

    u: np.ndarray
    v: np.ndarray

    def turn(self, angle: float) -> "Frame":
        """The axes turned by `angle` radians."""
        cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
        return Frame(self.u * cos + self.v * sin, self.v * cos - self.u * sin)

    def move(self, u, v) -> "Frame":
        """The origin moved by `u`, `v` (numbers or arrays)."""
        return Frame(self.u - np.float32(u), self.v - np.float32(v))


def frame(size: int) -> Frame:
    """Pixel centers of a picture of `size` x `size`, u to the right, v down."""
    axis = np.arange(size, dtype=np.float32) - (size - 1) / 2
    u, v = np.meshgrid(axis, axis)
    return Frame(u, v)


def cover(distance: np.ndarray, softness: float = 1.0) -> np.ndarray:
    """Coverage of the inside of a shape; the edge is `softness` pixels wide."""
    return np.clip(0.5 - distance / np.float32(softness), 0.0, 1.0)


def box(at: Frame, half_u, half_v) -> np.ndarray:
    """Distance to a rectangle around the origin (exact inside and along the sides)."""
    return np.maximum(np.abs(at.u) - half_u, np.abs(at.v) - half_v)


def disc(at: Frame, radius) -> np.ndarray:
    return np.hypot(at.u, at.v) - radius


def stripes(coordinate: np.ndarray, period: float, width: float) -> np.ndarray:
    """Distance to parallel stripes of `width`, one each `period`, centered on multiples of it."""
    return np.abs(coordinate - period * np.round(coordinate / period)) - width / 2


def cells(at: Frame, pitch_u: float, pitch_v: float) -> tuple[Frame, np.ndarray, np.ndarray]:
    """Repeats the scene in cells: coordinates relative to the cell center, and integer column and row of the cell."""
    column, row = np.floor(at.u / pitch_u), np.floor(at.v / pitch_v)
    inside = Frame(at.u - (column + 0.5) * pitch_u, at.v - (row + 0.5) * pitch_v)
    return inside, column, row


class Lottery:
    """Random numbers per cell: a function of its column and row."""

    _SIDE = 64

    def __init__(self, rng: np.random.Generator, draws: int):
        self._table = rng.random((self._SIDE * self._SIDE, draws), dtype=np.float32)

    def all(self, column: np.ndarray, row: np.ndarray) -> np.ndarray:
        """Uniform numbers in [0, 1) per cell, [draws, S, S]."""
        place = (column.astype(np.int32) % self._SIDE) * self._SIDE + row.astype(np.int32) % self._SIDE
        return np.moveaxis(self._table[place], -1, 0)


def crowns(
    at: Frame, rng: np.random.Generator, pitch: float, radius: tuple[float, float], wander: float, share: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Round objects scattered over the picture, one candidate per cell.

    Args:
      at: coordinates; `pitch` is the side of a cell.
      radius: smallest and largest radius.
      wander: how far a center may lie from its cell's center, in cells (0: a grid, 0.5: no order left).
      share: share of the cells that hold one.

    Returns:
      (distance to the nearest, a random number in [0, 1) that belongs to it).
    """
    lottery = Lottery(rng, 5)
    _, column, row = cells(at, pitch, pitch)
    nearest = np.full(at.u.shape, 1e3, np.float32)
    tone = np.zeros(at.u.shape, np.float32)
    for step_u in (-1, 0, 1):
        for step_v in (-1, 0, 1):
            i, j = column + step_u, row + step_v
            shift_u, shift_v, size, present, its_tone = lottery.all(i, j)
            far_u = at.u - (i + 0.5 - wander + 2 * wander * shift_u) * pitch
            far_v = at.v - (j + 0.5 - wander + 2 * wander * shift_v) * pitch
            distance = np.sqrt(far_u * far_u + far_v * far_v) - (radius[0] + (radius[1] - radius[0]) * size)
            nearer = (distance < nearest) & (present < share)
            nearest = np.where(nearer, distance, nearest)
            tone = np.where(nearer, its_tone, tone)
    return nearest, tone


def displace(values: np.ndarray, u: float, v: float) -> np.ndarray:
    """A picture shifted by `u`, `v` (rounded to pixels); the border is repeated."""
    axis = np.arange(len(values))
    rows, columns = (np.clip(axis - round(float(step)), 0, len(values) - 1) for step in (v, u))
    return values[rows[:, None], columns]


def noise(rng: np.random.Generator, size: int, grain: float, octaves: int = 1) -> np.ndarray:
    """Smooth noise of mean about 0 and standard deviation about 1, with features of `grain` pixels.

    Each further octave has half the grain and six tenths of the strength.
    """
    total, power = np.zeros((size, size), np.float32), 0.0
    for octave in range(octaves):
        knots = max(2, int(np.ceil(size * 2**octave / grain)) + 1)
        values = Image.fromarray(rng.standard_normal((knots, knots), dtype=np.float32))
        weight = 0.6**octave
        total += np.float32(weight) * np.asarray(values.resize((size, size), Image.Resampling.BICUBIC))
        power += weight**2
    return total / np.float32(0.7 * np.sqrt(power))  # interpolation takes about half of the variance


def paint(picture: np.ndarray, coverage: np.ndarray, color: np.ndarray) -> None:
    """Blends a color ([3] or [S, S, 3]) over the picture [S, S, 3], in place."""
    picture += coverage[..., None] * (color - picture)


def shade(picture: np.ndarray, factor: np.ndarray) -> None:
    """Multiplies the brightness of the picture [S, S, 3] by `factor`, in place."""
    picture *= factor[..., None]


def soften(picture: np.ndarray, radius: float) -> np.ndarray:
    """Blurs uint8 [S, S, 3]; `radius` in pixels."""
    return np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(radius)))
