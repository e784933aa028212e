"""What a probe found, written beside the run: results.json, results.csv, TensorBoard, and a table to read.

An entry is the result of one task on one data set: task, checkpoint, data, settings, scores {name: {value, and where
there is an interval low, high}} and whatever else the task tells.
"""

import csv
import io
import json
import os
import pathlib
import time
from collections.abc import Sequence
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2, summary_pb2

from pera_jax import files
from pera_jax.errors import UserError

_COLUMNS = ("task", "score", "value", "low", "high", "step", "untrained", "data", "train_split", "test_split",
            "train_fingerprint", "test_fingerprint", "image_size")  # fmt: skip


def write(folder: pathlib.Path, entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Writes `folder`/results.json and results.csv; earlier entries of other tasks, data or checkpoints stay.

    Returns:
      All entries that the files now hold.

    Raises:
      UserError: the folder cannot be written, or its results.json is not one of ours.
    """
    file = folder / "results.json"
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))["results"] if file.exists() else []
        new = {_place(entry) for entry in entries}
        results = [entry for entry in kept if _place(entry) not in new] + list(entries)
        files.write(file, json.dumps({"results": results}, indent=2, allow_nan=False).encode() + b"\n")
        files.write(folder / "results.csv", _csv(results).encode())
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}; make room or choose another --output") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is no file of results; move it away or choose another --output") from error
    return results


def write_events(folder: pathlib.Path, step: int, entries: Sequence[dict[str, Any]]) -> None:
    """Appends each score as `probe/NAME` at `step` to the TensorBoard folder. Raises UserError as `write`."""
    values = [
        summary_pb2.Summary.Value(tag=f"probe/{name}", simple_value=score["value"])
        for entry in entries
        for name, score in entry["scores"].items()
    ]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # tensorboardX names files by the second and writes over one that is there.
        events = EventsWriter(str(folder / "events"), f".step{step}.{os.getpid()}.{time.time_ns()}")
        events.write_event(event_pb2.Event(step=step, wall_time=time.time(), summary=summary_pb2.Summary(value=values)))
        events.close()
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}; make room or choose another --output") from error


def table(entries: Sequence[dict[str, Any]]) -> str:
    """The scores as lines of text: name, value, interval, and what was chosen without the test split."""
    rows = [("score", "value", "95 % interval", "chosen on a part of the training split")]
    for entry in entries:
        chosen = entry.get("chosen", "")
        if isinstance(chosen, dict):
            chosen = ", ".join(f"{name} {value}" for name, value in chosen.items())
        for number, (name, score) in enumerate(entry["scores"].items()):
            interval = f"{score['low']:.4f} to {score['high']:.4f}" if "low" in score else ""
            rows.append((name, f"{score['value']:.4f}", interval, chosen if number == 0 else ""))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)


def _place(entry: dict[str, Any]) -> tuple:
    """What two results of one folder may differ in; a second one of the same place takes the first one's."""
    checkpoint = entry["checkpoint"]
    return entry["task"], entry["data"]["name"], checkpoint["run"], checkpoint["step"], checkpoint["untrained"]


def _csv(entries: Sequence[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, _COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for entry in entries:
        fields = entry["data"] | entry["checkpoint"] | {"data": entry["data"]["name"], "task": entry["task"]}
        writer.writerows(fields | {"score": name} | score for name, score in entry["scores"].items())
    return text.getvalue()
