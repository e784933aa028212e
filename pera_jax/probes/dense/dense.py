"""What the dense tasks share: patch tokens of whole scenes, and which labels are held out."""

from collections.abc import Callable

import jax
import numpy as np

from pera_jax.common.errors import UserError
from pera_jax.encoder.extract import MICRO_BATCH
from pera_jax.probes.dense.overlap import IGNORE

_TOKENS = 2**16  # places whose tokens a network gives at once: 0.8 GB of 4 blocks of ViT-B
_MOST_WINDOWS = 256

# ---------------------------------------------------------------- tokens of a whole scene


def check_windows(patch: int, window: int, stride: int) -> None:
    """Raises UserError for a window or stride (px) that is no multiple of the patch, and for a stride with gaps."""
    for name, value in (("window", window), ("stride", stride)):
        if value < patch or value % patch:
            nearest = max(round(value / patch), 1) * patch
            raise UserError(f"{name}={value} px is not a multiple of the patch of {patch} px; try {name}={nearest}")
    if stride > window:
        raise UserError(f"stride={stride} px is more than window={window} px and leaves gaps; take at most the window")


def encode(
    maps: Callable[[np.ndarray], np.ndarray],
    image: np.ndarray,
    patch: int,
    window: int,
    stride: int,
    windows: int | None = None,
) -> np.ndarray:
    """The patch tokens of a scene, from overlapping windows; where these overlap, their mean.

    The scene is padded below and to the right by reflection, to whole patches and at least one window; the last window
    of a row or column ends with it.

    Args:
      maps: stored values [B, window, window, C] -> float32 [B, n, window / patch, window / patch, D].
      image: stored values [H, W, C].
      window, stride: px, multiples of `patch`.
      windows: the largest B; None: a multiple of what the devices work on anyway, `MICRO_BATCH` each, as far as memory
        allows. Changes no result.

    Returns:
      float32 [n, ceil(H / patch), ceil(W / patch), D].

    Raises:
      UserError: as `check_windows`; tokens that are not finite.
    """
    check_windows(patch, window, stride)
    height, width = (max(-(-side // patch) * patch, window) for side in image.shape[:2])
    padding = ((0, height - image.shape[0]), (0, width - image.shape[1]), (0, 0))
    padded = np.pad(image, padding, "symmetric")
    places = [(top, left) for top in _starts(height, window, stride) for left in _starts(width, window, stride)]
    side, total = window // patch, None
    step = MICRO_BATCH * jax.local_device_count()
    windows = windows or max(min(_TOKENS // side**2, _MOST_WINDOWS) // step, 1) * step
    counts = np.zeros((height // patch, width // patch, 1), np.float32)
    for first in range(0, len(places), windows):
        part = places[first : first + windows]
        batch = np.stack([padded[top : top + window, left : left + window] for top, left in part])
        tokens = np.asarray(maps(batch))  # [B, n, side, side, D]
        if total is None:
            total = np.zeros((tokens.shape[1], *counts.shape[:2], tokens.shape[4]), np.float32)
        for found, (top, left) in zip(tokens, part, strict=True):  # in order: the sums do not depend on the batches
            rows, columns = slice(top // patch, top // patch + side), slice(left // patch, left // patch + side)
            total[:, rows, columns] += found
            counts[rows, columns] += 1.0
    total /= counts
    if not np.isfinite(total).all():
        raise UserError("the encoder gives tokens that are not finite; probe an earlier checkpoint")
    return total[:, : -(-image.shape[0] // patch), : -(-image.shape[1] // patch)]


def _starts(length: int, window: int, stride: int) -> list[int]:
    return sorted({*range(0, length - window + 1, stride), length - window})


def enlarge(image: np.ndarray, scale: int) -> np.ndarray:
    """An image [H, W, C] bilinearly enlarged to [scale H, scale W, C] of its dtype (half-pixel centres)."""
    if scale == 1:
        return image
    values = image.astype(np.float32)
    for axis in (0, 1):
        length = image.shape[axis]
        at = np.clip((np.arange(length * scale) + 0.5) / scale - 0.5, 0, length - 1)
        low = np.floor(at).astype(np.int64)
        share = (at - low).astype(np.float32).reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
        high = np.minimum(low + 1, length - 1)
        values = values.take(low, axis) * (1 - share) + values.take(high, axis) * share
    return values if image.dtype.kind == "f" else np.rint(values).astype(image.dtype)


# ---------------------------------------------------------------- labels that are held out


def tiles(shape: tuple[int, int], side: int) -> np.ndarray:
    """The number of the square tile of `side` px that each pixel [H, W] belongs to, in raster order; int64."""
    rows, columns = (np.arange(length) // side for length in shape)
    return rows[:, None] * (-(-shape[1] // side)) + columns


def _class_counts(mask: np.ndarray, side: int) -> np.ndarray:
    """The pixels of each class in each tile: int64 [tiles, 255]."""
    units = tiles(mask.shape, side)
    number = int(units[-1, -1]) + 1
    return np.bincount((units * 256 + mask).ravel(), minlength=number * 256).reshape(number, 256)[:, :IGNORE]


def hold_out(masks: list[np.ndarray], share: float, side: int, seed: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Divides the labels of the training scenes: (masks to fit, masks held out), IGNORE in the other's place.

    Whole scenes are held out, `round(share n)` of n and at least one, and more until the labels held out are of two
    classes (of one, no head could be told from a constant). No class is left without a label to fit. Where scenes do not
    allow both, as with a single one, tiles of `side` px take their place.

    Raises:
      UserError: tiles do not allow it either.
    """
    for whole in (True, False):
        sides = [max(mask.shape) if whole else side for mask in masks]
        counts = [_class_counts(mask, cut) for mask, cut in zip(masks, sides, strict=True)]  # [units, classes]
        firsts = np.cumsum([0] + [len(part) for part in counts[:-1]])
        counts = np.concatenate(counts)
        labelled = np.flatnonzero(counts.sum(axis=1))
        left, held, present = counts.sum(axis=0), [], np.zeros(counts.shape[1], bool)
        wanted = min(np.count_nonzero(left), 2)  # classes
        for unit in np.random.default_rng(seed).permutation(labelled):
            empties = np.any((left > 0) & (left == counts[unit]))
            adds = present.sum() < wanted and np.any((counts[unit] > 0) & ~present)
            if not empties and (adds or len(held) < max(round(share * len(labelled)), 1)):
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
        f"no tiles of {side} px of the training scenes can be held out so that two classes are in them and none is lost "
        "to training; label more, or take a smaller tile"
    )
