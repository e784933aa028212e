"""Several hosts, as processes on localhost with two virtual devices each: same result, joint stop, lost hosts."""

import pathlib
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
import toy_data
import toy_hosts
import toy_runs
from conftest import on_devices
from run_files import everything, metrics_of

from pera_jax import config as configs
from pera_jax import train
from pera_jax.common.errors import UserError
from pera_jax.parallel import cluster, global_arrays, sharding
from pera_jax.training import profiling
from pera_jax.training.checkpoints import checkpoint

STALL = 180  # seconds; from the start of a process to its first step takes half of it on a slow, busy machine
SOON = 50  # where a hang is waited for, with all programs compiled; Gloo ends the process itself after about 70


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    toy_data.write(folder / "labeled")
    return toy_data.write(folder / "toy", undecodable=(3, 20))


FLAT = {  # the same for every length, so that runs of different lengths compare
    "schedules.learning_rate.start": 1e-4, "schedules.learning_rate.peak": 1e-4, "schedules.learning_rate.end": 1e-4,
    "schedules.weight_decay.start": 0.1, "schedules.weight_decay.end": 0.1,
}  # fmt: skip


def settings(data, total: int, monitor: bool = False) -> dict:
    watched = str(pathlib.Path(data).parent / "labeled") if monitor else ""
    return {
        "data.path": data, "total": f"{total} steps", "checkpoint.every": "4 steps", "mesh.fsdp": 2,
        "monitor.data": watched, "monitor.every": "4 steps", "stall_seconds": STALL,
    }  # fmt: skip


def launch(workdir, changes: dict) -> list[subprocess.Popen]:
    """The processes of one run over two hosts with two devices each."""
    command = [
        sys.executable, "-m", "pera_jax.train", "--config", toy_runs.write_config(workdir.parent),
        *(f"--config.{field}={value}" for field, value in changes.items()), "--workdir", str(workdir),
    ]  # fmt: skip
    return toy_hosts.launch(command, hosts=2, devices=2)


def end(processes) -> list[str]:
    return [process.communicate(timeout=2 * STALL)[1] for process in processes]


def assert_close(one, other):
    for name in one:
        scale = max(np.abs(np.float64(one[name])).max(), 1e-6)
        assert np.abs(np.float64(one[name]) - other[name]).max() <= 1e-3 * scale, name


@pytest.fixture(scope="module")
def left_alone(data, tmp_path_factory):
    """Runs on two hosts, the second of which was killed ("lost") or stopped ("hanging"): folders and processes.

    The first host notices after a while; the other test runs meanwhile.
    """
    folder = tmp_path_factory.mktemp("left_alone")
    runs = {
        "lost": launch(folder / "lost", settings(data, 1000)),
        "hanging": launch(folder / "hanging", settings(data, 1000) | {"stall_seconds": SOON}),
    }
    for name, number in (("lost", signal.SIGKILL), ("hanging", signal.SIGSTOP)):
        toy_runs.wait_for_step(runs[name][0], 6)
        runs[name][1].send_signal(number)
    yield folder, runs
    for processes in runs.values():
        for process in processes:
            process.kill()


def test_two_hosts_compute_what_one_computes_and_stop_together(left_alone, data, tmp_path):
    """SIGTERM to one of two hosts stops both; one process with four devices ends the run, and runs another."""
    workdir = tmp_path / "run"
    processes = launch(workdir, settings(data, 1000, monitor=True) | FLAT)  # too long to end by itself
    toy_runs.wait_for_step(processes[0], 5)
    processes[1].send_signal(signal.SIGTERM)
    said = end(processes)
    assert [process.returncode for process in processes] == [0, 0], said
    stopped = checkpoint.saved_steps(workdir)[-1]
    assert f"stopped by SIGTERM at step {stopped} of 1000; checkpoint saved" in said[0]
    assert not [line for line in said[1].splitlines() if line.startswith("step ")]  # the first host writes for both

    total = stopped + 4
    config = configs.load(toy_runs.write_config(tmp_path), settings(data, total, monitor=True) | FLAT)
    with on_devices(4, fsdp=2):
        train.train(config, workdir, allow_config_change=True)
        train.train(config, tmp_path / "alone")
    assert_close(everything(tmp_path / "alone", total), everything(workdir, total))
    lines, wanted = metrics_of(workdir), metrics_of(tmp_path / "alone")
    assert [line["step"] for line in lines if "monitor/knn20" in line] == sorted({*range(4, total + 1, 4), total})
    for line, other in zip(lines, wanted, strict=True):
        assert line.keys() == other.keys() and line["data/replaced"] == other["data/replaced"]  # the same records
        assert_close(other, line)


def test_a_host_ends_where_the_other_is_lost_or_hangs(left_alone):
    folder, runs = left_alone
    said = {name: processes[0].communicate(timeout=2 * STALL)[1] for name, processes in runs.items()}
    assert runs["lost"][0].returncode not in (0, None), said
    assert runs["hanging"][0].returncode == -signal.SIGALRM, said
    assert "no progress for" in said["hanging"] and 'File "' in said["hanging"]
    assert all(checkpoint.saved_steps(folder / name)[-1] >= 4 for name in runs)


def test_how_processes_find_each_other():
    def find(flags=(None, None, None), **environment):
        return cluster.from_flags(*flags, environment)

    assert find() is None
    by_flags = find(("host:1", 4, 2), SLURM_NTASKS="4", SLURM_STEP_NODELIST="a,b")
    assert by_flags == dict(
        coordinator_address="host:1", num_processes=4, process_id=2, cluster_detection_method="deactivate"
    )
    assert find(SLURM_NTASKS="4", SLURM_STEP_NODELIST="a,b") == {}
    assert find(SLURM_NTASKS="4") is None  # in the batch script itself, not under srun
    for flags in (("host:1", None, 2), ("host", 4, 2), ("host:1", 4, 4)):
        with pytest.raises(UserError, match="--coordinator|--process_id"):
            find(flags)


def test_the_steps_of_a_profile():
    assert profiling.parse_range(None, 0, 10) is None
    assert profiling.parse_range("2:5", 1, 10) == (2, 5)
    for text in ("5", "5:2", "a:b", "1:5", "9:11"):
        with pytest.raises(UserError, match="--profile="):
            profiling.parse_range(text, 1, 10)


def test_rows_are_those_of_the_mesh():
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    where = jax.sharding.NamedSharding(mesh, sharding.BATCH)
    devices = mesh.devices
    assert list(global_arrays.local_rows(where, 8, list(devices[0].flat))) == [0, 1, 2, 3]
    assert list(global_arrays.local_rows(where, 8, list(devices[:, 1, 0]))) == [2, 3, 6, 7]
    assert list(global_arrays.local_rows(where, 8, [devices[1, 0, 1]])) == [4, 5]
    local = {"x": np.arange(16).reshape(8, 2)}
    whole = global_arrays.assemble(local, where, np.arange(8), 8)["x"]
    np.testing.assert_array_equal(whole, local["x"])
