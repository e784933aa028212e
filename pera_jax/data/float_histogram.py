"""Histograms of float32 whose cells are as fine as the values are close, and which add up in any order.

Read as integers (negative ones inverted), the bits of floats are ordered as the floats are. A cell is all patterns that
agree but for their last `shift` bits, and every octave (one sign and exponent: 1 to 2, 2 to 4, ...) has a shift of its
own: the least that leaves it no more than `MOST_CELLS` occupied cells. So few values are kept exactly, values that differ
little from each other are told apart however far from 0 they lie, and a value elsewhere does not make them coarser.

The shift depends only on which values there are. It never falls when values are added, so histograms of parts become
that of the whole, whatever the parts and their order.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

MOST_CELLS = 4096  # of an octave: the widest is 1/4096 of its values
_OCTAVES, _OCTAVE_BITS = 512, 23
_LEVELS = _OCTAVE_BITS + 1
_SIGN = np.uint32(1 << 31)
_TINY = 1e-38  # below the least normal float32
_LOOSE = 1 << 18  # cells that wait to be sorted in, over those that are


@dataclasses.dataclass(frozen=True, eq=False)
class Cells:
    """The histogram of one band.

    Attributes:
      keys: uint32 [n], the least pattern of each occupied cell, ascending.
      counts: int64 [n], the values in it.
      shifts: uint8 [512], of each octave.
    """

    keys: np.ndarray
    counts: np.ndarray
    shifts: np.ndarray

    @property
    def total(self) -> int:
        """Number of values."""
        return int(self.counts.sum())

    def middles(self) -> np.ndarray:
        """float64 [n]: the value of a cell that holds one, else the one in its middle."""
        return _floats(self.keys + (_widths(self) >> 1))

    def edges(self) -> tuple[np.ndarray, np.ndarray]:
        """float64 [n] each: the least value of each cell, and the least above it."""
        return _floats(self.keys), _floats(self.keys + _widths(self))

    def coarser(self, shifts: np.ndarray) -> "Cells":
        """The same values in cells of at least these shifts."""
        return _limited(*_gathered([self], np.maximum(self.shifts, shifts)))


def _widths(cells: Cells) -> np.ndarray:
    return np.uint32(1) << cells.shifts[cells.keys >> _OCTAVE_BITS].astype(np.uint32)


def _floats(keys: np.ndarray) -> np.ndarray:
    values = np.where(keys & _SIGN, keys & ~_SIGN, ~keys).view(np.float32).astype(np.float64)
    return np.where(np.abs(values) < _TINY, 0.0, values)


def _gathered(parts: Sequence[Cells], shifts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All cells of the parts, masked to `shifts`, sorted, equal ones added."""
    keys = np.concatenate([part.keys for part in parts])
    counts = np.concatenate([part.counts for part in parts])
    down = shifts[keys >> _OCTAVE_BITS].astype(np.uint32)
    keys = keys >> down << down
    order = np.argsort(keys, kind="stable")
    return *_joined(keys[order], counts[order]), shifts


def _joined(keys: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Neighbours of the same key become one."""
    if not len(keys):
        return keys, counts
    starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
    return keys[starts], np.add.reduceat(counts, starts)


def _limited(keys: np.ndarray, counts: np.ndarray, shifts: np.ndarray) -> Cells:
    """Raises the shifts of octaves with too many cells, by no more than is needed."""
    if len(keys) <= MOST_CELLS:
        return Cells(keys, counts, shifts)
    octaves = keys >> _OCTAVE_BITS
    # Two neighbours stay apart under shifts below the number of bits in which they may differ.
    bits = np.frexp((keys[1:] ^ keys[:-1]).astype(np.float64))[1]
    inside = bits <= _OCTAVE_BITS
    table = np.bincount(octaves[1:][inside] * _LEVELS + bits[inside], minlength=_OCTAVES * _LEVELS)
    apart = np.cumsum(table.reshape(_OCTAVES, _LEVELS)[:, ::-1], axis=1)[:, ::-1]  # [octave, bits]: as many or more
    needed = (apart[:, 1:] >= MOST_CELLS).sum(axis=1)  # an octave has a cell more than there are neighbours apart
    shifts = np.maximum(shifts, needed).astype(np.uint8)
    down = shifts[octaves].astype(np.uint32)
    return Cells(*_joined(keys >> down << down, counts), shifts)


class FloatHistogram:
    """The histograms of the bands of float32 images; a sequence of `Cells`. `+` joins those of two sets of images."""

    def __init__(self, bands: Sequence[Cells]):
        self._parts = [[cells] for cells in bands]
        self._sorted = self._waiting = sum(len(cells.keys) for cells in bands)

    @classmethod
    def count(cls, bands: Sequence[np.ndarray]) -> "FloatHistogram":
        """Counts the values of each band, finite float32 [N]; N may differ."""
        return cls([_count(values) for values in bands])

    @classmethod
    def of_bins(cls, counts: np.ndarray) -> "FloatHistogram":
        """From int64 [C, 65536], a bin for each pattern of the upper 16 bits, which older data set folders hold."""
        occupied = [np.flatnonzero(band) for band in counts]
        shifts = np.full(_OCTAVES, 16, np.uint8)
        return cls([
            Cells((bins << 16).astype(np.uint32), band[bins], shifts) for bins, band in zip(occupied, counts, strict=True)
        ])  # fmt: skip

    def __add__(self, other: "FloatHistogram | int") -> "FloatHistogram":
        if not isinstance(other, FloatHistogram):
            return self if np.ndim(other) == 0 and other == 0 else NotImplemented  # where a sum begins
        if len(other) != len(self):
            raise ValueError(f"histograms of {len(self)} and {len(other)} bands")
        joined = FloatHistogram([])
        joined._parts = [ours + theirs for ours, theirs in zip(self._parts, other._parts, strict=True)]
        joined._sorted, joined._waiting = max(self._sorted, other._sorted), self._waiting + other._waiting
        if joined._waiting > 2 * joined._sorted + _LOOSE:
            joined._sort()
        return joined

    __radd__ = __add__
    __array_ufunc__ = None  # NumPy's scalars leave the sum to this class

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
        """One band, or the histogram of some."""
        bands = list(self)
        return bands[which] if np.ndim(which) == 0 else FloatHistogram([bands[band] for band in which])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FloatHistogram) and len(self) == len(other) and all(
            np.array_equal(getattr(a, name), getattr(b, name))
            for a, b in zip(self, other, strict=True) for name in ("keys", "counts", "shifts")
        )  # fmt: skip

    __hash__ = None

    def arrays(self) -> dict[str, np.ndarray]:
        """What `from_arrays` takes: `cells` int64 [C] is the number of each band; `steps` uint32 and `counts` int64 have
        one entry a cell, its distance from the one before it and its values; `shifts` is uint8 [C, 512]."""
        bands = list(self)
        return {
            "cells": np.array([len(cells.keys) for cells in bands], np.int64),
            "steps": np.concatenate([np.diff(cells.keys, prepend=np.uint32(0)) for cells in bands]),
            "counts": np.concatenate([cells.counts for cells in bands]),
            "shifts": np.stack([cells.shifts for cells in bands]),
        }

    @classmethod
    def from_arrays(cls, cells: np.ndarray, steps: np.ndarray, counts: np.ndarray, shifts: np.ndarray) -> "FloatHistogram":
        """Raises ValueError where they do not fit together."""
        shapes = (cells.shape, steps.shape, counts.shape, shifts.shape)
        dtypes = tuple(array.dtype.name for array in (cells, steps, counts, shifts))
        if dtypes != ("int64", "uint32", "int64", "uint8") or shapes[3] != (len(cells), _OCTAVES) or cells.min() < 0:
            raise ValueError(f"no histogram of float32: {shapes} of {dtypes}")
        if len({cells.sum(), len(steps), len(counts)}) > 1 or (counts < 1).any() or (shifts > _OCTAVE_BITS).any():
            raise ValueError("the cells of the histogram do not fit together")
        bands, ends = [], np.cumsum(cells)
        for end, number, of in zip(ends, cells, shifts, strict=True):
            keys = np.cumsum(steps[end - number : end], dtype=np.uint64)
            if number and (keys[-1] >= 1 << 32 or (np.diff(keys) == 0).any()):
                raise ValueError("the cells of the histogram are not in order")
            bands.append(Cells(keys.astype(np.uint32), counts[end - number : end], of))
        return cls(bands)


def _count(values: np.ndarray) -> Cells:
    bits = (np.ascontiguousarray(values) + np.float32(0)).view(np.uint32)  # -0 becomes 0
    ordered = np.sort(np.where(bits & _SIGN, ~bits, bits | _SIGN))
    starts = np.flatnonzero(np.concatenate([np.ones(min(1, len(ordered)), bool), ordered[1:] != ordered[:-1]]))
    counts = np.diff(starts, append=len(ordered)).astype(np.int64)
    return _limited(ordered[starts], counts, np.zeros(_OCTAVES, np.uint8))
