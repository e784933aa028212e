"""Small line charts as SVG, with round ticks, and raw values drawn faintly behind smoothed ones."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from pera_jax.common import html

# The color-blind safe palette of Okabe and Ito.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
MAX_POINTS = 500
_WIDTH, _HEIGHT = 288, 196
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 10, 26, 38  # px around the plot

STYLE = """
.charts { display: flex; flex-wrap: wrap; gap: 14px 8px; margin: 10px 0; }
.charts svg { break-inside: avoid; max-width: 100%; }
svg text { font: 11px system-ui, "Segoe UI", Roboto, sans-serif; fill: #4a525a; }
svg .title { font-weight: 600; font-size: 12.5px; fill: #2d3238; }
svg .axis { stroke: #aab2ba; } svg .rule { stroke: #e6e9ec; }
"""


@dataclasses.dataclass(frozen=True)
class Series:
    """A line of a chart.

    Attributes:
      steps, values: [N] each; NaN and infinite values break the line.
      bars: error bars (low, high), float [N, 2], NaN for none; points with bars are marked.
      smooth: draw a smoothed line, and the raw one faintly.
    """

    name: str
    steps: np.ndarray
    values: np.ndarray
    bars: np.ndarray | None = None
    smooth: bool = False


@dataclasses.dataclass(frozen=True)
class Chart:
    """A chart. `levels`: names and values of dashed horizontal lines; `log`: logarithmic axis if all values allow
    it."""

    title: str
    series: tuple[Series, ...]
    levels: tuple[tuple[str, float], ...] = ()
    log: bool = False


def half_life(points: int) -> float:
    """The half-life of the smoothing in points: a hundredth of all points, at least 1."""
    return max(points / 100.0, 1.0)


def smoothed(values: np.ndarray, life: float) -> np.ndarray:
    """The exponential moving average with half-life `life`: sum_i 2^((i - t) / life) x_i / sum_i 2^((i - t) / life).
    NaN and infinite values are ignored and kept."""
    decay, total, weight = 0.5 ** (1.0 / life), 0.0, 0.0
    result = np.array(values, np.float64)
    for index, value in enumerate(result):
        total, weight = total * decay, weight * decay
        if math.isfinite(value):
            total, weight = total + value, weight + 1.0
            result[index] = total / weight
    return result


def decimated(steps: np.ndarray, values: np.ndarray, most: int = MAX_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """Downsamples to at most `most` points: minimum and maximum of equal intervals, which keeps spikes."""
    if len(steps) <= most:
        return steps, values
    keep = []
    for stretch in np.array_split(np.arange(len(steps)), most // 2):
        finite = stretch[np.isfinite(values[stretch])]
        ends = [finite[np.argmin(values[finite])], finite[np.argmax(values[finite])]] if len(finite) else stretch[:1]
        keep += sorted(set(ends))
    return steps[keep], values[keep]


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """About `wanted` round numbers from `low` to `high`, spaced by 1, 2, 2.5 or 5 times a power of ten."""
    raw = (high - low) / max(wanted - 1, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * min((1, 2, 2.5, 5, 10), key=lambda factor: abs(math.log(factor * power / raw)))
    return [step * place for place in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten from `low` to `high`, with multiples by 2 and 5 for small ranges, and fewer for large ones."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1, 2, 5) if last - first <= 2 else (1, 3) if last - first == 3 else (1,)
    every = max(math.ceil((last - first) / 6), 1)
    places = [factor * 10.0**power for power in range(first, last + 1, every) for factor in factors]
    return [place for place in places if low * 0.999 <= place <= high * 1.001]


def number(value: float) -> str:
    """The text of a tick, at most seven characters: 1,500, 0.0008, 7.5e-4, 2e6."""
    plain = f"{value:,.6g}"
    short = f"{value:.3e}".replace("e-0", "e-").replace("e+0", "e")
    digits, exponent = short.split("e")
    return plain if len(plain) <= 6 and "e" not in plain else f"{digits.rstrip('0').rstrip('.')}e{exponent}"


def svg(chart: Chart) -> str:
    """The chart as SVG; "" without finite values."""
    finite = [v[np.isfinite(v)] for s in chart.series for v in ([s.values] if s.bars is None else [s.values, s.bars])]
    values = np.concatenate([*finite, [level for _, level in chart.levels]])
    if not any(np.isfinite(series.values).any() for series in chart.series):
        return ""
    steps = np.concatenate([series.steps for series in chart.series])
    log = chart.log and values.min() > 0 and values.max() / values.min() > 20
    low, high = _limits(values, log)
    first, last = float(steps.min()), float(steps.max())
    first = 0.0 if first < 0.1 * last else first
    last = last if last > first else first + 1.0

    def across(step):
        return _LEFT + (np.asarray(step, float) - first) / (last - first) * (_WIDTH - _LEFT - _RIGHT)

    def down(value):
        value = np.asarray(value, float)
        fraction = (np.log(value) - np.log(low)) / (np.log(high) - np.log(low)) if log else (value - low) / (high - low)
        return _TOP + (1.0 - fraction) * (_HEIGHT - _TOP - _BOTTOM)

    parts = [f'<text class="title" x="{_LEFT}" y="14">{html.escaped(chart.title)}{" (log)" if log else ""}</text>']
    for tick in log_ticks(low, high) if log else ticks(low, high):
        y = float(down(tick))
        parts.append(f'<path class="rule" d="M{_LEFT},{y:.1f}H{_WIDTH - _RIGHT}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{number(tick)}</text>')
    bottom = _HEIGHT - _BOTTOM
    for tick in (tick for tick in ticks(first, last, 3) if tick == round(tick)):
        x = float(across(tick))
        parts.append(f'<path class="axis" d="M{x:.1f},{bottom}v4" />')
        anchor = "end" if x > _WIDTH - _RIGHT - 12 else "middle"
        parts.append(f'<text x="{x:.1f}" y="{bottom + 15}" text-anchor="{anchor}">{tick:,.0f}</text>')
    parts.append(f'<path class="axis" fill="none" d="M{_LEFT},{_TOP}V{bottom}H{_WIDTH - _RIGHT}"/>')
    for place, series in enumerate(chart.series):
        parts += _lines(series, PALETTE[place % len(PALETTE)], across, down)
    for place, (_, level) in enumerate(chart.levels):
        y, color = float(down(level)), PALETTE[(place + len(chart.series)) % len(PALETTE)]
        parts.append(f'<path stroke="{color}" stroke-dasharray="5 4" d="M{_LEFT},{y:.1f}H{_WIDTH - _RIGHT}"/>')
    parts += _names(chart)
    return (
        f'<svg width="{_WIDTH}" height="{_HEIGHT}" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{html.escaped(chart.title)}">{"".join(parts)}</svg>'
    )


def _limits(values: np.ndarray, log: bool) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    if log:
        return low / 1.1, high * 1.1
    room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return (0.0 if 0.0 <= low < 0.25 * high else low - room), high + room


def _lines(series: Series, color: str, across, down) -> list[str]:
    parts, values = [], series.values
    if series.smooth and len(values) > 2:
        faint = _path(*decimated(series.steps, values), across, down)
        parts.append(f'<path fill="none" stroke="{color}" stroke-width="0.8" stroke-opacity="0.4" d="{faint}"/>')
        values = smoothed(values, half_life(len(values)))
    line = _path(*decimated(series.steps, values), across, down)
    parts.append(f'<path fill="none" stroke="{color}" stroke-width="1.6" stroke-linejoin="round" d="{line}"/>')
    if series.bars is not None or len(values) == 1:
        bars = np.full((len(values), 2), np.nan) if series.bars is None else series.bars
        for step, value, (low, high) in zip(series.steps, values, bars, strict=True):
            x = float(across(step))
            if math.isfinite(value):
                parts.append(f'<circle cx="{x:.1f}" cy="{float(down(value)):.1f}" r="3" fill="{color}"/>')
            if math.isfinite(low) and math.isfinite(high):
                top, bottom = float(down(high)), float(down(low))
                whisker = f"M{x:.1f},{top:.1f}V{bottom:.1f}M{x - 4:.1f},{top:.1f}h8M{x - 4:.1f},{bottom:.1f}h8"
                parts.append(f'<path stroke="{color}" stroke-width="1.3" d="{whisker}"/>')
    return parts


def _path(steps: np.ndarray, values: np.ndarray, across, down) -> str:
    """The SVG path through the points, interrupted at NaN and infinite values."""
    words, pen_down = [], False
    for x, y in zip(across(steps), down(values), strict=True):
        if not math.isfinite(y):
            pen_down = False
            continue
        words.append(f"{'L' if pen_down else 'M'}{x:.1f},{y:.1f}")
        pen_down = True
    return "".join(words)


def _names(chart: Chart) -> list[str]:
    """The legend below the axis: "step" for a single line, or else the names of the lines."""
    entries = [(series.name, "") for series in chart.series] + [(name, "5 4") for name, _ in chart.levels]
    y = _HEIGHT - 6
    if len(entries) == 1:
        return [f'<text x="{(_LEFT + _WIDTH - _RIGHT) / 2}" y="{y}" text-anchor="middle">step</text>']
    parts, x = [], _LEFT
    for place, (name, dash) in enumerate(entries):
        color, dashed = PALETTE[place % len(PALETTE)], f' stroke-dasharray="{dash}"' if dash else ""
        parts.append(f'<path stroke="{color}" stroke-width="2"{dashed} d="M{x},{y - 4}h18"/>')
        parts.append(f'<text x="{x + 22}" y="{y}">{html.escaped(name)}</text>')
        x += 22 + 6.2 * len(name) + 14
    return parts


def row(drawn: Sequence[str]) -> str:
    """Charts side by side."""
    return f'<div class="charts">{"".join(drawn)}</div>'
