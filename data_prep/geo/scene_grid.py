"""The grid of tiles of a scene: arithmetic without file access.

A grid uses the pixels of the scene, or pixels of a chosen ground sample distance. Tiles start at the upper left corner,
one stride apart. A remainder at the right or lower edge of at least half a stride gets one more tile, shifted to end at
the edge; a smaller remainder is dropped, as that tile would mostly repeat the one before. A side shorter than a tile
gets one tile of its own length.
"""

import argparse
import dataclasses
import math

_SAME = 0.01  # relative difference up to which a ground sample distance counts as that of the scene
_ROUNDING = 1e-6  # pixels: tolerance for rounding errors


@dataclasses.dataclass(frozen=True)
class Length:
    """A length of `value` grid pixels, or meters on the ground."""

    value: float
    meters: bool

    def pixels(self, size: float | None) -> int:
        """The length in pixels, at least 1; `size` is the size of a pixel in meters."""
        return max(1, round(self.value / size)) if self.meters else int(self.value)

    def __str__(self) -> str:
        return f"{self.value:g}m" if self.meters else f"{self.value:g}"


def length(text: str) -> Length:
    """Parses "256" (pixels) or "2560m" (meters). Raises ArgumentTypeError."""
    meters = text.endswith("m")
    try:
        value = float(text.removesuffix("m"))
    except ValueError:
        value = math.nan
    if not (0 < value < math.inf) or (not meters and value != int(value)):
        raise argparse.ArgumentTypeError(f"expected whole pixels (256) or meters (2560m), got {text!r}")
    return Length(value, meters)


@dataclasses.dataclass(frozen=True)
class Grid:
    """The tiles of one scene. All pairs are (horizontal, vertical).

    Attributes:
      step: size of a grid pixel in pixels of the file; 1.0 without resampling.
      sides: size of the scene in grid pixels.
      tile_sides, stride: in grid pixels.
    """

    step: tuple[float, float]
    sides: tuple[int, int]
    tile_sides: tuple[int, int]
    stride: tuple[int, int]

    @classmethod
    def from_sides(
        cls,
        sides: tuple[int, int],
        meters: tuple[float, float] | None,
        tile: Length,
        stride: Length,
        gsd: float | None,
    ) -> "Grid":
        """
        Args:
          sides: width and height of the scene in its pixels.
          meters: ground size of a pixel; may be None only if no length is in meters and `gsd` is None.
          tile, stride: for both directions.
          gsd: size of a grid pixel in meters; None keeps the pixels of the scene.
        """
        step = (1.0, 1.0) if gsd is None else tuple(gsd / side for side in meters)
        if all(abs(ratio - 1) <= _SAME for ratio in step):
            step = (1.0, 1.0)
        pixel = (None, None) if meters is None else tuple(m * s for m, s in zip(meters, step, strict=True))
        return cls(
            step,
            tuple(int(side / s + _ROUNDING) for side, s in zip(sides, step, strict=True)),
            tuple(tile.pixels(size) for size in pixel),
            tuple(stride.pixels(size) for size in pixel),
        )

    @property
    def whole(self) -> bool:
        """Whether a full tile fits into the scene."""
        return all(side >= tile for side, tile in zip(self.sides, self.tile_sides, strict=True))

    @property
    def number(self) -> int:
        """Number of tiles."""
        columns, rows = self._steps()
        return columns * rows

    def tile(self, place: int) -> tuple[int, int, int, int]:
        """(column, row, width, height) of a tile in grid pixels; tiles are numbered row by row."""
        columns, _ = self._steps()
        corner = zip((place % columns, place // columns), self.sides, self.tile_sides, self.stride, strict=True)
        column, row = (min(step * stride, max(side - tile, 0)) for step, side, tile, stride in corner)
        width, height = (min(pair) for pair in zip(self.sides, self.tile_sides, strict=True))
        return column, row, width, height

    def _steps(self) -> tuple[int, int]:
        """Number of tiles along each side."""
        columns, rows = (_steps(*axis) for axis in zip(self.sides, self.tile_sides, self.stride, strict=True))
        return columns, rows


def _steps(side: int, tile: int, stride: int) -> int:
    """Number of tiles along one side."""
    if side <= tile:
        return 1
    strides, rest = divmod(side - tile, stride)
    return strides + 1 + (2 * rest >= stride)
