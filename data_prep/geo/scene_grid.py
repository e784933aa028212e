"""Where the tiles of a scene lie: arithmetic on sides, without any file.

A grid has the scene's own pixels, or pixels of a chosen ground sample distance. Its first tile begins at the upper left
corner, the next ones a stride further. What remains at the right and at the lower edge gets a tile of its own where it is
at least half a stride: that tile is moved back, so that it ends at the edge. Where it is less it is left out, since the
tile would repeat the one before it. A side that is shorter than the tile gets one tile of its own length.
"""

import argparse
import dataclasses
import math

_SAME = 0.01  # a ground sample distance as near as this to the scene's own leaves its pixels as they are
_ROUNDING = 1e-6  # of a pixel: what divisions lose


@dataclasses.dataclass(frozen=True)
class Length:
    """`value` pixels of the grid, or metres on the ground."""

    value: float
    metres: bool

    def pixels(self, size: float | None) -> int:
        """The number of pixels, at least 1; `size` is that of a pixel in metres."""
        return max(1, round(self.value / size)) if self.metres else int(self.value)

    def __str__(self) -> str:
        return f"{self.value:g}m" if self.metres else f"{self.value:g}"


def length(text: str) -> Length:
    """Reads "256" (pixels) or "2560m" (metres). Raises ArgumentTypeError."""
    metres = text.endswith("m")
    try:
        value = float(text.removesuffix("m"))
    except ValueError:
        value = math.nan
    if not (0 < value < math.inf) or (not metres and value != int(value)):
        raise argparse.ArgumentTypeError(f"{text!r} is no length: give whole pixels (256) or metres (2560m)")
    return Length(value, metres)


@dataclasses.dataclass(frozen=True)
class Grid:
    """The tiles of one scene. All pairs are (horizontal, vertical).

    Attributes:
      step: side of a pixel of the grid, in pixels of the file; 1.0 where these are kept.
      sides: of the scene, in pixels of the grid.
      tile_sides, stride: in pixels of the grid.
    """

    step: tuple[float, float]
    sides: tuple[int, int]
    tile_sides: tuple[int, int]
    stride: tuple[int, int]

    @classmethod
    def of(
        cls,
        sides: tuple[int, int],
        metres: tuple[float, float] | None,
        tile: Length,
        stride: Length,
        gsd: float | None,
    ) -> "Grid":
        """
        Args:
          sides: width and height of the scene in its pixels.
          metres: of one pixel on the ground; None only where no length is in metres and `gsd` is None.
          tile, stride: of each direction.
          gsd: metres of a pixel of the grid; None keeps the scene's pixels.
        """
        step = (1.0, 1.0) if gsd is None else tuple(gsd / side for side in metres)
        if all(abs(ratio - 1) <= _SAME for ratio in step):
            step = (1.0, 1.0)
        pixel = (None, None) if metres is None else tuple(m * s for m, s in zip(metres, step, strict=True))
        return cls(
            step,
            tuple(int(side / s + _ROUNDING) for side, s in zip(sides, step, strict=True)),
            tuple(tile.pixels(size) for size in pixel),
            tuple(stride.pixels(size) for size in pixel),
        )

    @property
    def whole(self) -> bool:
        """Whether the scene has room for a whole tile."""
        return all(side >= tile for side, tile in zip(self.sides, self.tile_sides, strict=True))

    @property
    def number(self) -> int:
        """Number of tiles."""
        columns, rows = self._steps()
        return columns * rows

    def tile(self, place: int) -> tuple[int, int, int, int]:
        """(column, row, width, height) of a tile in pixels of the grid; they are counted row by row."""
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
