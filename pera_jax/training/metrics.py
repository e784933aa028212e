"""Writes the metrics of a run: `metrics.jsonl`, `alarms.jsonl`, TensorBoard and a progress line.

Keys that start with `time/` are wall-clock measurements. All other values are reproducible, also across a resume.
"""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import time
from collections.abc import Iterator, Mapping
from typing import Any, TextIO

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2, summary_pb2

from pera_jax.common import files, json_files
from pera_jax.common.errors import UserError
from pera_jax.common.progress import Line, duration_text, rate_text


class MetricsWriter:
    """Writes the metrics of a run to its workdir and shows a progress line on stderr.

    * `metrics.jsonl`: one JSON object per line, "step" first, then the other keys in alphabetical order. It is strict
      JSON: non-finite values are written as the strings "nan", "inf" or "-inf" (Python's `float` parses them).
      On construction it is truncated atomically to the lines up to `resume_step`; a last line cut short by a crash is
      dropped. Writes are unbuffered, so a killed process loses no step whose checkpoint it saved.
    * `alarms.jsonl`: one JSON object per alarm, "step", "alarm" (its name) and "text"; truncated in the same way.
    * `tb/`: TensorBoard events. A resumed run opens a new file, which makes TensorBoard discard the points after
      `resume_step` in the older ones.
    * stderr: one live line on a terminal, else a plain line for each `write`; a line for each alarm.

    Only one process of a run may create one.
    """

    def __init__(
        self, workdir: str | os.PathLike, *, resume_step: int, total: int, batch_size: int, stream: TextIO | None = None
    ):
        """
        Args:
          workdir: folder of the run; created if missing.
          resume_step: number of steps done so far: 0, or the step of the checkpoint being resumed.
          total: number of steps of the whole run.
          batch_size: global batch size in images, to estimate the remaining time.
          stream: where the progress line is written; stderr by default.

        Raises:
          UserError: the workdir cannot be written, or one of the two files in it was not written by this class.
        """
        self._path, alarms = (pathlib.Path(workdir) / name for name in ("metrics.jsonl", "alarms.jsonl"))
        self._total, self._batch_size = total, batch_size
        self._line = Line(stream)
        self._failed = False
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            for path in (self._path, alarms):
                _cut_back(path, resume_step)
            self._file, self._alarms = (open(path, "ab", buffering=0) for path in (self._path, alarms))
            # Not `SummaryWriter`: when the disk is full, its thread dies and the run waits for it forever.
            (self._path.parent / "tb").mkdir(exist_ok=True)
            self._events = EventsWriter(str(self._path.parent / "tb" / "events"), f".step{resume_step}")
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._write_event(event_pb2.Event(step=resume_step + 1, session_log=start))
        except OSError as error:
            raise _unwritable(self._path.parent, error) from error

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Records the values (Python or NumPy numbers) of step number `step`, counted from 1.

        Raises:
          UserError: the workdir cannot be written, for instance because the disk is full.
        """
        values = {key: _number(values[key]) for key in sorted(values)}
        record = {"step": int(step)} | {key: _strict(value) for key, value in values.items()}
        scalars = [summary_pb2.Summary.Value(tag=key, simple_value=value) for key, value in values.items()]
        with self._told():
            _write_all(self._file, json.dumps(record, allow_nan=False).encode() + b"\n")
            self._write_event(event_pb2.Event(step=int(step), summary=summary_pb2.Summary(value=scalars)))
        self._line.show(self._describe(step, values))

    def write_alarm(self, step: int, name: str, text: str, say: bool = True) -> None:
        """Records an alarm that begins at `step` and prints it on stderr if `say`. Raises UserError as `write` does."""
        with self._told():
            _write_all(self._alarms, json.dumps({"step": int(step), "alarm": name, "text": text}).encode() + b"\n")
        if say:
            self._line.say(f"alarm at step {step:,}, {name}: {text}")

    def close(self) -> None:
        """Ends the live line and closes the files. Raises UserError as `write` does, unless `write` already did."""
        self._line.end()
        self._file.close()
        self._alarms.close()
        try:
            self._events.close()
        except OSError as error:
            if not self._failed:
                raise _unwritable(self._path.parent, error) from error

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._failed = True
            raise _unwritable(self._path.parent, error) from error

    def _write_event(self, event: event_pb2.Event) -> None:
        event.wall_time = time.time()
        self._events.write_event(event)
        self._events.flush()

    def _describe(self, step: int, values: Mapping[str, float]) -> str:
        parts = [f"step {step:,}/{self._total:,}"]
        if "loss" in values:
            parts.append(f"loss {values['loss']:.4g}")
        rate = values.get("time/images_per_second", 0.0)
        if rate > 0:
            left = (self._total - step) * self._batch_size / rate
            parts += [f"{rate_text(rate)} images/s", f"ETA {duration_text(left)}"]
        return "  ".join(parts)


@dataclasses.dataclass
class _Logged:
    """A line of metrics.jsonl or alarms.jsonl."""

    step: json_files.Count


def _cut_back(path: pathlib.Path, last_step: int) -> None:
    """Keeps the complete lines of steps up to `last_step`, through a temporary file and a rename."""
    if not path.exists():
        return
    content = path.read_bytes()
    *lines, torn = content.split(b"\n")  # what follows the last newline is an incomplete line
    kept = []
    for number, line in enumerate(lines, start=1):
        try:
            step = json_files.parse(line, _Logged).step
        except json_files.Invalid as error:
            raise UserError(
                f"line {number} of {path} is not a valid record of {path.stem} ({error}); repair or move the file, or "
                "choose another workdir"
            ) from error
        if step <= last_step:
            kept.append(line)
    if torn or len(kept) != len(lines):
        files.write(path, b"".join(line + b"\n" for line in kept))


def _write_all(file, data: bytes) -> None:
    """Unbuffered writes can be partial, for instance when the disk is nearly full."""
    while data:
        data = data[file.write(data) :]


def _number(value: Any) -> int | float:
    value = value.item() if hasattr(value, "item") else value
    return value if isinstance(value, int) else float(value)


def _strict(value: int | float) -> int | float | str:
    return value if math.isfinite(value) else str(value)


def _unwritable(folder: pathlib.Path, error: OSError) -> UserError:
    return UserError(f"cannot write to {folder}: {error.strerror}; free disk space or choose another workdir")
