"""Random resized crops on the host: boxes drawn by rejection, antialiased bilinear resampling, flips.

Crops keep the stored dtype; color augmentation follows on the device.

The resampling is separable: each pass sums weighted rows of memory, which NumPy does with vector instructions, and a
transpose between the passes turns columns into rows. uint8 is computed in 16-bit fixed point, which takes about half
the time of a general-purpose resize and is bitwise the same on every machine; uint16 and float32 are computed in
float32.
"""

import functools
import math
import threading
from typing import NamedTuple

import numpy as np

_ATTEMPTS = 10
_ONE = 256  # 1.0 in fixed point: 255 * 256 plus rounding still fits 16 bits
_LANES = 4  # channels are padded to a multiple of four, so that a pixel is copied as 32- or 64-bit words
_BLOCK = 112  # output rows computed at a time, so that accumulators stay in the cache
_STRIP = 16  # rows transposed at a time, for the same reason
_LONG_ROW = 2048  # bytes


class Box(NamedTuple):
    """A rectangle of pixels, in the coordinates of its image."""

    top: int
    left: int
    height: int
    width: int


def sample_box(
    rng: np.random.Generator, height: int, width: int, area: tuple[float, float], aspect: tuple[float, float]
) -> Box:
    """Draws the box of one crop from an image of `height` x `width` pixels.

    Draws an area fraction (uniform in `area`) and an aspect ratio width / height (log-uniform in `aspect`) up to ten
    times; the first box that fits is placed at a uniform integer position. If none fits, returns the largest central
    box with an aspect ratio in the range.
    """
    log_low, log_high = math.log(aspect[0]), math.log(aspect[1])
    for _ in range(_ATTEMPTS):
        pixels = height * width * (area[0] + (area[1] - area[0]) * rng.random())
        ratio = math.exp(log_low + (log_high - log_low) * rng.random())
        box_width, box_height = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
        if 0 < box_width <= width and 0 < box_height <= height:
            top = int(rng.random() * (height - box_height + 1))
            left = int(rng.random() * (width - box_width + 1))
            return Box(top, left, box_height, box_width)
    box_width = min(width, max(1, round(height * aspect[1])))
    box_height = min(height, max(1, round(width / aspect[0])))
    return Box((height - box_height) // 2, (width - box_width) // 2, box_height, box_width)


class Image:
    """One decoded image, laid out for many crops: column by column, uint8 in whole words, other dtypes as float32.

    Its memory is reused by the next `Image` of the same thread.
    """

    def __init__(self, pixels: np.ndarray, channels: int | None = None, reduction: int = 1):
        """
        Args:
          pixels: uint8, uint16 or float32 [H, W, at least C].
          channels: C, number of leading channels to use; by default all.
          reduction: `pixels` is the image reduced by this factor along each axis. Boxes are still in pixels of the
            full image.
        """
        self.height, self.width, given = pixels.shape
        self.channels = given if channels is None else channels
        self.dtype, self.reduction = pixels.dtype, reduction
        if pixels.dtype == np.uint8:
            self.columns = _columns_uint8(pixels, self.channels)
        else:
            self.columns = _scratch("columns", (self.width, self.height, self.channels), np.float32)
            self.columns[...] = pixels[:, :, : self.channels].transpose(1, 0, 2)


def _columns_uint8(pixels: np.ndarray, channels: int) -> np.ndarray:
    """`pixels` uint8 [H, W, at least C] -> uint8 [W, H, lanes], C padded to whole words with arbitrary values."""
    height, width, given = pixels.shape
    lanes = -(-channels // _LANES) * _LANES
    if given % _LANES:
        # each pixel is read as whole words; the padding lanes contain the following bytes
        flat = _scratch("flat", (pixels.size + lanes,), np.uint8)
        flat[: pixels.size].reshape(pixels.shape)[...] = pixels
    else:
        flat = np.ascontiguousarray(pixels).reshape(-1)
    words = np.lib.stride_tricks.as_strided(
        flat[:_LANES].view(np.uint32),
        shape=(width, height, lanes // _LANES),
        strides=(given, given * width, _LANES),
    )
    columns = _scratch("columns", (width, height, lanes), np.uint8)
    for start in range(0, height, _STRIP):
        columns.view(np.uint32)[:, start : start + _STRIP] = words[:, start : start + _STRIP]
    return columns


def crop_resize(image: Image, box: Box, size: int, flip_horizontal: bool, flip_vertical: bool, out: np.ndarray) -> None:
    """Cuts `box` out of `image`, resizes it to `size` x `size`, flips it and fills `out` [size, size, C] of its dtype.

    Bilinear with antialiasing: the triangle kernel is widened by the scale if the box is larger than `size`. Pixels
    outside the box have no influence. uint8 agrees with float64 arithmetic to about half a gray level, uint16 and
    float32 to rounding. For reduced images see `_taps`.
    """
    fixed, reduction = image.dtype == np.uint8, image.reduction
    across, across_weights = _taps(box.width, size, flip_horizontal, fixed, box.left % reduction, reduction)
    down, down_weights = _taps(box.height, size, flip_vertical, fixed, box.top % reduction, reduction)
    lanes = image.columns.shape[-1]

    left, right = box.left // reduction, -(-(box.left + box.width) // reduction)
    top, bottom = box.top // reduction, -(-(box.top + box.height) // reduction)
    height = bottom - top
    cut = image.columns[left:right, top:bottom]  # [w, h, lanes]
    columns = _scratch("cut", (right - left, height * lanes), np.uint16 if fixed else np.float32)
    columns.reshape(cut.shape)[...] = cut
    half = _scratch("half", (height, size, lanes), columns.dtype)
    word = np.dtype((np.void, lanes * half.itemsize))  # all lanes of a pixel are transposed together
    for start in range(0, size, _BLOCK):
        stop = min(start + _BLOCK, size)
        block = _weigh_rows(columns, across[:, start:stop], across_weights[:, start:stop])  # [block, h * lanes]
        half.view(word)[:, start:stop, 0] = block.reshape(stop - start, height, lanes).view(word)[..., 0].T

    rows = half.reshape(height, size * lanes)
    for start in range(0, size, _BLOCK):
        stop = min(start + _BLOCK, size)
        block = _weigh_rows(rows, down[:, start:stop], down_weights[:, start:stop])  # [block, size * lanes]
        if image.dtype == np.uint16:
            np.rint(block, out=block)
        pixels = block.reshape(stop - start, size, lanes)
        if lanes == image.channels:
            out[start:stop] = pixels
        else:
            for channel in range(image.channels):  # faster than all at once if lanes are dropped
                out[start:stop, :, channel] = pixels[..., channel]


def _weigh_rows(rows: np.ndarray, taps: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Sums weighted rows: `rows` [R, M], `taps` and `weights` [K, N] -> [N, M].

    Either uint16 with fixed-point weights, with values and sums in 0 .. 255, or float32.
    """
    if rows.shape[1] * rows.itemsize < _LONG_ROW:
        return _weighted_sum(rows, taps, weights)
    # NumPy copies the weights of many rows to its buffer, which only pays off for short rows.
    before = np.setbufsize(1024)
    try:
        return _weighted_sum(rows, taps, weights)
    finally:
        np.setbufsize(before)


def _weighted_sum(rows: np.ndarray, taps: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """`_weigh_rows` with the current buffer size of NumPy."""
    total = _scratch("total", (taps.shape[1], rows.shape[1]), rows.dtype)
    term = _scratch("term", total.shape, rows.dtype)
    rows.take(taps[0], axis=0, out=total, mode="clip")  # mode "raise" would use a buffer
    total *= weights[0, :, None]
    for tap, weight in zip(taps[1:], weights[1:], strict=True):
        rows.take(tap, axis=0, out=term, mode="clip")
        term *= weight[:, None]
        total += term
    if total.dtype == np.uint16:
        total += _ONE // 2
        total //= _ONE
    return total


@functools.lru_cache(maxsize=2048)
def _taps(
    source: int, target: int, flip: bool, fixed: bool, before: int, reduction: int
) -> tuple[np.ndarray, np.ndarray]:
    """Source rows of each of `target` rows: indices int64 [K, target], weights [K, target].

    Args:
      source: length of the box in pixels of the full image.
      fixed: uint16 fixed-point weights, else float32.
      before: pixels of the first row before the start of the box, fewer than `reduction`.
      reduction: number of pixels averaged in one row. The weights are then computed for the pixels of the full image,
        each modeled as the mean plus a slope (half the difference of the neighboring rows), so boxes need not start at
        row borders and nothing shifts. Negative weights are set to 0.
    """
    scale = source / target
    support = max(scale, 1.0)
    center = before + (np.arange(target) + 0.5) * scale
    first = np.floor((center - support + 0.5) / reduction).astype(np.int64)
    number = math.ceil(2 * support) if reduction == 1 else math.ceil(2 * support / reduction) + 1
    taps = first + np.arange(number)[:, None]  # [K, target]
    inner = np.arange(reduction)[:, None]
    pixels = taps[:, None] * reduction + inner  # [K, reduction, target]
    kernel = np.maximum(1 - np.abs(pixels + 0.5 - center) / support, 0)
    kernel[(pixels < before) | (pixels >= before + source)] = 0
    weights = kernel.sum(axis=1)  # [K, target]
    if reduction > 1:
        slope = (kernel * ((inner + 0.5) / reduction - 0.5)).sum(axis=1) / 2
        weights[1:] += slope[:-1]
        weights[:-1] -= slope[1:]
        weights = np.maximum(weights, 0)
    if fixed:
        # Round the running sum instead of the weights: they sum to exactly 1, with errors of at most 1 / 256.
        running = np.rint(np.cumsum(weights, axis=0) / weights.sum(axis=0) * _ONE)
        weights = np.diff(running, axis=0, prepend=0).astype(np.uint16)
    else:
        weights = (weights / weights.sum(axis=0)).astype(np.float32)
    taps = taps.clip(0, -(-(before + source) // reduction) - 1)
    return (taps[:, ::-1].copy(), weights[:, ::-1].copy()) if flip else (taps, weights)


class _Buffers(threading.local):
    """Memory reused for each crop: getting fresh pages from the system costs more than the arithmetic."""

    def __init__(self):
        self.named: dict[str, np.ndarray] = {}


_buffers = _Buffers()


def _scratch(name: str, shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """An uninitialized array in this thread's buffer `name`."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    buffer = _buffers.named.get(name)
    if buffer is None or buffer.size < size:
        buffer = _buffers.named[name] = np.empty(size, np.uint8)
    return buffer[:size].view(dtype).reshape(shape)
