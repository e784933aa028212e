"""Adaptive histograms of float32 values that can be added in any order.

Interpreted as integers (inverted for negative values), the bit patterns of floats have the same order as the floats. A
cell contains all patterns that differ only in their last `shift` bits. Each octave (one sign and exponent: 1 to 2, 2 to
4, ...) has its own shift, the smallest with at most `MOST_CELLS` occupied cells. So small sets of values are stored
exactly, close values are distinguished at any distance from 0, and outliers do not make other cells coarser.

The shift depends only on the set of values, and never decreases when values are added. So the sum of the histograms of
parts equals the histogram of the whole, for any partition and order.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

MOST_CELLS = 4096  # per octave: a cell is at most 1/4096 of its values wide
_OCTAVES, _OCTAVE_BITS = 512, 23
_LEVELS = _OCTAVE_BITS + 1
_SIGN = np.uint32(1 << 31)
_TINY = 1e-38  # below the smallest normal float32
_LOOSE = 1 << 18  # unsorted cells allowed in addition to the sorted ones


@dataclasses.dataclass(frozen=True, eq=False)
class Cells:
    """The histogram of one band.

    Attributes:
      keys: uint32 [n], the smallest pattern of each occupied cell, ascending.
      counts: int64 [n], the number of values in each cell.
      shifts: uint8 [512], one per octave.
    """

    keys: np.ndarray
    counts: np.ndarray
    shifts: np.ndarray

    @property
    def total(self) -> int:
        """Number of values."""
        return int(self.counts.sum())

    def middles(self) -> np.ndarray:
        """float64 [n]: the center of each cell; for cells of a single value, that value."""
        return _floats(self.keys + (_widths(self) >> 1))

    def edges(self) -> tuple[np.ndarray, np.ndarray]:
        """float64 [n] each: lower (inclusive) and upper (exclusive) edge of each cell."""
        return _floats(self.keys), _floats(self.keys + _widths(self))

    def coarser(self, shifts: np.ndarray) -> "Cells":
        """The same values in cells with at least these shifts."""
        return _limited(*_gathered([self], np.maximum(self.shifts, shifts)))


def _widths(cells: Cells) -> np.ndarray:
    return np.uint32(1) << cells.shifts[cells.keys >> _OCTAVE_BITS].astype(np.uint32)


def _floats(keys: np.ndarray) -> np.ndarray:
    values = np.where(keys & _SIGN, keys & ~_SIGN, ~keys).view(np.float32).astype(np.float64)
    return np.where(np.abs(values) < _TINY, 0.0, values)


def _gathered(parts: Sequence[Cells], shifts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All cells of the parts at the given shifts, sorted, with equal cells added."""
    keys = np.concatenate([part.keys for part in parts])
    counts = np.concatenate([part.counts for part in parts])
    down = shifts[keys >> _OCTAVE_BITS].astype(np.uint32)
    keys = keys >> down << down
    order = np.argsort(keys, kind="stable")
    return *_joined(keys[order], counts[order]), shifts


def _joined(keys: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Merges neighbors with the same key."""
    if not len(keys):
        return keys, counts
    starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
    return keys[starts], np.add.reduceat(counts, starts)


def _limited(keys: np.ndarray, counts: np.ndarray, shifts: np.ndarray) -> Cells:
    """Increases the shifts of octaves with too many cells, as little as possible."""
    if len(keys) <= MOST_CELLS:
        return Cells(keys, counts, shifts)
    octaves = keys >> _OCTAVE_BITS
    # Neighbors stay separate for shifts below the number of bits in which they differ.
    bits = np.frexp((keys[1:] ^ keys[:-1]).astype(np.float64))[1]
    inside = bits <= _OCTAVE_BITS
    table = np.bincount(octaves[1:][inside] * _LEVELS + bits[inside], minlength=_OCTAVES * _LEVELS)
    apart = np.cumsum(table.reshape(_OCTAVES, _LEVELS)[:, ::-1], axis=1)[:, ::-1]  # [octave, bits]: as many or more
    needed = (apart[:, 1:] >= MOST_CELLS).sum(axis=1)  # an octave has one more cell than separate neighbors
    shifts = np.maximum(shifts, needed).astype(np.uint8)
    down = shifts[octaves].astype(np.uint32)
    return Cells(*_joined(keys >> down << down, counts), shifts)


class FloatHistogram:
    """Histograms of the bands of float32 images; a sequence of `Cells`. `+` adds those of two sets of images."""

    def __init__(self, bands: Sequence[Cells]):
        self._parts = [[cells] for cells in bands]
        self._sorted = self._waiting = sum(len(cells.keys) for cells in bands)

    @classmethod
    def count(cls, bands: Sequence[np.ndarray]) -> "FloatHistogram":
        """Counts the values of each band, finite float32 [N]; N may differ between bands."""
        return cls([_count(values) for values in bands])

    @classmethod
    def from_bins(cls, counts: np.ndarray) -> "FloatHistogram":
        """From int64 [C, 65536] of older dataset folders, one bin per pattern of the upper 16 bits."""
        occupied = [np.flatnonzero(band) for band in counts]
        shifts = np.full(_OCTAVES, 16, np.uint8)
        return cls([
            Cells((bins << 16).astype(np.uint32), band[bins], shifts)
            for bins, band in zip(occupied, counts, strict=True)
        ])  # fmt: skip

    def __add__(self, other: "FloatHistogram | int") -> "FloatHistogram":
        if not isinstance(other, FloatHistogram):
            return self if np.ndim(other) == 0 and other == 0 else NotImplemented  # the start value of `sum`
        if len(other) != len(self):
            raise ValueError(f"expected a histogram of {len(self)} bands, got {len(other)}")
        joined = FloatHistogram([])
        joined._parts = [ours + theirs for ours, theirs in zip(self._parts, other._parts, strict=True)]
        joined._sorted, joined._waiting = max(self._sorted, other._sorted), self._waiting + other._waiting
        if joined._waiting > 2 * joined._sorted + _LOOSE:
            joined._sort()
        return joined

    __radd__ = __add__
    __array_ufunc__ = None  # makes NumPy scalars defer to this class

    def _sort(self) -> None:
        for band, parts in enumerate(self._parts):
            if len(parts) > 1:
                shifts = np.maximum.reduce([part.shifts for part in parts])
                self._parts[band] = [_limited(*_gathered(parts, shifts))]
        self._sorted = self._waiting = sum(len(parts[0].keys) for parts in self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    def __iter__(self) -> Iterator[Cells]:
        self._sort()
        return iter([parts[0] for parts in self._parts])

    def __getitem__(self, which: int | Sequence[int]) -> "Cells | FloatHistogram":
        """The cells of one band, or the histogram of several bands."""
        bands = list(self)
        return bands[which] if np.ndim(which) == 0 else FloatHistogram([bands[band] for band in which])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FloatHistogram) and len(self) == len(other) and all(
            np.array_equal(getattr(a, name), getattr(b, name))
            for a, b in zip(self, other, strict=True) for name in ("keys", "counts", "shifts")
        )  # fmt: skip

    __hash__ = None

    def arrays(self) -> dict[str, np.ndarray]:
        """The arguments of `from_arrays`: `cells` int64 [C], the number of cells per band; `steps` uint32 and `counts`
        int64 with one entry per cell, the distance to the previous key and the number of values; `shifts` uint8 [C,
        512]."""
        bands = list(self)
        return {
            "cells": np.array([len(cells.keys) for cells in bands], np.int64),
            "steps": np.concatenate([np.diff(cells.keys, prepend=np.uint32(0)) for cells in bands]),
            "counts": np.concatenate([cells.counts for cells in bands]),
            "shifts": np.stack([cells.shifts for cells in bands]),
        }

    @classmethod
    def from_arrays(
        cls, cells: np.ndarray, steps: np.ndarray, counts: np.ndarray, shifts: np.ndarray
    ) -> "FloatHistogram":
        """The inverse of `arrays`. Raises ValueError for inconsistent arrays."""
        shapes = (cells.shape, steps.shape, counts.shape, shifts.shape)
        dtypes = tuple(array.dtype.name for array in (cells, steps, counts, shifts))
        if dtypes != ("int64", "uint32", "int64", "uint8") or shapes[3] != (len(cells), _OCTAVES) or cells.min() < 0:
            raise ValueError(f"not a histogram of float32: shapes {shapes}, dtypes {dtypes}")
        if len({cells.sum(), len(steps), len(counts)}) > 1 or (counts < 1).any() or (shifts > _OCTAVE_BITS).any():
            raise ValueError("the cells of the histogram are inconsistent")
        bands, ends = [], np.cumsum(cells)
        for end, number, of in zip(ends, cells, shifts, strict=True):
            keys = np.cumsum(steps[end - number : end], dtype=np.uint64)
            if number and (keys[-1] >= 1 << 32 or (np.diff(keys) == 0).any()):
                raise ValueError("the cells of the histogram are not in ascending order")
            bands.append(Cells(keys.astype(np.uint32), counts[end - number : end], of))
        return cls(bands)


def _count(values: np.ndarray) -> Cells:
    bits = (np.ascontiguousarray(values) + np.float32(0)).view(np.uint32)  # -0 becomes 0
    ordered = np.sort(np.where(bits & _SIGN, ~bits, bits | _SIGN))
    starts = np.flatnonzero(np.concatenate([np.ones(min(1, len(ordered)), bool), ordered[1:] != ordered[:-1]]))
    counts = np.diff(starts, append=len(ordered)).astype(np.int64)
    return _limited(ordered[starts], counts, np.zeros(_OCTAVES, np.uint8))
