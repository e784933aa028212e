"""metrics.jsonl and alarms after crashes and resumes, and progress lines."""

import io
import json
import math
import resource
import struct

import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from pera_jax.common.errors import UserError
from pera_jax.common.progress import Progress
from pera_jax.training import metrics

TOTAL = {"total": 100, "batch_size": 64}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def write(folder, resume_step, steps, stream=None):
    writer = metrics.MetricsWriter(folder, resume_step=resume_step, stream=stream or io.StringIO(), **TOTAL)
    for step in steps:
        writer.write(step, {"loss": np.float32(10 / step), "hyper/b": 0.1, "data/images": 64 * step, "a": -step})
    writer.close()


def events(folder):
    """The events of a folder, file after file in the order of their names, as TensorBoard reads them."""
    found = []
    for file in sorted((folder / "tb").iterdir()):
        data, at = file.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            found.append(event_pb2.Event.FromString(data[at + 12 : at + 12 + length]))
            at += 16 + length
    return found


def test_lines_are_strict_json_with_the_step_first(tmp_path):
    writer = metrics.MetricsWriter(tmp_path / "new" / "run", resume_step=0, stream=io.StringIO(), **TOTAL)
    writer.write(7, {"z": np.float32(0.5), "loss": 1 / 3, "count": np.int64(3), "bad": math.nan, "low": -math.inf})
    text = (tmp_path / "new" / "run" / "metrics.jsonl").read_text()  # before close: a killed run has it too
    writer.close()
    assert text == '{"step": 7, "bad": "nan", "count": 3, "loss": 0.3333333333333333, "low": "-inf", "z": 0.5}\n'
    assert math.isnan(float(json.loads(text)["bad"]))


@pytest.mark.parametrize("torn", [b"", b'{"step": 6, "lo', b'{"step": 3'])
def test_a_resumed_file_equals_an_unbroken_one(tmp_path, torn):
    write(tmp_path / "whole", 0, range(1, 9))
    write(tmp_path / "broken", 0, range(1, 6))
    with open(tmp_path / "broken" / "metrics.jsonl", "ab") as file:
        file.write(torn)
    write(tmp_path / "broken", 3, range(4, 9))
    whole, broken = ((tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "broken"))
    assert broken == whole
    assert len(broken.splitlines()) == 8
    assert sorted(path.name for path in (tmp_path / "broken").iterdir()) == ["alarms.jsonl", "metrics.jsonl", "tb"]


def test_tensorboard_forgets_the_points_after_the_resume(tmp_path):
    write(tmp_path, 0, range(1, 6))
    write(tmp_path, 3, range(4, 6))
    shown = {}
    for event in events(tmp_path):
        if event.session_log.status == event_pb2.SessionLog.START:  # TensorBoard's rule: drop what is not older
            shown = {step: values for step, values in shown.items() if step < event.step}
        if event.summary.value:
            assert event.step not in shown
            shown[event.step] = {value.tag: value.simple_value for value in event.summary.value}
    assert sorted(shown) == [1, 2, 3, 4, 5]
    assert shown[4] == {"a": -4.0, "data/images": 256.0, "hyper/b": pytest.approx(0.1), "loss": 2.5}


def test_a_file_that_is_not_ours_is_left_alone(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnotes of mine\n{"step": 2}\n')
    with pytest.raises(UserError, match=r"^line 2 of .*metrics\.jsonl is not a valid record of metrics"):
        metrics.MetricsWriter(tmp_path, resume_step=1, stream=io.StringIO(), **TOTAL)
    assert path.read_text() == '{"step": 1}\nnotes of mine\n{"step": 2}\n'


def test_no_space_left_is_one_sentence(tmp_path):
    writer = metrics.MetricsWriter(tmp_path, resume_step=0, stream=io.StringIO(), **TOTAL)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))
    try:
        with pytest.raises(UserError, match=r"^cannot write to .*: File too large; free disk space"):
            for step in range(1, 100):
                writer.write(step, {"loss": 1.0, "another": 2.0})
        writer.close()  # what TensorBoard's file still holds back cannot be written either; that has been said
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    write(tmp_path, 2, range(3, 5))  # the line that the limit cut is dropped
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]


def test_a_workdir_that_is_a_file_is_one_sentence(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match=r"^cannot write to .*run: "):
        metrics.MetricsWriter(tmp_path / "run", resume_step=0, stream=io.StringIO(), **TOTAL)


def test_line_of_a_run(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("TERM", "xterm")
    values = {"loss": 8.12345, "time/images_per_second": 320.0}
    seen = {}
    for stream in (io.StringIO(), Terminal()):
        writer = metrics.MetricsWriter(tmp_path, resume_step=0, stream=stream, total=12_000, batch_size=64)
        writer.write(1, {"loss": 9.0})
        writer.write(2_000, values)
        writer.close()
        seen[type(stream)] = stream.getvalue()
    first, second = "step 1/12,000  loss 9", "step 2,000/12,000  loss 8.123  320 images/s  ETA 33:20"
    assert seen[io.StringIO] == f"{first}\n{second}\n"
    assert seen[Terminal] == f"\r{first}\x1b[K\r{second}\x1b[K\n"


def test_progress_of_a_loop(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("TERM", "xterm")
    seen = {}
    for stream in (io.StringIO(), Terminal()):
        now = [100.0]
        with Progress(4_000, "images", "convert", stream=stream, clock=lambda now=now: now[0]) as progress:
            for count, seconds in ((3, 0.05), (197, 9.95), (400, 20), (600, 10), (50, 1), (2_750, 4)):
                now[0] += seconds
                progress.update(count)
        progress.close()
        seen[type(stream)] = stream.getvalue()
    plain = [
        "convert: 200/4,000 images  5%  20/s  ETA 3:10",
        "convert: 600/4,000 images  15%  20/s  ETA 2:50",
        "convert: 1,200/4,000 images  30%  33.3/s  ETA 1:24",  # of the last 30 s: 1,000 images, not all 1,200 in 40 s
        "convert: 4,000/4,000 images in 0:45, 88.9/s",
    ]
    assert seen[io.StringIO].splitlines() == plain
    live = seen[Terminal]
    assert live.startswith("\r" + plain[0] + "\x1b[K\r" + plain[1])
    assert live.endswith("\r" + plain[-1] + "\x1b[K\n")
    assert live.count("\r") == 6 and live.count("\n") == 1  # 50 ms after the start nothing is drawn
