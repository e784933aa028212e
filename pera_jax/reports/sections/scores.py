"""Probe scores: a table with baselines, and charts over training steps."""

import collections
from collections.abc import Sequence
from typing import Any

import numpy as np

from pera_jax.common import html
from pera_jax.probes.runner import keys
from pera_jax.probes.runner.results import failed_shares
from pera_jax.reports import folder
from pera_jax.reports.drawing import charts
from pera_jax.reports.drawing.charts import Chart, Series

READING = (
    "Scores of frozen features on test images, which were not used to choose hyperparameters; in brackets the 95% "
    "bootstrap interval. Baselines: “untrained” is the network at initialization, “pixels” the mean and standard "
    "deviation of raw patches."
)
STEPS_READING = (
    "The same scores for every probed checkpoint, with their intervals; step 0 is the untrained network, the dashed "
    "line the pixel baseline."
)


def text(score: dict[str, Any] | None) -> str:
    """A score with its interval."""
    if score is None:
        return ""
    interval = "" if score["low"] is None or score["high"] is None else f" ({score['low']:.3f} – {score['high']:.3f})"
    return f"{score['value']:.3f}{interval}"


def table(results: Sequence[dict[str, Any]], step: int | None) -> str:
    """The scores as an HTML table: a row for each score on the same data, splits, size and settings, and columns for
    pixels, untrained and trained; failures below."""
    trained = folder.trained_results(results, step)
    columns = [
        (title, entries)
        for title, entries in (
            ("pixels", _of(results, folder.PIXELS)), ("untrained", _of(results, folder.UNTRAINED)),
            (f"trained, {folder.source(trained[0])}" if trained else "trained", trained),
        )
        if entries
    ]  # fmt: skip
    values = {
        title: {(entry["row"], name): score for entry in entries for name, score in entry["scores"].items()}
        for title, entries in columns
    }
    order = list(dict.fromkeys(place for column in reversed(values.values()) for place in column))
    names = {entry["row"]: entry["name"] for _, entries in columns for entry in entries}
    data = keys.data_labels([entry for _, entries in columns for entry in entries])
    rows = [["score", "result", *values, "test data"]]
    for row, score in order:
        rows.append([score, names[row], *(text(column.get((row, score))) for column in values.values()), data[row]])
    failed = [
        f"{entry['name']} of {folder.source(entry)} failed: {entry['failure']}" for entry in results if entry["failure"]
    ]
    failed += [f"{entry['name']} {split} of {folder.source(entry)} failed: {error}" for entry in results
               for split, error in failed_shares(entry).items()]  # fmt: skip
    sentences = "".join(f'<p class="warn">{html.escaped(sentence)}</p>' for sentence in failed)
    return (html.table(rows) if order else "") + sentences


def _of(results, encoder):
    return [entry for entry in results if entry["checkpoint"]["encoder"] == encoder]


def titles(results: Sequence[dict[str, Any]]) -> dict[str, str]:
    """A title for each `row`: the name of the result, with the data if several rows have the same name."""
    names, data = {entry["row"]: entry["name"] for entry in results}, keys.data_labels(results)
    several = collections.Counter(names.values())
    return {row: f"{name} ({data[row]})" if several[name] > 1 else name for row, name in names.items()}


def over_steps(results: Sequence[dict[str, Any]]) -> str:
    """A chart for each score with several checkpoints; "" if there is none."""
    found: dict[tuple[str, str], dict[int, dict]] = {}
    levels: dict[tuple[str, str], float] = {}
    for entry in results:
        encoder = entry["checkpoint"]["encoder"]
        for name, score in entry["scores"].items():
            place = (entry["row"], name)
            if encoder == folder.PIXELS:
                levels[place] = score["value"]
            else:
                found.setdefault(place, {})[0 if encoder == folder.UNTRAINED else entry["checkpoint"]["step"]] = score
    drawn, named = [], titles(results)
    for place, by_step in found.items():
        if len([step for step in by_step if step > 0]) < 2:
            continue
        steps = np.array(sorted(by_step), np.float64)
        scores = [by_step[int(step)] for step in steps]
        values = np.array([score["value"] for score in scores])
        bars = np.array([[np.nan if score[end] is None else score[end] for end in ("low", "high")] for score in scores])
        level = (("pixels", levels[place]),) if place in levels else ()
        drawn.append(
            charts.svg(Chart(f"{named[place[0]]}: {place[1]}", (Series("network", steps, values, bars),), level))
        )
    return charts.row(drawn) if any(drawn) else ""
