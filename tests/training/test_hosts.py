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
from run_files import everything, metrics_of

from pera_jax import train
from pera_jax.common.errors import UserError
from pera_jax.parallel import cluster, global_arrays, sharding
from pera_jax.training import profiling
from pera_jax.training.checkpoints import checkpoint

ROOT = pathlib.Path(train.__file__).parent.parent
STALL = 180  # seconds; from the start of a process to its first step takes half of it on a slow, busy machine
SOON = 50  # where a hang is waited for, with all programs compiled; Gloo ends the process itself after about 70


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    toy_data.write(folder / "labeled")
    return toy_data.write(folder / "toy", undecodable=(3, 20))


FLAT = [  # the same for every length, so that runs of different lengths compare
    *(f"--config.schedules.learning_rate.{name}=0.0001" for name in ("start", "peak", "end")),
    "--config.schedules.weight_decay.start=0.1", "--config.schedules.weight_decay.end=0.1",
]  # fmt: skip


def launch(data, workdir, hosts: int, total: int, *options: str) -> list[subprocess.Popen]:
    """The processes of one run over four devices."""
    config = toy_runs.write_config(pathlib.Path(workdir).parent)
    command = [
        sys.executable, "-m", "pera_jax.train", "--config", config, f"--config.data.path={data}",
        f"--config.total={total} steps", "--config.checkpoint.every=4 steps", "--config.mesh.fsdp=2",
        f"--config.monitor.data={pathlib.Path(data).parent / 'labeled'}", "--config.monitor.every=4 steps",
        f"--config.stall_seconds={STALL}", "--allow-config-change", "--workdir", str(workdir), *options,
    ]  # fmt: skip
    return toy_hosts.launch(command, hosts, 4 // hosts)


def end(processes) -> list[str]:
    return [process.communicate(timeout=2 * STALL)[1] for process in processes]


def wait_for_step(process, step: int) -> None:
    said = []
    for line in process.stderr:
        said.append(line)
        if line.startswith("step ") and int(line.split("/")[0][5:]) >= step:
            return
    pytest.fail(f"ended before step {step}: {''.join(said)}")


def assert_close(one, other):
    for name in one:
        scale = max(np.abs(np.float64(one[name])).max(), 1e-6)
        assert np.abs(np.float64(one[name]) - other[name]).max() <= 1e-3 * scale, name


def test_two_hosts_compute_what_one_computes_and_stop_together(data, tmp_path):
    """SIGTERM to one of two hosts stops both; one process with as many devices ends the run, another does all of it."""
    workdir = tmp_path / "run"
    processes = launch(data, workdir, 2, 1000, *FLAT)  # too long to end by itself
    wait_for_step(processes[0], 5)
    processes[1].send_signal(signal.SIGTERM)
    said = end(processes)
    assert [process.returncode for process in processes] == [0, 0], said
    stopped = checkpoint.saved_steps(workdir)[-1]
    assert f"stopped by SIGTERM at step {stopped} of 1000; checkpoint saved" in said[0]
    assert not [line for line in said[1].splitlines() if line.startswith("step ")]  # the first host writes for both

    total = stopped + 4
    for folder in (workdir, tmp_path / "alone"):
        processes = launch(data, folder, 1, total, *FLAT)
        said = end(processes)
        assert processes[0].returncode == 0, said
    assert_close(everything(tmp_path / "alone", total), everything(workdir, total))
    lines, wanted = metrics_of(workdir), metrics_of(tmp_path / "alone")
    assert [line["step"] for line in lines if "monitor/knn20" in line] == sorted({*range(4, total + 1, 4), total})
    for line, other in zip(lines, wanted, strict=True):
        assert line.keys() == other.keys() and line["data/replaced"] == other["data/replaced"]  # the same records
        assert_close(other, line)


def test_a_host_ends_where_the_other_is_lost_or_hangs(data, tmp_path):
    lost = launch(data, tmp_path / "lost", 2, 1000)
    hanging = launch(data, tmp_path / "hanging", 2, 1000, f"--config.stall_seconds={SOON}")
    for processes, number in ((lost, signal.SIGKILL), (hanging, signal.SIGSTOP)):
        wait_for_step(processes[0], 6)
        processes[1].send_signal(number)
    try:
        said = [processes[0].communicate(timeout=2 * STALL)[1] for processes in (lost, hanging)]
    finally:
        hanging[1].kill()
    assert lost[0].returncode not in (0, None), said
    assert hanging[0].returncode == -signal.SIGALRM, said
    assert "no progress for" in said[1] and 'File "' in said[1]
    assert all(checkpoint.saved_steps(tmp_path / name)[-1] >= 4 for name in ("lost", "hanging"))


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
