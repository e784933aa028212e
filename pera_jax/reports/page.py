"""The report as one HTML page: sections with an explanation each, and at the end the reasons for missing sections."""

import dataclasses
import json
from typing import Any

from pera_jax import objectives
from pera_jax.bands import Bands
from pera_jax.common import html
from pera_jax.common.errors import UserError
from pera_jax.reports import folder
from pera_jax.reports.drawing import charts, grid
from pera_jax.reports.drawing.grid import Grid
from pera_jax.reports.folder import Folder
from pera_jax.reports.sections import confusion, curves, head, overlays, scores

STYLE = (
    grid.STYLE
    + charts.STYLE
    + confusion.STYLE
    + """
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(500px, 100%), 1fr)); gap: 0 40px; }
.reading { max-width: 900px; color: #4a525a; } pre { font-size: 12px; overflow-x: auto; }
.cards table + .scroll { margin-top: 12px; } .alarms { margin-top: 18px; }
summary { cursor: pointer; }
@page { size: landscape; margin: 12mm; }
@media print {
  body { max-width: none; padding: 0; } nav { display: none; } h2, h3, .reading { break-after: avoid; }
  .scroll { overflow: visible; } .scroll svg { max-width: 100%; max-height: 180mm; break-inside: avoid; }
}
"""
)
NO_DATA = "no images; give a dataset folder with --data."
NO_CHECKPOINT = "the run has no complete checkpoint yet."
NO_RESULTS = "the run has not been probed yet; use pera-jax probe."


@dataclasses.dataclass(frozen=True)
class Section:
    """A section of the page.

    Attributes:
      place: HTML anchor; title: heading.
      reading: explanation of the content.
      body: HTML; "" if the section is missing.
      missing: reason why the section is missing.
    """

    place: str
    title: str
    reading: str
    body: str
    missing: str = ""


def pictured(place: str, title: str, reading: str, shown: Grid, caption: str) -> Section:
    """A section with one grid."""
    return Section(place, title, reading, f"{grid.figures(shown)}<p><b>{html.escaped(caption)}</b></p>")


def folder_sections(run: Folder) -> tuple[list[Section], list[Section], dict[str, Grid]]:
    """The sections that need no images: those before the figures, those after them, and the grids of scenes by the stem
    of the result's file."""
    trained = [entry for entry in folder.trained_results(run.results, run.step) if not entry["failure"]]
    titles = scores.titles(trained)
    faults = "".join(f'<p class="warn">{html.escaped(fault)}</p>' for fault in run.faults)
    table = scores.table(run.results, run.step) + faults
    before = [
        Section("scores", "Scores", scores.READING, table, NO_RESULTS),
        Section("steps", "Scores against the step", scores.STEPS_READING, scores.over_steps(run.results),
                "fewer than two checkpoints of this run have been probed."),
    ]  # fmt: skip
    parts, bands, rgb = [], Bands.from_metadata(run.meta), tuple(run.meta["config"]["data"]["rgb"])
    for entry in sorted(trained, key=lambda entry: entry["task"] in confusion.DENSE):
        if content := confusion.section(entry):
            opened = "" if parts else " open"
            heading = f"{html.escaped(titles[entry['row']])}, {folder.source(entry)}"
            parts.append(f"<details{opened}><summary><b>{heading}</b></summary>{content}</details>")
    drawn, scenes = [], {}
    for entry in trained:
        if entry["task"] in confusion.DENSE:
            shown, remarks = overlays.grid(entry, bands, rgb)
            if shown is not None:
                scenes[entry["file"].stem] = shown
            if shown is not None or remarks:
                words = "".join(f'<p class="quiet">{html.escaped(remark)}</p>' for remark in remarks)
                drawn.append(
                    f"<h3>{html.escaped(titles[entry['row']])}</h3>{grid.figures(shown) if shown else ''}{words}"
                )
    config = html.escaped(json.dumps(run.meta, indent=1, ensure_ascii=False))
    after = [
        Section("classes", "Classes", confusion.READING, "".join(parts),
                "no probe result of this run has a confusion matrix."),
        Section("scenes", "Segmentation and change", overlays.READING, "".join(drawn),
                "the run has not been probed for segmentation or change detection."),
        Section("curves", "Training", curves.READING, curves.section(run.metrics, _own_curves(run.meta)),
                "the run has no metrics.jsonl, or it is still empty."),
        Section("config", "Config", "The complete configuration of the run, as stored with the weights.",
                f"<details><summary>config.json</summary><pre>{config}</pre></details>"),
    ]  # fmt: skip
    return before, after, scenes


def assembled(run: Folder, sections: list[Section]) -> bytes:
    """The page, UTF-8 encoded."""
    name = run.meta["config"]["name"]
    step = f"step {run.last_step if run.step is None else run.step:,}"
    present = "".join(f'<a href="#{s.place}">{html.escaped(s.title)}</a> ' for s in sections if s.body)
    parts = [f"<h1>{html.escaped(name)}, {step}</h1><nav>{present}</nav>{head.section(run)}"]
    for section in (section for section in sections if section.body):
        reading = f'<p class="reading">{html.escaped(section.reading)}</p>'
        heading = f"<h2>{html.escaped(section.title)}</h2>"
        parts.append(f'<section id="{section.place}">{heading}{reading}{section.body}</section>')
    if left := [(section.title, section.missing) for section in sections if not section.body]:
        parts.append(f'<section id="missing"><h2>Missing sections</h2>{html.facts(left)}</section>')
    return html.document(f"{name}, {step}", parts, STYLE)


def _own_curves(meta: dict[str, Any]):
    """The charts of the run's method; () if the method is unknown."""
    try:
        return objectives.method(meta["config"]["objective"]).curves
    except UserError:
        return ()
