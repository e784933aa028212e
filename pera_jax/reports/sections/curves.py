"""Which of a run's numbers are drawn together."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from pera_jax.common import html
from pera_jax.reports.drawing import charts
from pera_jax.reports.drawing.charts import Chart, Series

READING = (
    "All that training logged, against the step. Faint: the values as they are; strong: their exponentially weighted "
    "mean, in which a value counts half after a hundredth of the run. "
    "Scales with (log) are logarithmic."
)
# Group: charts, each (title, logarithmic where it can be, smoothed, {metric: its name in the chart}).
_GROUPS: tuple[tuple[str, tuple[tuple[str, bool, bool, dict[str, str]], ...]], ...] = (
    ("Loss terms", (
        ("Whole loss", False, True, {"loss": "loss"}),
        ("Class term, nats", False, True,
         {"loss/class": "all", "loss/class_global": "global part", "loss/class_local": "local part"}),
        ("KoLeo (spreading) term", False, True, {"loss/koleo": "koleo"}),
        ("Pixel term", True, True, {"loss/pixel": "pixel"}),
    )),
    ("Teacher", (
        ("Entropy of the teacher, nats", False, True,
         {"teacher/entropy": "of each look", "teacher/entropy_of_mean": "of their mean"}),
        ("KL of student from teacher, nats", False, True, {"kl": "kl"}),
        ("KL of their mean from uniform, nats", False, True, {"teacher/kl_to_uniform": "kl"}),
        ("Variance of directions, 0: all alike", False, True,
         {"teacher/feature_variance": "class tokens", "teacher/unit_variance": "head"}),
        ("Prototypes in use", True, True, {"teacher/prototypes_in_use": "prototypes"}),
        ("Length of the centre", False, True, {"teacher/center_norm": "centre"}),
    )),
    ("Norms", (
        ("Gradient", True, True, {"norm/gradient": "gradient"}),
        ("Update", True, True, {"norm/update": "update"}),
        ("Parameters", False, False, {"norm/parameters": "parameters"}),
    )),
    ("Schedules", (
        ("Learning rate", False, False, {"hyper/learning_rate": "rate"}),
        ("Weight decay", False, False, {"hyper/weight_decay": "decay"}),
        ("Momentum of the teacher", False, False, {"hyper/momentum": "momentum"}),
        ("Temperatures", False, False,
         {"hyper/teacher_temperature": "teacher", "hyper/student_temperature": "student"}),
    )),
    ("Speed", (
        ("Images per second", False, True, {"time/images_per_second": "all devices"}),
        ("Share of time waiting for data", False, True, {"time/data_wait_share": "share"}),
        ("Share of the devices' peak FLOP/s", False, True, {"time/mfu": "share"}),
    )),
    ("Monitor", (("kNN accuracy in training, k = 20", False, False, {"monitor/knn20": "knn20"}),)),
)  # fmt: skip
_NOT_DRAWN = ("step", "data/images", "data/replaced", "time/images_per_second_per_chip")


def column(metrics: Sequence[dict[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of the lines that hold a metric, float64."""
    held = [(line["step"], float(line[name])) for line in metrics if name in line]
    return tuple(np.array(values, np.float64) for values in (zip(*held, strict=True) if held else ((), ())))


def drawn(metrics: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """(title of a group, its charts as HTML) of all metrics that are there; those without a chart of their own last."""
    known = {metric for _, panels in _GROUPS for *_, names in panels for metric in names}
    others = sorted({name for line in metrics for name in line} - known - set(_NOT_DRAWN))
    last = ("Others", tuple((name, False, True, {name: name}) for name in others))
    groups = []
    for title, panels in (*_GROUPS, last):
        found = []
        for heading, log, smooth, names in panels:
            series = tuple(
                Series(label, steps, values, smooth=smooth)
                for metric, label in names.items()
                for steps, values in [column(metrics, metric)]
                if len(steps)
            )
            found.append(charts.svg(Chart(heading, series, log=log)) if series else "")
        if any(found):
            groups.append((title, charts.row(found)))
    return groups


def section(metrics: Sequence[dict[str, Any]]) -> str:
    return "".join(f"<h3>{html.escaped(title)}</h3>{content}" for title, content in drawn(metrics))
