"""The training job: exact resume after every kind of stop, order of startup, and each config in a small version."""

import contextlib
import functools
import importlib
import io
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import toy_data
import toy_runs
from conftest import FAST, on_devices, on_one_device
from run_files import assert_same_bits, everything, metrics_of

from pera_jax import config as configs
from pera_jax import objectives, train
from pera_jax.bands import Bands
from pera_jax.common.errors import UserError
from pera_jax.encoder import load
from pera_jax.parallel import sharding
from pera_jax.training.checkpoints import checkpoint

OPENING = ("resuming from step ", "devices: ", "data: ", "training: ", "model: ", "compiling ")  # what is said before
SHARDED = functools.partial(on_devices, 2, data=1, fsdp=2)
TOTAL, EVERY = 36, 4  # steps of the run that is interrupted, and between its checkpoints


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return toy_data.write(tmp_path_factory.mktemp("data") / "toy", undecodable=(3, 4, 20))


def smoke(name: str, data: str, total: str = "4 steps"):
    config = importlib.import_module(f"configs.{name}").get_config("smoke")
    config.data.path, config.total = data, total
    return config


# ---------------------------------------------------------------- interrupted runs, through the command


def interrupted(data: str, folder: pathlib.Path, workers: int) -> tuple[str, dict]:
    """The config file of the run that is interrupted, and its changes."""
    changes = {"data.path": data, "data.workers": workers, "total": f"{TOTAL} steps"}
    return toy_runs.write_config(folder), changes | {"checkpoint.every": f"{EVERY} steps"}


def launch(data: str, workdir, workers: int) -> subprocess.Popen:
    environment = os.environ | toy_runs.PATH | {"XLA_FLAGS": FAST}  # one device
    config, changes = interrupted(data, workdir.parent, workers)
    changes = [f"--config.{field}={value}" for field, value in changes.items()]
    command = [sys.executable, "-m", "pera_jax.train", "--config", config, *changes, "--workdir", str(workdir)]
    root = pathlib.Path(train.__file__).parent.parent
    return subprocess.Popen(command, cwd=root, env=environment, stderr=subprocess.PIPE, text=True)


def run_here(data: str, workdir) -> list[str]:
    """The same run in this process, without data workers; returns the lines that it prints."""
    with on_one_device(), contextlib.redirect_stderr(io.StringIO()) as stderr:
        train.train(configs.load(*interrupted(data, workdir.parent, 0)), workdir)
    return stderr.getvalue().splitlines()


def end(process: subprocess.Popen) -> str:
    """Waits for the end; returns what was left on stderr."""
    text = process.stderr.read()
    process.wait(timeout=60)
    return text


def wait_for_step(process: subprocess.Popen, step: int) -> None:
    """Waits for `step`; nothing but progress and what is said at the beginning may be printed."""
    for line in toy_runs.wait_for_step(process, step):
        assert line.startswith(("step ", "freed ", *OPENING)), line


def kill_while_saving(process: subprocess.Popen, workdir: pathlib.Path, after: int) -> None:
    """Kills the process when a checkpoint later than step `after` is half written."""
    folder = workdir / "checkpoints"
    while process.poll() is None:
        names = os.listdir(folder) if folder.exists() else []
        steps_begun = [int(name.split(".")[0]) for name in names if "orbax-checkpoint-tmp" in name]
        if any(step > after for step in steps_begun):
            process.send_signal(signal.SIGSTOP)  # looks twice: the save may have ended since
            if any((folder / name).exists() for name in names if "orbax-checkpoint-tmp" in name):
                process.kill()
                return
            process.send_signal(signal.SIGCONT)
        time.sleep(0.001)
    pytest.fail(f"ended before it was killed: {end(process)}")


@pytest.fixture(scope="module")
def uninterrupted(data, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("uninterrupted") / "run"
    said = run_here(data, workdir)
    opening, progress = said[:5], said[5:]
    assert [line.split(" ")[0] for line in opening] == ["devices:", "data:", "training:", "model:", "compiling"], (
        opening
    )
    assert opening[2].startswith(
        f"training: {TOTAL} steps of 16 images, 12 epochs of 3 steps; 16 images on each device"
    )
    assert [line.split("  ")[0] for line in progress] == [f"step {i}/{TOTAL}" for i in range(1, TOTAL + 1)]
    return workdir


def test_a_run_killed_in_every_way_ends_in_the_same_bits(uninterrupted, data, tmp_path):
    workdir = tmp_path / "run"
    process = launch(data, workdir, workers=0)
    kill_while_saving(process, workdir, after=EVERY)
    end(process)
    assert process.returncode == -signal.SIGKILL
    halves = [name for name in os.listdir(workdir / "checkpoints") if "orbax-checkpoint-tmp" in name]
    assert halves and checkpoint.saved_steps(workdir)

    process = launch(data, workdir, workers=2)  # with data workers now
    wait_for_step(process, 4 * EVERY + 2)
    process.kill()
    end(process)
    seen = checkpoint.saved_steps(workdir)[-1]
    assert 0 < seen < TOTAL

    process = launch(data, workdir, workers=1)
    wait_for_step(process, seen + EVERY + 2)
    process.send_signal(signal.SIGINT)
    stderr = end(process)
    seen = checkpoint.saved_steps(workdir)[-1]
    assert process.returncode == 0, stderr
    *progress, last = stderr.splitlines()  # no warnings either
    progress.remove("SIGINT: saving a checkpoint after this step; press Ctrl-C again to stop immediately")
    assert last == f"stopped by SIGINT at step {seen} of {TOTAL}; checkpoint saved"
    assert not (workdir / "FINISHED").exists()
    assert all(line.startswith("step ") for line in progress)

    said = run_here(data, workdir)
    assert said[0] == f"resuming from step {seen} of {TOTAL}; changed: data.workers 1 -> 0"
    assert said[len(OPENING)].startswith(f"step {seen + 1}/{TOTAL}")

    assert_same_bits(everything(workdir, TOTAL), everything(uninterrupted, TOTAL))
    lines = metrics_of(workdir)
    assert lines == metrics_of(uninterrupted)
    assert [line["step"] for line in lines] == list(range(1, TOTAL + 1))
    assert lines[-1]["data/replaced"] > lines[10]["data/replaced"] > 0
    assert not [name for name in os.listdir(workdir / "checkpoints") if not name.isdigit()]


# ---------------------------------------------------------------- in this process


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """The run of configs/demo.py:smoke, 4 steps."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    with on_one_device():
        train.train(smoke("demo", data), str(workdir))
    return workdir


def frozen(config):
    """The config with a step that changes neither student nor teacher."""
    config.total = "2 steps"
    config.schedules.learning_rate.update(dict(start=0.0, peak=0.0, end=0.0))
    config.pera.teacher_momentum.update(dict(start=1.0, end=1.0))
    return config


# Others are trained in test_contract (the published one of each method), and in test_hosts and below (sharded).
@pytest.mark.parametrize("name", ["demo", "aid_small"])
def test_a_config_trains_small_and_leaves_weights_that_can_be_used(name, data, tmp_path, request):
    workdir = request.getfixturevalue("finished") if name == "demo" else tmp_path / "run"
    if name != "demo":
        with on_one_device():
            train.train(smoke(name, data), str(workdir))
    lines = metrics_of(workdir)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(np.isfinite(value) for line in lines for value in line.values())
    assert any((workdir / "tb").iterdir()) and json.loads((workdir / "config.json").read_text())["config"]["name"]

    state = everything(workdir, 4)
    for which, path in (("teacher", "teacher"), ("student", "state/params")):
        weights = load.load_weights(workdir, which=which)
        assert weights.step == 4 and weights.meta["step"] == 4
        flat = jax.tree_util.tree_flatten_with_path(weights.params)[0]
        assert flat
        for leaf_path, leaf in flat:
            np.testing.assert_array_equal(leaf, state[f"{path}/{sharding.path_of(leaf_path)}"])


@pytest.mark.parametrize("name", [name for name in configs.names() if "probes" not in name])
def test_every_config_is_valid(name):
    for argument in ("", ":smoke"):
        config = configs.load(name + argument)
        configs.check(config, 1, 1, 1)
        assert config.name == name + argument.replace(":", "_")
        objective = objectives.from_config(config, Bands.plain())
        assert sum(objective.flops_per_image().values()) > 0


def test_untrained_weights_are_those_that_the_run_was_born_with(data, tmp_path):
    workdir = tmp_path / "run"
    with SHARDED():
        train.train(frozen(smoke("pera_vitg16_1024", data)), str(workdir))
    for which in ("teacher", "student"):
        kept = load.load_weights(workdir, which=which)
        born = {name: tree for name, tree in objectives.untrained(kept.meta).items() if name in kept.params}
        jax.tree.map(np.testing.assert_array_equal, born, kept.params)


def test_init_from_takes_the_weights_only(finished, data, one_device, tmp_path):
    config = frozen(smoke("demo", data))
    config.init_from = str(finished)
    train.train(config, str(tmp_path / "run"))
    for which in ("teacher", "student"):
        given, taken = (load.load_weights(run, which=which) for run in (finished, tmp_path / "run"))
        assert (given.step, taken.step) == (4, 2)
        jax.tree.map(np.testing.assert_array_equal, given.params, taken.params)
    state = everything(tmp_path / "run", 2)
    assert state["data/batches"] == 2 and state["state/step"] == 2


def test_resume_from_goes_on_as_the_workdir_itself_would(finished, data, one_device, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "own")
    for workdir, config in (
        (tmp_path / "own", smoke("demo", data, "6 steps")),
        (tmp_path / "other", smoke("demo", data, "6 steps")),
    ):
        config.resume_from = str(finished) if workdir.name == "other" else ""
        with pytest.raises(
            UserError,
            match="belongs to another run: expected total 6 steps from this config, got 4 steps; .* "
                  "--allow-config-change",
        ):
            train.train(config, str(workdir))
        train.train(config, str(workdir), allow_config_change=True)
        assert "resuming from step 4 of 6; changed: total 4 steps -> 6 steps" in capsys.readouterr().err
    earlier = json.loads((tmp_path / "own" / "earlier_configs" / "until_step_000004.json").read_text())["config"]
    assert earlier["total"] == "4 steps" and not (tmp_path / "other" / "earlier_configs").exists()
    assert_same_bits(everything(tmp_path / "other", 6), everything(tmp_path / "own", 6))
    assert metrics_of(tmp_path / "other") == metrics_of(tmp_path / "own")[4:]
    # The workdir's own checkpoint comes before resume_from: nothing is left to do.
    before = (tmp_path / "other" / "metrics.jsonl").read_bytes()
    assert (tmp_path / "other" / "FINISHED").read_text() == "6\n"
    (tmp_path / "other" / "FINISHED").unlink()  # as of a run that was killed between its last save and the mark
    train.train(config, str(tmp_path / "other"))
    assert (tmp_path / "other" / "FINISHED").read_text() == "6\n"
    assert (tmp_path / "other" / "metrics.jsonl").read_bytes() == before


def test_a_loss_that_is_not_finite_ends_the_run_and_names_the_last_good_checkpoint(data, one_device, tmp_path):
    config = smoke("demo", data)
    config.schedules.learning_rate.peak = 1e30  # its first step has the rate 0
    config.checkpoint.every = "1 steps"
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(UserError, match="is inf at step 2; the last good checkpoint is step 1: lower"):
        train.train(config, str(tmp_path / "run"))
    assert checkpoint.saved_steps(tmp_path / "run") == [1]
    alarm = json.loads((tmp_path / "run" / "alarms.jsonl").read_text())
    assert (alarm["step"], alarm["alarm"]) == (2, "loss is not finite") and "is inf at step 2; the last" in alarm[
        "text"
    ]
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers
    everything(tmp_path / "run", 1)


def spoil(folder: pathlib.Path) -> None:
    """Cuts the largest file of the state to half, as a disk that lied about a write does."""
    file = max((folder / "state").rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of a coroutine that Orbax gives up
def test_a_damaged_newest_checkpoint_costs_the_steps_since_the_one_before(finished, data, one_device, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    spoil(workdir / "checkpoints" / "4")
    train.train(smoke("demo", data), str(workdir))
    said = capsys.readouterr().err.splitlines()[0]
    assert "checkpoints/4 cannot be read" in said and said.endswith("resuming from the checkpoint of step 2")
    assert_same_bits(everything(workdir, 4), everything(finished, 4))
    assert metrics_of(workdir) == metrics_of(finished)
    assert (workdir / "damaged_4").is_dir()

    for step in (2, 4):
        spoil(workdir / "checkpoints" / str(step))
    with pytest.raises(
        UserError, match=f"none of the checkpoints of {workdir} can be read .the newest: .*checkpoints/4 cannot"
    ):
        train.train(smoke("demo", data), str(workdir))
    assert checkpoint.saved_steps(workdir) == [2, 4]
