"""Shared by the dense tasks: patch tokens of whole scenes, and held-out labels."""

from collections.abc import Callable

import jax
import numpy as np

from pera_jax.common.errors import UserError
from pera_jax.encoder.extract import MICRO_BATCH
from pera_jax.probes.dense.overlap import IGNORE

_TOKENS = 2**16  # patches encoded at once: 0.8 GB for 4 blocks of ViT-B
_MAX_WINDOWS = 256

# ---------------------------------------------------------------- tokens of a whole scene


def check_windows(patch: int, window: int, stride: int) -> None:
    """Raises UserError if window or stride (px) is not a multiple of the patch size, or the stride exceeds the
    window."""
    for name, value in (("window", window), ("stride", stride)):
        if value < patch or value % patch:
            nearest = max(round(value / patch), 1) * patch
            raise UserError(f"{name}={value} px is not a multiple of the patch size {patch} px; try {name}={nearest}")
    if stride > window:
        raise UserError(f"stride={stride} px exceeds window={window} px and leaves gaps; choose stride <= window")


def encode(
    maps: Callable[[np.ndarray], np.ndarray],
    image: np.ndarray,
    patch: int,
    window: int,
    stride: int,
    windows: int | None = None,
) -> np.ndarray:
    """The patch tokens of a scene, averaged over overlapping windows.

    The scene is padded by reflection at the bottom and the right, to whole patches and at least one window; the last
    window of a row or column is aligned with its end.

    Args:
      maps: stored values [B, window, window, C] -> float32 [B, n, window / patch, window / patch, D].
      image: stored values [H, W, C].
      patch: patch size in px.
      window, stride: px, multiples of `patch`.
      windows: maximum B; None for a multiple of `MICRO_BATCH` per device that fits in memory. Does not change the
        result.

    Returns:
      float32 [n, ceil(H / patch), ceil(W / patch), D].

    Raises:
      UserError: as `check_windows`; NaN or infinite tokens.
    """
    check_windows(patch, window, stride)
    height, width = (max(-(-side // patch) * patch, window) for side in image.shape[:2])
    padding = ((0, height - image.shape[0]), (0, width - image.shape[1]), (0, 0))
    padded = np.pad(image, padding, "symmetric")
    origins = [(top, left) for top in _starts(height, window, stride) for left in _starts(width, window, stride)]
    side, total = window // patch, None
    step = MICRO_BATCH * jax.local_device_count()
    windows = windows or max(min(_TOKENS // side**2, _MAX_WINDOWS) // step, 1) * step
    counts = np.zeros((height // patch, width // patch, 1), np.float32)
    for first in range(0, len(origins), windows):
        part = origins[first : first + windows]
        batch = np.stack([padded[top : top + window, left : left + window] for top, left in part])
        tokens = np.asarray(maps(batch))  # [B, n, side, side, D]
        if total is None:
            total = np.zeros((tokens.shape[1], *counts.shape[:2], tokens.shape[4]), np.float32)
        for found, (top, left) in zip(tokens, part, strict=True):  # in order: the sums do not depend on the batch size
            rows, columns = slice(top // patch, top // patch + side), slice(left // patch, left // patch + side)
            total[:, rows, columns] += found
            counts[rows, columns] += 1.0
    total /= counts
    if not np.isfinite(total).all():
        raise UserError("the tokens of the encoder contain NaN or infinite values; probe an earlier checkpoint")
    return total[:, : -(-image.shape[0] // patch), : -(-image.shape[1] // patch)]


def _starts(length: int, window: int, stride: int) -> list[int]:
    return sorted({*range(0, length - window + 1, stride), length - window})


def enlarge(image: np.ndarray, scale: int) -> np.ndarray:
    """An image [H, W, C] enlarged to [scale H, scale W, C], bilinear with half-pixel centers, in the same dtype."""
    if scale == 1:
        return image
    values = image.astype(np.float32)
    for axis in (0, 1):
        length = image.shape[axis]
        position = np.clip((np.arange(length * scale) + 0.5) / scale - 0.5, 0, length - 1)
        low = np.floor(position).astype(np.int64)
        fraction = (position - low).astype(np.float32).reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
        high = np.minimum(low + 1, length - 1)
        values = values.take(low, axis) * (1 - fraction) + values.take(high, axis) * fraction
    return values if image.dtype.kind == "f" else np.rint(values).astype(image.dtype)


# ---------------------------------------------------------------- held-out labels


def tiles(shape: tuple[int, int], side: int) -> np.ndarray:
    """The index of the square tile of `side` px of each pixel, in raster order; int64 [H, W]."""
    rows, columns = (np.arange(length) // side for length in shape)
    return rows[:, None] * (-(-shape[1] // side)) + columns


def _class_counts(mask: np.ndarray, side: int) -> np.ndarray:
    """The number of pixels of each class in each tile, int64 [tiles, 255]."""
    units = tiles(mask.shape, side)
    number = int(units[-1, -1]) + 1
    return np.bincount((units * 256 + mask).ravel(), minlength=number * 256).reshape(number, 256)[:, :IGNORE]


def hold_out(
    masks: list[np.ndarray], fraction: float, side: int, seed: int
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Splits the labels of the training scenes into (fit masks, held-out masks); pixels of the other part are IGNORE.

    Holds out `round(fraction * n)` of n scenes, at least one, and more until the held-out labels have two classes (with
    one, a constant prediction would be perfect). Every class keeps labels to fit. If whole scenes do not allow both, as
    with a single scene, tiles of `side` px are held out instead.

    Raises:
      UserError: tiles do not allow it either.
    """
    for whole in (True, False):
        sides = [max(mask.shape) if whole else side for mask in masks]
        counts = [_class_counts(mask, cut) for mask, cut in zip(masks, sides, strict=True)]  # [units, classes]
        firsts = np.cumsum([0] + [len(part) for part in counts[:-1]])
        counts = np.concatenate(counts)
        labeled = np.flatnonzero(counts.sum(axis=1))
        left, held, present = counts.sum(axis=0), [], np.zeros(counts.shape[1], bool)
        wanted = min(np.count_nonzero(left), 2)  # classes
        for unit in np.random.default_rng(seed).permutation(labeled):
            empties = np.any((left > 0) & (left == counts[unit]))
            adds = present.sum() < wanted and np.any((counts[unit] > 0) & ~present)
            if not empties and (adds or len(held) < max(round(fraction * len(labeled)), 1)):
                left = left - counts[unit]
                held.append(unit)
                present |= counts[unit] > 0
        if held and present.sum() >= wanted:
            fitted, kept = [], []
            for mask, cut, first in zip(masks, sides, firsts, strict=True):
                out = np.isin(tiles(mask.shape, cut) + first, held)
                fitted.append(np.where(out, np.uint8(IGNORE), mask))
                kept.append(np.where(out, mask, np.uint8(IGNORE)))
            return fitted, kept
    raise UserError(
        f"cannot hold out tiles of {side} px of the training scenes with two classes while keeping every class in "
        "training; label more pixels, or use a smaller tile"
    )
