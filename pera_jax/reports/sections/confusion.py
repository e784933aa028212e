"""Confusion matrices as heat maps, and scores of each class."""

from typing import Any

import numpy as np

from pera_jax.common import html
from pera_jax.reports.sections import tokens

READING = (
    "Rows are true classes, columns predicted classes. A cell shows the percentage of the row's images (or pixels) "
    "that were predicted as the column's class; brighter is more. Correct predictions are on the diagonal; a bright "
    "cell off the diagonal marks two classes that the features do not separate."
)
STYLE = """
.beside { display: flex; flex-wrap: wrap; gap: 0 56px; } svg .light { fill: #fff; } svg .dark { fill: #000; }
"""
DENSE = ("segmentation", "change")  # tasks whose units are pixels
_CELLS = 840  # px, width of a matrix with many classes
_MOST = 12  # confusions listed at most


def matrix(entry: dict[str, Any]) -> np.ndarray | None:
    """The confusion matrix [true, predicted] of an entry; None if it has none that fits its classes."""
    found, names = entry["details"].get("confusion"), entry["data"]["class_names"]
    try:
        counts = np.array(found, np.float64)
    except (TypeError, ValueError):
        return None
    square = counts.shape == (len(names), len(names)) and len(names) > 0
    return counts if square and np.isfinite(counts).all() and (counts >= 0).all() else None


def svg(counts: np.ndarray, names: list[str]) -> str:
    """The heat map as SVG; cells of 0.5% or more have their percentage as text."""
    number = len(names)
    cell = min(max(_CELLS / number, 14.0), 46.0)
    font = min(max(cell * 0.5, 8.0), 13.0)
    label = min(max(cell * 0.62, 9.5), 13.0)
    margin = 16 + label * 0.64 * min(max(len(name) for name in names), 28)
    size = margin + number * cell + 2
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1e-12)
    colors = tokens.heat(shares)
    parts = []
    for row, name in enumerate(names):
        middle = margin + (row + 0.5) * cell
        short = html.escaped(name if len(name) <= 28 else name[:27] + "…")
        below, edge = f"{middle + 0.35 * label:.1f}", f"{margin - 6:.1f}"
        parts.append(
            f'<text x="{edge}" y="{below}" text-anchor="end" class="label">{short}</text>'
            f'<text transform="translate({below},{edge}) rotate(-90)" class="label">{short}</text>'
        )
        for column in range(number):
            share, (red, green, blue) = shares[row, column], colors[row, column]
            left, top = margin + column * cell, margin + row * cell
            title = f"<title>{short} predicted as {html.escaped(names[column])}: {counts[row, column]:,.0f}</title>"
            parts.append(
                f'<rect x="{left:.1f}" y="{top:.1f}" width="{cell:.1f}" height="{cell:.1f}" '
                f'fill="#{red:02x}{green:02x}{blue:02x}">{title}</rect>'
            )
            if share >= 0.005:
                ink = "light" if share < 0.6 else "dark"  # on the dark and the bright end of the scale
                parts.append(
                    f'<text x="{left + cell / 2:.1f}" y="{top + cell / 2 + 0.35 * font:.1f}" text-anchor="middle" '
                    f'class="cell {ink}">{100 * share:.0f}</text>'
                )
    style = f"<style>.c{number} .label{{font-size:{label:.1f}px}} .c{number} .cell{{font-size:{font:.1f}px}}</style>"
    sizes = f'width="{size:.0f}" height="{size:.0f}" viewBox="0 0 {size:.0f} {size:.0f}"'
    drawn = f'<svg class="c{number}" {sizes} role="img" aria-label="confusion matrix">{style}{"".join(parts)}</svg>'
    return f'<div class="scroll">{drawn}</div>'


def confused(counts: np.ndarray, names: list[str]) -> str:
    """The most frequent confusions as an HTML table; "" without errors."""
    wrong = counts - np.diag(np.diag(counts))
    order = np.argsort(-wrong, axis=None, kind="stable")[:_MOST]
    rows = [["true class", "predicted class", "count", "fraction of the class"]]
    for place in order:
        row, column = np.unravel_index(place, wrong.shape)
        if wrong[row, column] > 0:
            share = wrong[row, column] / counts[row].sum()
            rows.append([names[row], names[column], f"{wrong[row, column]:,.0f}", f"{share:.0%}"])
    return "<h3>Most frequent errors</h3>" + html.table(rows) if len(rows) > 1 else ""


def by_class(counts: np.ndarray, names: list[str], units: str) -> str:
    """Recall, precision, F1 and IoU of each class as an HTML table, lowest recall first."""
    right, true, predicted = np.diag(counts), counts.sum(axis=1), counts.sum(axis=0)

    def share(part, whole):
        return f"{part / whole:.3f}" if whole else ""

    rows = [["class", units, "recall", "precision", "F1", "IoU"]]
    recall = np.where(true > 0, right / np.maximum(true, 1), 2.0)
    for place in np.argsort(recall, kind="stable"):
        r, t, p = right[place], true[place], predicted[place]
        rows.append([names[place], f"{t:,.0f}", share(r, t), share(r, p), share(2 * r, t + p), share(r, t + p - r)])
    return "<h3>Scores by class, lowest recall first</h3>" + html.table(rows)


def listed(entry: dict[str, Any]) -> str:
    """The detail "per_class" of an entry as an HTML table, one or more scores per class; "" without it."""
    found, names = entry["details"].get("per_class"), entry["data"]["class_names"]
    if not isinstance(found, dict):
        return ""
    rows = {
        name: value if isinstance(value := found[name], dict) else {"score": value} for name in names if name in found
    }
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    cells = [[name, *(_cell(row.get(column)) for column in columns)] for name, row in rows.items()]
    return html.table([["class", *(column.replace("_", " ") for column in columns)], *cells]) if cells else ""


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    return f"{value:,}" if isinstance(value, int) else ""


def section(entry: dict[str, Any]) -> str:
    """The class section of one result as HTML; "" if it has no scores by class."""
    counts, names = matrix(entry), entry["data"]["class_names"]
    if counts is None:
        return listed(entry)
    units = "pixels" if entry["task"] in DENSE else "images"
    tables = f"<div>{confused(counts, names)}</div><div>{by_class(counts, names, units)}</div>"
    return f'{svg(counts, names)}<div class="beside">{tables}</div>'
