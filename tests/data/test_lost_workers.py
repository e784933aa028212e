"""Killed data workers, leaked shared memory, missing hosts, and Ctrl-C during startup."""

import multiprocessing
import os
import pathlib
import pickle
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from test_pipeline import CROPS, encoded_image, write_records

from pera_jax.common import errors
from pera_jax.common.environment import EnvironmentFault
from pera_jax.common.errors import UserError
from pera_jax.data import pipeline, shared_memory
from pera_jax.data.mixture import Mixture
from pera_jax.training.loop import Loop, explain_out_of_memory

needs_shm = pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="shared memory is no folder here")

PROGRAM = """
import pickle, sys, time
from pera_jax.data import pipeline
from pera_jax.data.mixture import Mixture

if __name__ == "__main__":
    source, crops = pickle.load(open(sys.argv[1], "rb"))
    stream = pipeline.make_pipeline(Mixture.from_source(source), crops, batch_size=12, seed=0, workers=1)
    held = [next(stream), next(stream)]
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_records(tmp_path_factory.mktemp("records"), [encoded_image(i) for i in range(24)])


def test_a_worker_that_the_system_kills_is_one_sentence(source):
    # one image is a batch, too
    stream = pipeline.make_pipeline(Mixture.from_source(source), CROPS, batch_size=1, seed=0, workers=1)
    assert next(stream)["global"].shape[0] == 1
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(EnvironmentFault, match=r"a data worker was killed by the system \(SIGKILL\).*data.workers"):
        for _ in range(10):
            next(stream)
    stream.close()


def segments() -> set[str]:
    return {path.name for path in pathlib.Path("/dev/shm").glob("pera_jax-*")}


@needs_shm
def test_the_memory_of_a_killed_run_is_given_back_and_that_of_a_living_one_is_not(source, tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "data").write_bytes(pickle.dumps((source, CROPS)))
    before = segments()
    run = subprocess.Popen(
        [sys.executable, str(tmp_path / "program.py"), str(tmp_path / "data")],
        stdout=subprocess.PIPE, start_new_session=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([os.getcwd(),
        str(pathlib.Path(__file__).parents[1] / "support")])},
    )  # fmt: skip
    assert run.stdout.readline() == b"ready\n"
    mine = segments() - before
    assert mine
    shared_memory.remove_orphans()
    assert mine <= segments()  # its owner lives
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    left = {name for name in segments() - before if f"-{run.pid}-" in name}
    assert left
    until = time.monotonic() + 10
    while left & segments() and time.monotonic() < until:  # a worker may make one more before it has died
        assert shared_memory.remove_orphans() >= 0
    assert not left & segments()


class Stored:
    """A store and a watchdog that only count."""

    def __init__(self):
        self.saved = []

    def save(self, state, meta, position):
        self.saved.append((state.step, position["batches"]))

    def wait(self):
        pass

    reset = wait


@pytest.mark.parametrize(("step", "saved"), [(7, [(7, 7)]), (4, [])])
def test_what_was_computed_is_saved_before_a_lost_worker_ends_the_run(step, saved):
    config = SimpleNamespace(
        batch_size=4, schedules=SimpleNamespace(learning_rate=SimpleNamespace(peak=1e-3))
    )  # fmt: skip
    objective = SimpleNamespace(health_checks=lambda batch: (), flops_per_image=dict)
    mesh = jax.make_mesh((1, 1, 1), ("data", "fsdp", "tensor"), devices=jax.devices()[:1])
    store, position = Stored(), {"batches": 4, "images": 16, "replaced": 0, "drawn": [0]}
    loop = Loop(config, objective, mesh, store, {}, None, store, {}, 10, position, 4, ["toy"], None)

    def stream():
        raise EnvironmentFault("a data worker was killed")
        yield

    ending = f"; the state of step {step} is saved" if saved else ""
    with pytest.raises(EnvironmentFault, match=f"^a data worker was killed{ending}$"):
        loop.next_batch(stream(), SimpleNamespace(step=step))
    assert store.saved == saved


def test_too_little_memory_on_a_device_names_what_takes_less():
    config = SimpleNamespace(batch_size=64, accumulate=1, model=SimpleNamespace(remat="none"))
    with pytest.raises(UserError) as caught, explain_out_of_memory(config):
        jax.device_put(np.zeros(1)) + jax.numpy.zeros(1 << 46, "uint8")
    for word in ("batch_size than 64", "accumulate=2", "model.remat=block", "pera-jax plan"):
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("error", "said"),
    [(MemoryError(), "there is not enough memory"), (RuntimeError("can't start new thread"), "no more threads")],
)
def test_a_fault_of_the_machine_anywhere_is_one_line(error, said, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as ended:
        errors.run(main)
    text = capsys.readouterr().err
    assert (
        ended.value.code == errors.TRY_AGAIN and said in text and text.startswith("error: ") and text.count("\n") == 1
    )


@pytest.mark.parametrize("module", ["pera_jax.train", "data_prep.images"])
def test_ctrl_c_while_modules_are_loaded(module, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(  # Ctrl-C comes while NumPy is loaded
        "import importlib.abc, os, signal, sys\n"
        "class Finder(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'numpy': os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder())\n"
    )
    path = os.pathsep.join([str(tmp_path), os.getcwd()])
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (130, "error: interrupted\n")


@pytest.mark.parametrize("process", [0, 1])
def test_hosts_that_do_not_come_end_the_others_in_a_sentence(process):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = (
        "from pera_jax.common import errors\nfrom pera_jax.parallel import cluster\n"
        "cluster._REPORT_SECONDS = 1\n"
        f"arguments = cluster.from_flags('127.0.0.1:{port}', 2, {process}, {{}})\n"
        "errors.run(lambda: cluster.initialize(arguments, 3))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == errors.TRY_AGAIN
    lines = [line for line in done.stderr.splitlines() if line.startswith(("waiting", "error"))]
    assert lines[0].endswith("1 of 3 s") and lines[-1].startswith("error: the other processes did not join within 3 s")
    assert f"127.0.0.1:{port}" in lines[-1] and "--join_seconds" in lines[-1]
