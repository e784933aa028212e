"""Reads a run folder: metadata, metrics, alarms and probe results."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Iterator
from typing import Any

from pera_jax import objectives
from pera_jax.common import json_files
from pera_jax.common.errors import UserError
from pera_jax.common.text import printable, several
from pera_jax.probes.runner import entries, keys
from pera_jax.probes.runner import results as probes
from pera_jax.training.checkpoints import checkpoint, meta_fields

_MOST_STEPS = 1 << 53
UNTRAINED, PIXELS = "untrained", "pixels"


@dataclasses.dataclass(frozen=True)
class Folder:
    """The contents of a run folder.

    Attributes:
      meta: metadata from `run_meta.describe`, of the checkpoint or else of config.json.
      step: step of the shown checkpoint; None without one.
      metrics: lines of metrics.jsonl, numbers only; alarms: lines of alarms.jsonl.
      finished: whether the run has finished.
      results: probe results of this run, each with its `file` and `row` (see `keys.row`).
      faults: warnings about skipped files and lines.
    """

    path: pathlib.Path
    meta: dict[str, Any]
    step: int | None
    metrics: list[dict[str, float]]
    alarms: list[dict[str, Any]]
    finished: bool
    results: list[dict[str, Any]]
    faults: list[str]

    @property
    def last_step(self) -> int:
        """The last logged or saved step."""
        return int(max([self.step or 0, *(line["step"] for line in self.metrics)]))


def read(run: str, step: int | None) -> Folder:
    """Reads a run folder. Raises UserError: a folder or step that does not exist; not a run folder; an unreadable
    checkpoint."""
    path = pathlib.Path(run)
    if not path.is_dir():
        raise UserError(f"the run folder {run} does not exist; give the --workdir of a training")
    config = path / "config.json"
    if step is not None or checkpoint.saved_steps(path):
        place, step = checkpoint.folder_of(path, step)
        meta = checkpoint.load_meta(place)
    elif config.is_file():
        try:
            meta = json_files.loads(config.read_bytes())
            meta_fields.check_meta(meta)
            objectives.from_metadata(meta)
        except (OSError, json_files.Invalid, UserError) as error:
            raise UserError(
                f"{config} is not the config of a run ({error}); restore it, or give another run folder"
            ) from error
    else:
        raise UserError(
            f"{run} is not a run folder: it has neither a checkpoint nor {config.name}; give the --workdir of a "
            "training"
        )
    results, faults = _results(path)
    metrics = [_numbers(line) for line in _lines(path / "metrics.jsonl", faults)]
    alarms = [line for line in _lines(path / "alarms.jsonl", faults) if "alarm" in line]
    finished = (path / "FINISHED").exists()
    metrics = [line for line in metrics if "step" in line]
    by_step = {line["step"]: line for line in metrics}
    if len(by_step) < len(metrics):
        faults.append(
            f"{path / 'metrics.jsonl'} has {len(metrics) - len(by_step)} duplicate step(s); the later line is used."
        )
    return Folder(path, meta, step, [by_step[step] for step in sorted(by_step)], alarms, finished, results, faults)


def _lines(file: pathlib.Path, faults: list[str]) -> Iterator[dict[str, Any]]:
    """The objects of a JSON lines file; none without the file. The last line may be incomplete, if a run is writing it.

    Warnings about invalid lines are appended to `faults`.
    """
    if not file.is_file():
        return
    lines, broken = file.read_text(encoding="utf-8", errors="replace").split("\n"), []
    for number, line in enumerate(lines, start=1):
        try:
            if line.strip():
                yield json_files.parse(line, dict[str, Any])
        except json_files.Invalid:
            broken += [number] * (number < len(lines))
    if broken:
        faults.append(f"Skipped in {printable(file)}: invalid JSON in line {several(broken, 5)}.")


def _numbers(line: dict[str, Any]) -> dict[str, float]:
    """The numbers in a line of metrics, including "nan" and "inf"; {} if the step is invalid."""
    found = {}
    for name, value in line.items():
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            found[name] = float(value)
    return found if 0 <= found.get("step", -1) <= _MOST_STEPS else {}


def _results(path: pathlib.Path) -> tuple[list[dict[str, Any]], list[str]]:
    results, faults, others = [], [], set()
    for file in sorted(path.glob("probe/*/*.json")):
        try:
            entry = entries.read(file)
        except UserError as error:
            faults.append(f"Skipped: {error}.")
            continue
        if probes.replaced(path / "probe", entry):
            step = f"step {entry['checkpoint']['step']:,}"
            faults.append(f"Skipped: {printable(file)} is a result of an earlier checkpoint of {step}, which was saved "
                          "again since; probe it again.")  # fmt: skip
        elif entry["checkpoint"].get("origin", keys.OWN) == keys.OWN:
            scores = {} if "failure" in entry else entry["scores"]
            details, failure = entry.get("details", {}), entry.get("failure", "")
            full = entry | {"scores": scores, "details": details, "failure": failure, "file": file}
            results.append(full | {"row": keys.row(full)})
        else:
            others.add(entry["checkpoint"]["run"])
    if others:
        faults.append(f"Skipped: results of other runs in {path / 'probe'}: {several(sorted(others))}.")
    return results, faults


def source(entry: dict[str, Any]) -> str:
    """The evaluated network: "untrained", "pixels" or the step of the checkpoint."""
    encoder = entry["checkpoint"]["encoder"]
    return encoder if encoder in (UNTRAINED, PIXELS) else f"step {entry['checkpoint']['step']:,}"


def trained_results(results: list[dict[str, Any]], step: int | None) -> list[dict[str, Any]]:
    """The results of the shown checkpoint, or else of the latest checkpoint with results."""
    trained = [entry for entry in results if entry["checkpoint"]["encoder"] not in (UNTRAINED, PIXELS)]
    steps = sorted({entry["checkpoint"]["step"] for entry in trained})
    chosen = step if step in steps else (steps[-1] if steps else None)
    return [entry for entry in trained if entry["checkpoint"]["step"] == chosen]
