"""The installed wheel in an empty folder, without the checkout: the command, configs, and calls from Python."""

import importlib.metadata
import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
import toy_data
from conftest import ROOT

SCRIPT = '''
"""Calls as in a notebook, by a script without `if __name__ == "__main__"`: data workers must not run it again."""
import logging, pathlib, signal, sys, threading

import pera_jax


def state():
    names = ("root", "absl", "jax", "jax._src.xla_bridge", "orbax", "grain")
    loggers = [logging.getLogger(name) if name != "root" else logging.root for name in names]
    handlers = {number: signal.getsignal(number) for number in signal.Signals}
    logs = [(logger.level, list(logger.handlers), logger.propagate, logger.disabled) for logger in loggers]
    return logs, logging.root.manager.disable, logging.getLoggerClass(), handlers, sys.argv[:]


heavy = {"jax", "numpy", "absl", "flax", "orbax", "grain", "ml_collections"}
assert not heavy & set(sys.modules), "import pera_jax is light"
assert {"train", "probe", "features", "UserError"} <= set(dir(pera_jax))
before = state()
train, config = pera_jax.train, pathlib.Path("own.py")
changes = {"total": "2 steps", "data.workers": 1}
assert train(config=config, data=pathlib.Path("toy"), workdir=pathlib.Path("run"), changes=changes) is None
(entry,) = pera_jax.probe("run", ["knn"], data="toy", test_split="", changes={"knn.k": (3,)})
assert entry["scores"]["knn3"]["value"] >= 0 and pathlib.Path("run/probe").is_dir()
model = pera_jax.features.load("run")
assert model.network.width == 32
for wrong, sentence in (
    ({"data": "images"}, "images has no info.json: it is not a dataset folder"),
    ({"data": "images"}, "make one of a folder of images with pera-jax prep-images"),
    ({"config": "pera_vitb"}, "config pera_vitb does not exist; expected one of aid_"),
    ({"changes": {"model.breadth": 3}}, "no field model.breadth"),
):
    try:
        pera_jax.train(**{"config": "demo:smoke", "data": "toy", "workdir": "none"} | wrong)
    except pera_jax.UserError as error:
        assert sentence in str(error), error
    else:
        raise AssertionError(wrong)
assert not pathlib.Path("none").exists()
after = state()
assert after == before, f"{after} is not {before}"
assert not {"watchdog", "signals", "join"} & {thread.name for thread in threading.enumerate()}
from absl import flags, logging as absl_logging
assert "workdir" not in flags.FLAGS and absl_logging.get_verbosity() == absl_logging.WARNING
print("all is as it was")
'''
OWN = """
from pera_jax import config as configs


def get_config(argument=None):
    config = configs.default("toy_mae")
    config.name = "own"
    return configs.smoke(config)
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder that the package is installed into, built from a copy: a build leaves folders beside the sources."""
    if int(importlib.metadata.version("setuptools").split(".")[0]) < 77:
        pytest.skip("building the wheel needs setuptools>=77, which requirements-test.txt has")
    source, site = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    for folder in ("pera_jax", "data_prep", "configs"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    options = (
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "--no-compile",
        "--quiet",
        "--disable-pip-version-check",
    )
    subprocess.run([sys.executable, "-m", "pip", "install", *options, "--target", str(site), str(source)], check=True)
    return site


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An empty folder but for the dataset, and a config and a method of one's own, which compiles in seconds."""
    folder = tmp_path_factory.mktemp("empty")
    toy_data.write(folder / "toy")
    (folder / "own.py").write_text(OWN)
    shutil.copy(ROOT / "tests" / "support" / "toy_mae.py", folder)
    (folder / "images").mkdir()
    return folder


def run(site, folder, *arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {
        "PYTHONPATH": str(site),
        "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("count=8", "count=1"),
    }
    return subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True)


def test_the_wheel_holds_every_module_and_the_configs_once(site):
    for place in ("pera_jax", "data_prep"):
        sources = {file.relative_to(ROOT) for file in (ROOT / place).rglob("*.py")}
        installed = {file.relative_to(site) for file in (site / place).rglob("*.py")}
        assert {file for file in installed if file.parts[1] != "configs"} == sources
    names = {file.name for file in (ROOT / "configs").glob("*.py")}
    assert {file.name for file in (site / "pera_jax" / "configs").iterdir()} == names
    assert {folder.name for folder in site.iterdir() if folder.suffix != ".dist-info"} == {
        "bin",
        "data_prep",
        "pera_jax",
    }


def test_a_training_by_the_command_with_a_config_by_name(site, folder):
    command = (str(site / "bin" / "pera-jax"), "train", "--config", "demo:smoke", "--config.data.path=toy")
    done = run(site, folder, *command, "--config.total=2 steps", "--config.crops.local_number=0", "--workdir", "named")
    assert done.returncode == 0, done.stderr
    assert json.loads((folder / "named" / "config.json").read_text())["config"]["name"] == "demo_smoke"
    assert (folder / "named" / "FINISHED").is_file()
    again = run(site, folder, "-m", "pera_jax", "train", "--config", "named/config.json", "--workdir", "named")
    assert (again.returncode, again.stderr) == (0, "named is at step 2 of 2: nothing left to do\n")


def test_calls_from_python_work_and_leave_the_process_as_it_was(site, folder):
    (folder / "script.py").write_text(SCRIPT)
    done = run(site, folder, "script.py")
    assert (done.returncode, done.stdout) == (0, "all is as it was\n"), done.stderr
    assert done.stderr.count("compiling the step") == 1
    config = json.loads((folder / "run" / "config.json").read_text())["config"]
    assert (config["name"], config["data"]["path"], config["total"]) == ("own_smoke", "toy", "2 steps")


def test_the_module_and_the_call_are_one_in_any_order_of_imports():
    """In processes that have imported nothing of the package, forked where its libraries are in memory."""
    code = """
import inspect, os, sys
import pera_jax.train, pera_jax.probe
for name in [name for name in sys.modules if name.split(".")[0] == "pera_jax"]:
    del sys.modules[name]
for first in ("import pera_jax, pera_jax.train as job", "import pera_jax.train as job, pera_jax",
              "from pera_jax import train as job; import pera_jax"):
    child = os.fork()
    if child == 0:
        exec(first)
        import pera_jax.probe
        assert pera_jax.train is job and callable(job) and callable(job.train)
        assert list(inspect.signature(job).parameters)[:2] == ["config", "workdir"] and callable(pera_jax.probe)
        print(first, flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, first
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=pathlib.Path(ROOT), capture_output=True, text=True)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 3, done.stderr
