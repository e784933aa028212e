"""Charts of the training metrics."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from pera_jax.common import html
from pera_jax.objectives.watched import Panel
from pera_jax.reports.drawing import charts
from pera_jax.reports.drawing.charts import Chart, Series

READING = (
    "All logged training metrics over steps. Faint: raw values; strong: exponential moving average with a half-life of "
    "1% of the run. Axes marked (log) are logarithmic."
)
# Common groups of charts; an objective adds charts and groups of its own.
_GROUPS: tuple[tuple[str, tuple[Panel, ...]], ...] = (
    ("Loss terms", (Panel("Total loss", False, True, {"loss": "loss"}),)),
    ("Teacher", ()),
    ("Norms", (
        Panel("Gradient", True, True, {"norm/gradient": "gradient"}),
        Panel("Update", True, True, {"norm/update": "update"}),
        Panel("Parameters", False, False, {"norm/parameters": "parameters"}),
    )),
    ("Schedules", (
        Panel("Learning rate", False, False, {"hyper/learning_rate": "rate"}),
        Panel("Weight decay", False, False, {"hyper/weight_decay": "decay"}),
    )),
    ("Speed", (
        Panel("Images per second", False, True, {"time/images_per_second": "all devices"}),
        Panel("Fraction of time waiting for data", False, True, {"time/data_wait_share": "fraction"}),
        Panel("MFU (fraction of peak FLOP/s)", False, True, {"time/mfu": "MFU"}),
    )),
    ("Monitor", (Panel("kNN accuracy in training, k = 20", False, False, {"monitor/knn20": "knn20"}),)),
)  # fmt: skip
_NOT_DRAWN = ("step", "data/images", "data/replaced", "time/images_per_second_per_chip")


def column(metrics: Sequence[dict[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of the lines with a metric, float64 each."""
    held = [(line["step"], float(line[name])) for line in metrics if name in line]
    return tuple(np.array(values, np.float64) for values in (zip(*held, strict=True) if held else ((), ())))


def groups(own: Sequence[tuple[str, Sequence[Panel]]]) -> list[tuple[str, tuple[Panel, ...]]]:
    """The common groups of charts with those of an objective, `Objective.curves`."""
    merged = {title: panels for title, panels in _GROUPS}
    for title, panels in own:
        merged[title] = (*merged.get(title, ()), *panels)
    return list(merged.items())


def drawn(metrics: Sequence[dict[str, Any]], own: Sequence[tuple[str, Sequence[Panel]]]) -> list[tuple[str, str]]:
    """(group title, charts as HTML) for all logged metrics; metrics without a defined chart come last."""
    shown = groups(own)
    known = {metric for _, panels in shown for panel in panels for metric in panel.metrics}
    others = sorted({name for line in metrics for name in line} - known - set(_NOT_DRAWN))
    last = ("Other", tuple(Panel(name, False, True, {name: name}) for name in others))
    result = []
    for title, panels in (*shown, last):
        found = []
        for panel in panels:
            series = tuple(
                Series(label, steps, values, smooth=panel.smoothed)
                for metric, label in panel.metrics.items()
                for steps, values in [column(metrics, metric)]
                if len(steps)
            )
            found.append(charts.svg(Chart(panel.title, series, log=panel.logarithmic)) if series else "")
        if any(found):
            result.append((title, charts.row(found)))
    return result


def section(metrics: Sequence[dict[str, Any]], own: Sequence[tuple[str, Sequence[Panel]]]) -> str:
    """The charts of a run.

    Args:
      own: `Objective.curves` of its method.
    """
    return "".join(f"<h3>{html.escaped(title)}</h3>{content}" for title, content in drawn(metrics, own))
