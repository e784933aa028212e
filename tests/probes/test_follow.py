"""`probe --follow`: each checkpoint once, also after a kill, during training, and with a failing task."""

import errno
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import labelled_toys
import pytest

from pera_jax import config as configs
from pera_jax import train
from pera_jax.common import environment, errors, lease
from pera_jax.common.errors import UserError
from pera_jax.encoder import load
from pera_jax.probes.classification import knn
from pera_jax.probes.runner import follow, job, results, specs
from pera_jax.training.checkpoints import checkpoint, checkpoint_store

ROOT = pathlib.Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "pera_jax.probe", "--follow", "--poll", "0.2", "--tasks", "knn", "--set", "knn.k=(5,)"]
pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    labels = {"train": [0, 1, 2] * 6, "test": [0, 1, 2] * 2}
    return str(labelled_toys.write_shards(tmp_path_factory.mktemp("data") / "small", labels))


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> pathlib.Path:
    workdir = labelled_toys.write_run(tmp_path_factory.mktemp("finished"), [(4, 0), (8, 1), (12, 2)])
    (workdir / "FINISHED").write_text("12\n")
    return workdir


def two_tasks(data: str) -> list[specs.Spec]:
    return specs.from_names(["knn", "linear"], {"data": data}, ["knn.k=(5,)", "linear.seeds=(0,)"])


def run_follow(run, base, chosen, patience=60.0):
    return follow.follow(str(run), chosen, base, 32, 0.05, patience)


def times(base: pathlib.Path) -> dict[str, int]:
    return {str(file.relative_to(base)): file.stat().st_mtime_ns for file in base.glob("step_*/*.json")}


def test_each_checkpoint_once_and_a_failing_task_does_not_end_it(finished, data, tmp_path, monkeypatch):
    judged, right = [], knn.run

    def fail_at_8(labeled, settings):
        judged.append(len(judged))
        if len(judged) == 2:
            raise ZeroDivisionError("as planned")
        yield from right(labeled, settings)

    monkeypatch.setattr(knn, "run", fail_at_8)
    entries = run_follow(finished, tmp_path, two_tasks(data))
    assert [(entry["checkpoint"]["step"], entry["name"]) for entry in entries] == [
        (step, name) for step in (4, 8, 12) for name in ("knn", "linear")
    ]
    assert [entry.get("failure") for entry in entries] == [
        None,
        None,
        "ZeroDivisionError: as planned",
        None,
        None,
        None,
    ]
    [failed] = results.read_step(tmp_path, 8, "knn")
    assert "scores" not in failed
    assert "ZeroDivisionError: as planned" in (tmp_path / "results.csv").read_text()
    before = times(tmp_path)
    assert run_follow(finished, tmp_path, two_tasks(data)) == [] and times(tmp_path) == before and len(judged) == 3
    changed = specs.from_names(["knn"], {"data": data}, ["knn.k=(3,)"])
    assert len(run_follow(finished, tmp_path, changed)) == 3  # other settings are another result


def test_a_job_that_was_killed_goes_on_in_the_middle(finished, data, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    write, written = job.results.write, []

    def killed_after_three(base, entry, pictures):
        if len(written) == 3:
            raise Killed
        written.append((entry["checkpoint"]["step"], entry["name"]))
        write(base, entry, pictures)

    monkeypatch.setattr(job.results, "write", killed_after_three)
    with pytest.raises(Killed):
        run_follow(finished, tmp_path, two_tasks(data))
    monkeypatch.setattr(job.results, "write", write)
    entries = run_follow(finished, tmp_path, two_tasks(data))
    found = written + [(entry["checkpoint"]["step"], entry["name"]) for entry in entries]
    assert found == [(step, name) for step in (4, 8, 12) for name in ("knn", "linear")]
    assert not list((tmp_path / "cache").iterdir())


def test_a_checkpoint_that_is_being_removed_is_no_result(finished, data, tmp_path, monkeypatch):
    run = pathlib.Path(shutil.copytree(finished, tmp_path / "run"))
    read, folder = load.load_weights, run / "checkpoints" / "4"

    def removed_while_read(*args, **kwargs):
        weights = read(*args, **kwargs)
        if args[1] == 4:
            left = [path for path in sorted(folder.rglob("*")) if path.is_file()]
            for path in left[: len(left) // 2 + 1]:  # half of the rest at each attempt
                path.unlink()
        if args[1] == 8:
            shutil.rmtree(run / "checkpoints" / "8")
            raise checkpoint.Damaged("half of it")
        return weights

    monkeypatch.setattr(load, "load_weights", removed_while_read)
    entries = run_follow(run, tmp_path / "out", two_tasks(data)[:1])
    assert [entry["checkpoint"]["step"] for entry in entries] == [12]
    assert sorted(path.name for path in (tmp_path / "out").glob("step_*")) == ["step_000012"]


def test_a_damaged_checkpoint_is_passed_over_and_a_full_disk_is_no_result(finished, data, tmp_path, monkeypatch):
    read, write, chosen = load.load_weights, results.write, two_tasks(data)[:1]

    def damaged_at_4(*args, **kwargs):
        if args[1] == 4:
            raise checkpoint.Damaged("the checkpoint of step 4 cannot be read")
        return read(*args, **kwargs)

    def full(*args):
        raise UserError("free disk space")

    monkeypatch.setattr(load, "load_weights", damaged_at_4)
    monkeypatch.setattr(results, "write", full)
    with pytest.raises(UserError, match="free disk space"):
        run_follow(finished, tmp_path, chosen)
    assert times(tmp_path) == {}  # what was found is not taken for a failure of the task
    monkeypatch.setattr(results, "write", write)
    assert [entry["checkpoint"]["step"] for entry in run_follow(finished, tmp_path, chosen)] == [8, 12]


def test_a_result_is_of_one_checkpoint_of_one_run_on_one_data_set(finished, data, tmp_path):
    run, other, base = tmp_path / "run", tmp_path / "other", tmp_path / "out"
    for copy in (run, other):
        shutil.copytree(finished, copy)

    def steps(where, on=data):
        return [entry["checkpoint"]["step"] for entry in run_follow(where, base, two_tasks(on)[:1])]

    assert steps(run) == [4, 8, 12] and steps(run) == []
    assert steps(other) == [4, 8, 12]  # another run into the same folder
    assert steps(run) == [] and len(results.read(base)) == 6  # which lie beside the first one's
    note = run / "checkpoints" / "8" / "_CHECKPOINT_METADATA"
    note.write_text(note.read_text().replace('"init_timestamp_nsecs": ', '"init_timestamp_nsecs": 1'))  # saved again
    shown = results.markdown(results.read(base)).splitlines()
    assert {line.split(" | ")[3].strip() for line in shown if "| 8, saved" in line} == {"8, saved again since"}
    assert steps(run) == [8] and steps(run) == []
    assert "again" not in results.markdown(results.read(base)) + (base / "results.csv").read_text()
    info = json.loads((pathlib.Path(data) / "info.json").read_text())
    info["splits"]["train"]["fingerprint"] = "made anew"
    changed = pathlib.Path(shutil.copytree(data, tmp_path / "data"))
    (changed / "info.json").write_text(json.dumps(info))
    assert steps(run, str(changed)) == [4, 8, 12] and len(results.read(base)) == 9


def test_what_the_machine_did_not_let_end_is_no_result_and_a_new_save_of_a_passed_step_is_judged(
    finished, data, tmp_path, monkeypatch
):
    run, right, failures = (
        pathlib.Path(shutil.copytree(finished, tmp_path / "run")),
        knn.run,
        [OSError(errno.EMFILE, "files")],
    )
    (run / "checkpoints/4/teacher/manifest.ocdbt").write_bytes(b"")

    def no_files_once(labeled, settings):
        if failures:
            shutil.rmtree(run / "checkpoints/4")  # as a training that found it damaged makes it anew
            shutil.copytree(finished / "checkpoints/4", run / "checkpoints/4")
            note = run / "checkpoints/4/_CHECKPOINT_METADATA"
            note.write_text(note.read_text().replace('"init_timestamp_nsecs": ', '"init_timestamp_nsecs": 1'))
            raise failures.pop()
        yield from right(labeled, settings)

    monkeypatch.setattr(knn, "run", no_files_once)
    with pytest.raises(
        environment.EnvironmentFault, match="the machine failed in knn of step 8; re-run the same command"
    ) as ended:
        run_follow(run, tmp_path / "out", two_tasks(data)[:1])
    assert ended.value.status == errors.TRY_AGAIN
    assert sorted(path.name for path in (tmp_path / "out").glob("step_*")) == ["step_000004", "step_000012"]
    assert [entry["checkpoint"]["step"] for entry in run_follow(run, tmp_path / "out", two_tasks(data)[:1])] == [8]


def test_one_job_at_a_time_and_an_end_to_patience(finished, data, tmp_path):
    with (
        lease.held(tmp_path, "--output", name=".follow.lease"),
        pytest.raises(UserError, match=f"{tmp_path} is in use by"),
    ):
        run_follow(finished, tmp_path, two_tasks(data))
    (tmp_path / "run").mkdir()
    with pytest.raises(UserError, match="no new checkpoint in .* for .* hours, and the run has not ended"):
        run_follow(tmp_path / "run", tmp_path / "out", two_tasks(data), patience=0.2)


def test_beside_a_training(tmp_path, data, monkeypatch):
    """Training saves and removes while the job reads; the job is killed in the middle and started again."""
    run, base = tmp_path / "run", tmp_path / "run" / "probe"
    one = os.environ | {"XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")}
    save, saves, jobs, before = checkpoint_store.Store.save, [], [], {}

    def start():
        command = [*COMMAND, "--run", str(run), "--data", data]
        jobs.append(subprocess.Popen(command, cwd=ROOT, env=one, stderr=subprocess.PIPE, text=True))

    def wait_for_results(number):
        deadline = time.monotonic() + 240
        while len(times(base)) < number and jobs[-1].poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)

    def save_and_kill(*args, **kwargs):
        save(*args, **kwargs)
        saves.append(len(saves))
        if len(saves) == 3:
            wait_for_results(1)
            jobs[0].send_signal(signal.SIGKILL)
            before.update(times(base))
            start()
        if len(saves) == 5:
            wait_for_results(len(before) + 1)

    monkeypatch.setattr(checkpoint_store.Store, "save", save_and_kill)
    start()
    train.train(
        configs.smoke(configs.default("toy_mae")), run, data=data,
        changes={"total": "8 steps", "checkpoint.every": "1 step", "checkpoint.keep_last": 2,
                 "checkpoint.keep_every": "4 steps"},
    )  # fmt: skip
    said = [process.communicate(timeout=240)[1] for process in jobs]
    assert before and len(saves) >= 8 and [process.returncode for process in jobs] == [-signal.SIGKILL, 0], said
    kept, after = checkpoint.saved_steps(run), times(base)
    assert {f"step_{step:06d}" for step in kept} <= {pathlib.Path(name).parent.name for name in after}
    assert {name: after[name] for name in before} == before  # what was judged before was not judged again
    assert len(after) > len(before)
    assert all("failure" not in json.loads((base / name).read_text()) for name in after)
