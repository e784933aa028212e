"""Random crops on the host: where they lie, and how their pixels become the network's (arXiv:2505.19447).

One crop is made per positive pair, in the stored dtype, since the two views of a pair share their geometry: a box drawn
by rejection, antialiased bilinear resampling to the size of the network, flips. Colour changes come later, on the
device.

The resampling is separable: each pass weighs and adds whole rows of memory, which numpy does with vector instructions,
and a transposition between the passes turns columns into rows. uint8 is worked on in 16-bit fixed point, which takes
about half the time of a general-purpose resize and gives the same bits on every machine; uint16 and float32 in float32.
"""

import functools
import math
import threading
from typing import NamedTuple

import numpy as np

_ATTEMPTS = 10
_ONE = 256  # Fixed-point 1 of the weights: 255 * 256 plus the half that rounds still fits 16 bits.
_LANES = 4  # Channels are padded to a multiple of four, so that a pixel moves as whole 32- or 64-bit words.
_BLOCK = 112  # Rows of output made at a time, so that accumulators stay in the cache.
_STRIP = 16  # Rows transposed at a time, for the same reason.
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

    Up to ten times an area fraction (uniform in `area`) and an aspect ratio width / height (log-uniform in `aspect`)
    are drawn; the first box that fits is put at a uniform integer position. After ten boxes that do not fit: the
    largest central box whose aspect ratio lies in the range.
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

    It lies in memory that the next `Image` of the same thread takes over.
    """

    def __init__(self, pixels: np.ndarray, channels: int | None = None, reduction: int = 1):
        """
        Args:
          pixels: uint8, uint16 or float32 [H, W, at least C].
          channels: C, those that count, the first ones; all by default.
          reduction: of how many pixels of the image, along each axis, one of `pixels` is the mean. Boxes are in pixels
            of the image all the same.
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
    """`pixels` uint8 [H, W, at least C] -> uint8 [W, H, lanes], C padded with whatever follows to whole words."""
    height, width, given = pixels.shape
    lanes = -(-channels // _LANES) * _LANES
    if given % _LANES:
        # Each pixel is read as whole words, beyond its own channels: the lanes that pad it hold what comes next.
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

    Bilinear with antialiasing: the triangle kernel is widened by the scale where the box is larger than `size`, and
    pixels outside the box have no influence. Agrees with the same in float64 to about half a grey level, and for uint16
    and float32 to their rounding; of an image that was reduced, see `_taps`.
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
    word = np.dtype((np.void, lanes * half.itemsize))  # All lanes of a pixel are transposed at once.
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
            for channel in range(image.channels):  # Faster than all at once, where lanes are left out.
                out[start:stop, :, channel] = pixels[..., channel]


def _weigh_rows(rows: np.ndarray, taps: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Sums weighted rows: `rows` [R, M], `taps` and `weights` [K, N] -> [N, M].

    Either uint16 with weights in fixed point, values and sums 0 .. 255, or float32.
    """
    if rows.shape[1] * rows.itemsize < _LONG_ROW:
        return _weighted_sum(rows, taps, weights)
    # To multiply many rows at once, numpy spreads out their weights over its buffer, which pays for short rows only.
    before = np.setbufsize(1024)
    try:
        return _weighted_sum(rows, taps, weights)
    finally:
        np.setbufsize(before)


def _weighted_sum(rows: np.ndarray, taps: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """`_weigh_rows` with numpy's buffer as it is."""
    total = _scratch("total", (taps.shape[1], rows.shape[1]), rows.dtype)
    term = _scratch("term", total.shape, rows.dtype)
    rows.take(taps[0], axis=0, out=total, mode="clip")  # Mode "raise" would go through a buffer.
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
    """The rows that each of `target` rows is made of: indices int64 [K, target], weights [K, target].

    Args:
      source: length of the box, in pixels of the whole image.
      fixed: weights uint16 in fixed point, else float32.
      before: pixels of the first row that lie before the box, fewer than `reduction`.
      reduction: pixels that one row is the mean of. The weights are then those of the whole image's pixels, each of
        which is taken to be the mean plus a slope, half the difference of the row's neighbours; so edges of boxes need
        not be edges of rows, and nothing shifts. Where that would subtract a row, the row is left out.
    """
    scale = source / target
    support = max(scale, 1.0)
    centre = before + (np.arange(target) + 0.5) * scale
    first = np.floor((centre - support + 0.5) / reduction).astype(np.int64)
    number = math.ceil(2 * support) if reduction == 1 else math.ceil(2 * support / reduction) + 1
    taps = first + np.arange(number)[:, None]  # [K, target]
    inner = np.arange(reduction)[:, None]
    pixels = taps[:, None] * reduction + inner  # [K, reduction, target]
    kernel = np.maximum(1 - np.abs(pixels + 0.5 - centre) / support, 0)
    kernel[(pixels < before) | (pixels >= before + source)] = 0
    weights = kernel.sum(axis=1)  # [K, target]
    if reduction > 1:
        slope = (kernel * ((inner + 0.5) / reduction - 0.5)).sum(axis=1) / 2
        weights[1:] += slope[:-1]
        weights[:-1] -= slope[1:]
        weights = np.maximum(weights, 0)
    if fixed:
        # Rounding the running sum, not the weights: they always add up to one, and none is off by more than 1 / 256.
        running = np.rint(np.cumsum(weights, axis=0) / weights.sum(axis=0) * _ONE)
        weights = np.diff(running, axis=0, prepend=0).astype(np.uint16)
    else:
        weights = (weights / weights.sum(axis=0)).astype(np.float32)
    taps = taps.clip(0, -(-(before + source) // reduction) - 1)
    return (taps[:, ::-1].copy(), weights[:, ::-1].copy()) if flip else (taps, weights)


class _Buffers(threading.local):
    """Memory that is used again for each crop: asking the system for fresh pages costs more than the arithmetic."""

    def __init__(self):
        self.named: dict[str, np.ndarray] = {}


_buffers = _Buffers()


def _scratch(name: str, shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """An array of this thread's buffer `name`, with whatever was left in it."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    buffer = _buffers.named.get(name)
    if buffer is None or buffer.size < size:
        buffer = _buffers.named[name] = np.empty(size, np.uint8)
    return buffer[:size].view(dtype).reshape(shape)
