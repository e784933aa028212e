"""Eight virtual CPU devices for every test, set before anything imports jax."""

import os
import pathlib
import signal
import sys

import pytest

# These programs run for milliseconds: optimising them takes two thirds of the time to compile.
FAST = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FAST} --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# XLA's CPU collectives deadlock when 8 devices share a thread pool of 2; the pool's size is read from NPROC.
os.environ["NPROC"] = "32"

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Tests start many trainings of the same few programs: they share what is compiled, also with the commands they start.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
sys.path.insert(0, str(ROOT / "tests" / "support"))
sys.path.insert(0, str(ROOT))  # `data_prep`, `configs` and `benchmarks` are run from the checkout
os.environ["PYTHONPATH"] = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH", "")) if p)

# A shell that starts the tests in the background has Ctrl-C ignored, also by the commands that tests send it to.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

LONGEST = ("test_step", "test_train", "test_hosts")


def pytest_collection_modifyitems(items):
    """The files that take longest first, so that the processes that share the files end together."""
    items.sort(key=lambda item: item.path.stem not in LONGEST)


@pytest.fixture
def one_device(monkeypatch):
    """Eight virtual devices on a core or two take most of the time to wait for each other."""
    import jax

    from pera_jax.parallel import sharding

    make_mesh = sharding.make_mesh
    monkeypatch.setattr(sharding, "make_mesh", lambda **_: make_mesh(devices=jax.devices()[:1]))
