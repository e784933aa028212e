"""What lies in a run's folder: what the run is, its numbers, its alarms and the results of probes."""

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
    """
    Attributes:
      meta: what `run_meta.describe` wrote, of the checkpoint or, without one, of config.json.
      step: of the checkpoint that is shown; None without one.
      metrics: the lines of metrics.jsonl, numbers only; alarms: those of alarms.jsonl.
      finished: whether the run has come to its end.
      results: entries of the probe on this run, each with its `file` and the `row` of `keys`; faults: sentences on files
        that are none.
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
        """The last step that is known of."""
        return int(max([self.step or 0, *(line["step"] for line in self.metrics)]))


def read(run: str, step: int | None) -> Folder:
    """Raises UserError: no such folder or step, no folder of a run, a checkpoint that cannot be read."""
    path = pathlib.Path(run)
    if not path.is_dir():
        raise UserError(f"the run's folder {run} does not exist; name the --workdir of a training")
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
            raise UserError(f"{config} does not describe a run ({error}); restore it, or name another run") from error
    else:
        raise UserError(f"{run} is not the folder of a run: it holds neither a checkpoint nor {config.name}")
    results, faults = _results(path)
    metrics = [_numbers(line) for line in _lines(path / "metrics.jsonl", faults)]
    alarms = [line for line in _lines(path / "alarms.jsonl", faults) if "alarm" in line]
    finished = (path / "FINISHED").exists()
    metrics = [line for line in metrics if "step" in line]
    by_step = {line["step"]: line for line in metrics}
    if len(by_step) < len(metrics):
        faults.append(f"{path / 'metrics.jsonl'} holds {len(metrics) - len(by_step)} step(s) twice; the later line counts.")
    return Folder(path, meta, step, [by_step[step] for step in sorted(by_step)], alarms, finished, results, faults)


def _lines(file: pathlib.Path, faults: list[str]) -> Iterator[dict[str, Any]]:
    """The objects of a file of JSON lines; none without the file. The last line may be one that a run is writing just now.

    Sentences on lines that are none are added to `faults`.
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
        faults.append(f"Left out of {printable(file)}: what is no JSON in line {several(broken, 5)}.")


def _numbers(line: dict[str, Any]) -> dict[str, float]:
    """The numbers of a line of metrics; "nan" and "inf" are such. {} where the step is no number of steps."""
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
            faults.append(f"Left out: {error}.")
            continue
        if probes.replaced(path / "probe", entry):
            step = f"step {entry['checkpoint']['step']:,}"
            faults.append(f"Left out: {printable(file)} is of an earlier checkpoint of {step}, which was saved anew since; "
                          "probe it again.")  # fmt: skip
        elif entry["checkpoint"].get("origin", keys.OWN) == keys.OWN:
            scores = {} if "failure" in entry else entry["scores"]
            details, failure = entry.get("details", {}), entry.get("failure", "")
            full = entry | {"scores": scores, "details": details, "failure": failure, "file": file}
            results.append(full | {"row": keys.row(full)})
        else:
            others.add(entry["checkpoint"]["run"])
    if others:
        faults.append(f"Results of other runs lie in {path / 'probe'} and are left out: {several(sorted(others))}.")
    return results, faults


def who(entry: dict[str, Any]) -> str:
    """Whose result it is: "untrained", "pixels" or the step of the teacher."""
    encoder = entry["checkpoint"]["encoder"]
    return encoder if encoder in (UNTRAINED, PIXELS) else f"step {entry['checkpoint']['step']:,}"


def of_the_trained(results: list[dict[str, Any]], step: int | None) -> list[dict[str, Any]]:
    """The results of the checkpoint that is shown; where it has none, of the latest one that has."""
    trained = [entry for entry in results if entry["checkpoint"]["encoder"] not in (UNTRAINED, PIXELS)]
    steps = sorted({entry["checkpoint"]["step"] for entry in trained})
    chosen = step if step in steps else (steps[-1] if steps else None)
    return [entry for entry in trained if entry["checkpoint"]["step"] == chosen]
