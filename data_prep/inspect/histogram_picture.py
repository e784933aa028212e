"""A picture of the histograms of a split: one panel per band, values in stored units."""

import math

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pera_jax.data import records, statistics
from pera_jax.data.float_histogram import Cells

SCALE = 2  # pixels per unit of the sizes below, for high-resolution screens
_WIDTH, _HEIGHT = 256, 96  # size of a plot; one column per value of uint8
_MARGIN, _HEAD, _FOOT, _TITLE = 20, 24, 26, 30
_PAPER, _INK, _PALE, _RANGE = (255, 255, 255), (45, 50, 56), (135, 142, 150), (226, 236, 247)
_FILLS = {"red": (196, 62, 58), "green": (60, 142, 78), "blue": (52, 104, 192)}
_FILL = (92, 104, 120)


def densities(band: np.ndarray | Cells, low: float, high: float, columns: int) -> np.ndarray:
    """Number of pixels of one band in equal intervals of its value.

    Args:
      band: histogram of the band.
      low, high: the range that is divided into intervals.

    Returns:
      float64 [columns]. Pixels are spread evenly over their cell; integers cover +-0.5.
    """
    values, counts = statistics.table(band)
    below = np.concatenate([[0], np.cumsum(counts)])
    if isinstance(band, Cells):
        first, after = band.edges()
        edges, below = np.stack([first, after], axis=1).ravel(), np.stack([below[:-1], below[1:]], axis=1).ravel()
    else:
        edges = np.concatenate([values, [len(values)]]) - 0.5
    return np.diff(np.interp(np.linspace(low, high, columns + 1), edges, below, left=0))


def _window(band: np.ndarray | Cells, info: records.DatasetInfo, low: float, high: float) -> tuple[float, float]:
    """The values in a panel: all for uint8, else percentiles 0.1 to 99.9 and the range, with a margin."""
    if info.dtype == "uint8":
        return -0.5, 255.5
    least, most = statistics.percentiles([band], info.dtype, (0.1, 99.9))[:, 0]
    least, most = min(least, low), max(most, high)
    around = max(0.03 * (most - least), 0.5 if info.dtype == "uint16" else 0.0)  # half a step for integers
    return least - around, most + around


def draw(info: records.DatasetInfo, split: str, counts: statistics.Histogram) -> Image.Image:
    """One picture of all bands.

    Args:
      counts: histogram of the split, with at least one pixel per band.
    """
    across = min(3, len(info.bands))
    down = -(-len(info.bands) // across)
    panel = _WIDTH + 2 * _MARGIN, _HEAD + _HEIGHT + _FOOT
    size = across * panel[0], _TITLE + down * panel[1] + 8
    picture = Image.new("RGB", (SCALE * size[0], SCALE * size[1]), _PAPER)
    pen = ImageDraw.Draw(picture)
    title = f"{info.name}, {split}: fraction of pixels by value ({info.dtype}); shaded: range mapped to [0, 1]"
    small = ImageFont.load_default(size=SCALE * (11 if across > 1 else 8))
    _text(pen, (_MARGIN, _TITLE / 2), title, small, _PALE, "lm", size[0] - 2 * _MARGIN)
    for i, name in enumerate(info.bands):
        left, top = i % across * panel[0] + _MARGIN, _TITLE + i // across * panel[1]
        _panel(pen, (left, top), name, info, counts[i], *info.splits[split].ranges[i])
    return picture


def _panel(pen, corner: tuple[int, int], name: str, info, band: np.ndarray | Cells, low: float, high: float) -> None:
    left, top = corner[0], corner[1] + _HEAD
    bottom = top + _HEIGHT
    font, small = ImageFont.load_default(size=SCALE * 12), ImageFont.load_default(size=SCALE * 10)
    first, last = _window(band, info, low, high)

    def x(value: float) -> float:
        return left + _WIDTH * (min(max(value, first), last) - first) / (last - first)

    pen.rectangle(_scaled(x(low), top, x(high), bottom), fill=_RANGE)
    heights = densities(band, first, last, _WIDTH)
    ordered = np.sort(heights)
    tallest = min(ordered[-1], 4 * ordered[-4] or ordered[-1])  # limits single high peaks, such as saturation
    for column, height in enumerate(heights):
        if height > 0:
            pen.rectangle(
                _scaled(
                    left + column, bottom - _HEIGHT * min(1.0, height / tallest), left + column + 1 - 1 / SCALE, bottom
                ),
                fill=_FILLS.get(name.lower(), _FILL),
            )
    pen.line(_scaled(left, bottom, left + _WIDTH, bottom), fill=_INK, width=SCALE)
    median = float(statistics.percentiles([band], info.dtype, (50.0,))[0, 0])
    pen.line(_scaled(x(median), top, x(median), bottom), fill=_INK, width=1)
    outside = 1.0 - heights.sum() / statistics.table(band)[1].sum()
    _text(pen, (left, corner[1] + _HEAD / 2), name, font, _INK, "lm", _WIDTH - 110)
    remark = f"median {_number(median)}" + (f", {outside:.1%} not shown" if outside > 5e-4 else "")
    _text(pen, (left + _WIDTH, corner[1] + _HEAD / 2), remark, small, _PALE, "rm", _WIDTH)
    ticks = (0, 128, 255) if info.dtype == "uint8" else (first, (first + last) / 2, last)
    for value, anchor in zip(ticks, ("la", "ma", "ra"), strict=True):
        _text(pen, (x(value), bottom + 5), _number(value), small, _PALE, anchor, _WIDTH)


def _scaled(*places: float) -> tuple[int, ...]:
    return tuple(round(SCALE * place) for place in places)


def _text(pen, at: tuple[float, float], text: str, font, ink, anchor: str, width: float) -> None:
    """Draws text, shortened to `width`."""
    if pen.textlength(text, font) > SCALE * width:
        while text and pen.textlength(text + "...", font) > SCALE * width:
            text = text[:-1]
        text += "..."
    pen.text(_scaled(*at), text, ink, font, anchor)


def _number(value: float) -> str:
    """Formats with three digits; large numbers as integers."""
    digits = 0 if value == 0 else 2 - math.floor(math.log10(abs(value)))
    return f"{value:,.0f}" if digits <= 0 else f"{value:.3g}"
