"""Probe results, written beside the run: one JSON file per result, a table, TensorBoard events and pictures.

    BASE/step_000640/NAME-KEY.json     one result (see below); BASE is RUN/probe or --output
    BASE/step_000640/NAME-KEY/*.png    its pictures
    BASE/results.csv                   one row per score of all results
    BASE/tb                            TensorBoard: `probe/NAME-KEY/SCORE` at the checkpoint's step

KEY is a hash of the run and of what was measured, see `keys`: results with other data, splits, sizes or settings have
other keys. Files of earlier versions, NAME.json, are read too. An entry has name, task, checkpoint, data, settings,
spec (all requested fields), seconds, scores {name: {value, low, high, seeds}} and details {name: ...}; or, if the task
failed, `failure` with the error message in place of scores, details and seconds.
"""

import contextlib
import csv
import glob
import io
import json
import os
import pathlib
import shutil
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2, summary_pb2

from pera_jax.common import files, lease, owned
from pera_jax.common.errors import UserError
from pera_jax.common.text import printable
from pera_jax.probes.runner import entries, keys
from pera_jax.training.checkpoints import checkpoint

COLUMNS = ("name", "task", "score", "value", "low", "high", "seeds", "step", "encoder", "data", "train_split",
           "test_split", "image_size", "settings", "train_fingerprint", "test_fingerprint", "weights", "git",
           "run", "failure", "replaced")  # fmt: skip

_WRITE_TIMEOUT = 600.0  # seconds to wait for another job that writes results
_BASELINES = ("untrained", "pixels")
_PLACES = ("step_*", *_BASELINES)


def folder_of(encoder: str, step: int) -> str:
    """The folder name for the results of a checkpoint, or of a baseline, which does not depend on the step."""
    return encoder if encoder in _BASELINES else f"step_{step:06d}"


def _writing(base: pathlib.Path) -> contextlib.AbstractContextManager:
    """A lock on writing results into `base`. Raises UserError if the folder cannot be written."""
    return lease.held(base, "--output", name=".write.lease", wait=_WRITE_TIMEOUT)


def write(base: pathlib.Path, entry: dict[str, Any], pictures: dict[str, np.ndarray]) -> None:
    """Writes one result with its pictures, and updates the table; replaces a result with the same checkpoint and key.

    Args:
      pictures: uint8 [H, W] by "FOLDER/KEY" or "KEY".

    Raises:
      UserError: the folder cannot be written, or has a file that is not a result.
    """
    place = base / folder_of(entry["checkpoint"]["encoder"], entry["checkpoint"]["step"])
    content, stem = json.dumps(entry, indent=1, allow_nan=False), keys.stem(entry)
    with _writing(base):
        try:
            shutil.rmtree(place / stem, ignore_errors=True)
            for key, values in pictures.items():
                encoded = io.BytesIO()
                Image.fromarray(values).save(encoded, "PNG")
                files.write(place / stem / f"{key.split('/')[-1]}.png", encoded.getvalue())
            # before the JSON file, which marks completion; duplicate events are harmless
            _write_events(base / "tb", entry, stem)
            files.write(place / f"{stem}.json", content.encode() + b"\n")
            for file in _files(place, entry["name"]):  # written by an earlier version under another name
                if file.stem != stem and keys.stem(entries.read(file)) == stem:
                    file.unlink()
                    shutil.rmtree(file.with_suffix(""), ignore_errors=True)
        except OSError as error:
            raise _unwritable(base, error) from error
        _write_table(base)


def check_writable(base: pathlib.Path) -> None:
    """Raises UserError if results could not be written; leaves no files behind."""
    owned.check(base / "results.csv")
    try:
        files.check_writable(base / "results.csv")
    except OSError as error:
        raise _unwritable(base, error) from error


def write_table(base: pathlib.Path) -> None:
    """Rewrites results.csv from the existing results. Raises UserError as `write`."""
    with _writing(base):
        _write_table(base)


def _write_table(base: pathlib.Path) -> None:
    try:
        files.write(base / "results.csv", _csv(read(base)).encode("utf-8", "backslashreplace"))
    except OSError as error:
        raise _unwritable(base, error) from error


def _unwritable(base: pathlib.Path, error: OSError) -> UserError:
    return UserError(f"cannot write to {base}: {error.strerror}; free disk space or choose another --output")


def read(base: pathlib.Path) -> list[dict[str, Any]]:
    """All entries below `base`, sorted by step, encoder and name, each with a field `replaced`. Raises UserError for a
    file that is not a result."""
    found = [_read(base, file) for place in _PLACES for file in base.glob(f"{place}/*.json")]
    return sorted(found, key=lambda e: (e["checkpoint"]["step"], e["checkpoint"]["encoder"], e["name"]))


def replaced(base: pathlib.Path, entry: Mapping[str, Any]) -> bool:
    """Whether the checkpoint of an entry was saved again since; False if it no longer exists."""
    stored = entry["checkpoint"]
    if stored["encoder"] in _BASELINES or not stored["saved"]:
        return False
    run = pathlib.Path(os.path.realpath(base)) / stored["origin"] if "origin" in stored else pathlib.Path(stored["run"])
    now = checkpoint.identity(run / checkpoint.FOLDER / str(stored["step"]))
    return now not in ("", stored["saved"])


def read_step(base: pathlib.Path, step: int, name: str) -> list[dict[str, Any]]:
    """The entries with this name of the trained network at a step. Raises UserError for a file that is not a
    result."""
    found = [_read(base, file) for file in _files(base / folder_of("teacher", step), name)]
    return [entry for entry in found if entry["name"] == name]


def _read(base: pathlib.Path, file: pathlib.Path) -> dict[str, Any]:
    entry = entries.read(file)
    return entry | {"replaced": replaced(base, entry)}


def _files(place: pathlib.Path, name: str) -> list[pathlib.Path]:
    """The files that may have results with this name."""
    prefix = glob.escape(keys.prefix(name))
    return [*place.glob(f"{prefix}.json"), *place.glob(f"{prefix}-*.json")]


def markdown(entries: Sequence[dict[str, Any]]) -> str:
    """The scores as an aligned Markdown table."""
    rows = [("result", "data", "network", "step", "run", "score", "value", "95% interval", "seeds")]
    data = keys.data_labels(entries)
    several = len({entry["checkpoint"].get("origin", keys.OWN) for entry in entries}) > 1
    for entry in entries:
        network = entry["checkpoint"]
        step = f"{network['step']}, saved again since" if entry.get("replaced") else str(network["step"])
        where = (entry["name"], data[keys.row(entry)], network["encoder"], step,
                 network["run"] if several else "")  # fmt: skip
        if "failure" in entry:
            rows.append((*where, "failed", "", "", entry["failure"]))
        for share, sentence in failed_shares(entry).items():
            rows.append((*where, share, "failed", "", sentence))
        for name, score in entry.get("scores", {}).items():
            interval = "" if None in (score["low"], score["high"]) else f"{score['low']:.4f} - {score['high']:.4f}"
            seeds = f"{len(score['seeds'])}, std {np.std(score['seeds']):.4f}" if len(score["seeds"]) > 1 else ""
            rows.append((*where, name, f"{score['value']:.4f}", interval, seeds))
    rows = [[printable(cell, 1000).replace("|", "\\|") for cell in row] for row in rows]
    used = [column for column in range(len(rows[0])) if any(row[column] for row in rows[1:])]
    widths = {column: max(len(row[column]) for row in rows) for column in used}
    rows.insert(1, ["-" * widths.get(column, 0) for column in range(len(rows[0]))])
    return "\n".join("| " + " | ".join(row[column].ljust(widths[column]) for column in used) + " |" for row in rows)


def failed_shares(entry: Mapping[str, Any]) -> dict[str, str]:
    """The error message of each split of `shares` that failed, by name, such as "20/80"."""
    details = (entry.get("details") or {}).items()
    return {name.removeprefix("failed_"): str(said) for name, said in details if name.startswith("failed_")}


def _csv(entries: Sequence[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for entry in entries:
        fields = entry["data"] | entry["checkpoint"] | {key: entry[key] for key in ("name", "task")}
        fields |= {"data": entry["data"]["path"], "settings": json.dumps(entry.get("settings"))}
        fields |= {"replaced": "saved again since" if entry.get("replaced") else ""}
        if "failure" in entry:
            writer.writerow(fields | {"failure": entry["failure"]})
        for name, score in entry.get("scores", {}).items():
            writer.writerow(fields | score | {"score": name, "seeds": " ".join(map(str, score["seeds"]))})
    return text.getvalue()


def _write_events(folder: pathlib.Path, entry: dict[str, Any], stem: str) -> None:
    step, scores = entry["checkpoint"]["step"], entry.get("scores", {})
    if entry["checkpoint"]["encoder"] == "pixels" or not scores:
        return
    values = [
        summary_pb2.Summary.Value(tag=f"probe/{stem}/{name}", simple_value=score["value"])
        for name, score in scores.items()
    ]
    folder.mkdir(parents=True, exist_ok=True)
    # tensorboardX names files by the second and would overwrite an existing one.
    events = EventsWriter(str(folder / "events"), f".step{step}.{os.getpid()}.{time.time_ns()}")
    events.write_event(event_pb2.Event(step=step, wall_time=time.time(), summary=summary_pb2.Summary(value=values)))
    events.close()
