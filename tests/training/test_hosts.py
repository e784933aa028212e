"""Several hosts, as processes on localhost with two virtual devices each: same result, joint stop, lost hosts."""

import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import test_train
import toy_data
import toy_hosts

from pera_jax import train
from pera_jax.bands import Bands
from pera_jax.common.errors import UserError
from pera_jax.objectives.pera import objective as pera
from pera_jax.parallel import cluster, global_arrays, sharding
from pera_jax.training import profiling
from pera_jax.training import step as steps
from pera_jax.training.checkpoints import checkpoint

ROOT = pathlib.Path(train.__file__).parent.parent
STALL = 180  # seconds; from the start of a process to its first step takes half of it on a slow, busy machine
SOON = 45  # where a hang is waited for, with all programs compiled; JAX ends the process itself after 100


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    toy_data.write(folder / "labeled")
    return toy_data.write(folder / "toy", undecodable=(3, 20))


def launch(data, workdir, hosts: int, total: int, stall: int = STALL) -> list[subprocess.Popen]:
    """The processes of one run over four devices."""
    command = [
        sys.executable, "-m", "pera_jax.train", "--config", "configs/demo.py:smoke", f"--config.data.path={data}",
        f"--config.total={total} steps", "--config.checkpoint.every=4 steps", "--config.mesh.fsdp=2",
        f"--config.monitor.data={pathlib.Path(data).parent / 'labeled'}", "--config.monitor.every=4 steps",
        f"--config.stall_seconds={stall}", "--allow-config-change", "--workdir", str(workdir),
    ]  # fmt: skip
    return toy_hosts.launch(command, hosts, 4 // hosts)


def end(processes) -> list[str]:
    return [process.communicate(timeout=2 * STALL)[1] for process in processes]


def wait_for_step(process, step: int) -> None:
    for line in process.stderr:
        if line.startswith("step ") and int(line.split("/")[0][5:]) >= step:
            return
    pytest.fail(f"ended before step {step}")


def assert_close(one, other, path=None):
    for name in one:
        scale = max(np.abs(np.float64(one[name])).max(), 1e-6)
        assert np.abs(np.float64(one[name]) - other[name]).max() <= 1e-4 * scale, name


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    """One process with four devices, 12 steps."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    processes = launch(data, workdir, 1, 12)
    said = end(processes)
    assert processes[0].returncode == 0, said
    return workdir


def test_two_hosts_stop_together_and_one_goes_on(alone, data, tmp_path):
    workdir = tmp_path / "run"
    processes = launch(data, workdir, 2, 1000)  # too long to end by itself; the durations are in steps
    wait_for_step(processes[0], 5)
    processes[1].send_signal(signal.SIGTERM)
    said = end(processes)
    assert [process.returncode for process in processes] == [0, 0], said
    stopped = checkpoint.saved_steps(workdir)[-1]
    assert f"stopped by SIGTERM at step {stopped} of 1000; checkpoint saved" in said[0]
    assert not [line for line in said[1].splitlines() if line.startswith("step ")]  # the first host writes for both
    if stopped < 12:
        processes = launch(data, workdir, 1, 12)
        said = end(processes)
        assert processes[0].returncode == 0 and f"step {stopped + 1}/12" in said[0], said
    lines, wanted = test_train.metrics_of(workdir), test_train.metrics_of(alone)
    assert [line["step"] for line in lines][:12] == list(range(1, 13))
    hypers = {name for name in wanted[0] if name.startswith("hyper/")}  # of a run of another length
    for line, other in zip(lines[:1], wanted[:1]):  # the first step knows no schedule yet but the warm-up's start
        assert_close({k: v for k, v in other.items() if k not in hypers}, line)
    for line, other in zip(lines, wanted):
        assert line["data/replaced"] == other["data/replaced"]  # the same records in the same order


def test_two_hosts_compute_what_one_computes_and_end_where_the_other_is_lost_or_hangs(alone, data, tmp_path):
    workdir = tmp_path / "run"
    processes = launch(data, workdir, 2, 12)
    said = end(processes)
    assert [process.returncode for process in processes] == [0, 0], said
    assert_close(test_train.everything(alone, 12), test_train.everything(workdir, 12))
    assert [line["step"] for line in test_train.metrics_of(alone) if "monitor/knn20" in line] == [4, 8, 12]
    for line, other in zip(test_train.metrics_of(workdir), test_train.metrics_of(alone), strict=True):
        assert_close(other, line)

    processes = launch(data, workdir, 2, 1000)
    wait_for_step(processes[0], 14)
    processes[1].kill()
    began = time.monotonic()
    said = end(processes)
    assert processes[0].returncode not in (0, None) and time.monotonic() - began < STALL, said
    assert checkpoint.saved_steps(workdir)[-1] >= 12

    processes = launch(data, workdir, 2, 1000, stall=SOON)
    wait_for_step(processes[0], 14)
    processes[1].send_signal(signal.SIGSTOP)
    try:
        said = processes[0].communicate(timeout=2 * STALL)[1]
    finally:
        processes[1].kill()
    assert processes[0].returncode == -signal.SIGALRM
    assert "no progress for" in said and 'File "' in said


@pytest.mark.parametrize(
    "shape", [dict(data=1), dict(data=1, fsdp=2), dict(data=2, tensor=2), dict(data=1, fsdp=4)], ids=str
)
def test_a_state_of_eight_devices_is_restored_on_fewer_bit_for_bit(shape, tmp_path_factory, data):
    folder = _saved_on_eight(tmp_path_factory, data)
    config = test_train.smoke("demo", data)
    objective = pera.PerA.from_config(config, Bands.plain())
    number = int(np.prod(list(shape.values())))
    mesh = sharding.make_mesh(**{"fsdp": 1, "tensor": 1} | shape, devices=jax.devices()[:number])
    abstract = steps.abstract_state(objective, steps.make_optimizer(config.optimizer), mesh)
    state, position = checkpoint.restore(folder / "checkpoints" / "4", abstract)
    assert position["batches"] == 4
    held = test_train.everything(folder, 4)
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        name = sharding.path_of(path)
        name = name if name.startswith("teacher/") else f"state/{name}"
        np.testing.assert_array_equal(np.asarray(leaf), held[name], strict=True)
        assert len(leaf.sharding.device_set) == number


_KEPT = {}


def _saved_on_eight(tmp_path_factory, data) -> pathlib.Path:
    if not _KEPT:
        config = test_train.smoke("demo", data)
        config.mesh.update(dict(data=2, fsdp=2, tensor=2))
        _KEPT["folder"] = tmp_path_factory.mktemp("eight") / "run"
        train.train(config, str(_KEPT["folder"]))
    return _KEPT["folder"]


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
