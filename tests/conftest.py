"""Eight virtual CPU devices for every test, set before anything imports jax."""

import contextlib
import gc
import importlib.util
import os
import pathlib
import signal
import sys

import pytest

# Test programs run for milliseconds, and optimizing them takes two thirds of the compilation time.
FAST = (
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
)
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FAST} --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# XLA's CPU collectives deadlock when 8 devices share a thread pool of 2; the pool's size is read from NPROC.
os.environ["NPROC"] = "32"

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Tests run many trainings of the same few programs; they share compiled programs, also with subprocesses.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# Where an operation stands in Python is written into each program otherwise: a tenth of the time of lowering.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
sys.path.insert(0, str(ROOT / "tests" / "support"))
sys.path.insert(0, str(ROOT))  # `data_prep`, `configs` and `benchmarks` are run from the checkout
os.environ["PYTHONPATH"] = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH", "")) if p)

# Annotations of shapes and dtypes are checked in these modules. What runs in the environments of Beam, PyTorch and the
# GPU compiler needs no check, and they lack one of the two packages.
SHAPED = (
    "losses", "augment", "models", "objectives.ibot_masks", "objectives.pera.masks", "objectives.pera.views",
    "objectives.independent_views",
)
if all(importlib.util.find_spec(name) for name in ("jaxtyping", "beartype")):
    import jaxtyping

    jaxtyping.install_import_hook([f"pera_jax.{name}" for name in SHAPED], "beartype.beartype")

# A shell that starts the tests in the background makes them ignore SIGINT, and with them the subprocesses that tests
# send it to.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

LONGEST = (
    "test_contract", "test_train", "test_dinov2", "test_mae", "test_mocov3", "test_dino", "test_hosts",
    "test_commands", "test_step", "test_alarms", "test_init_from", "test_follow", "test_export_features",
    "test_installed", "test_checkpoint", "test_flops", "test_gpu_attention",
)


def pytest_collection_modifyitems(items):
    """Runs the slowest files first, so that the pytest-xdist workers finish at the same time."""
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


def pytest_collection_finish(session):
    gc.collect()
    gc.freeze()  # Orbax and the end of each training collect garbage: the modules need not be searched each time


@pytest.fixture(scope="session", autouse=True)
def shared_steps():
    if "pera_jax.train" in sys.modules:
        import shared_steps

        shared_steps.install()


@contextlib.contextmanager
def on_devices(number: int, **axes: int):
    """Trains on so many devices: eight virtual devices on one or two cores mostly wait for each other."""
    import jax

    from pera_jax.parallel import sharding

    make_mesh = sharding.make_mesh
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", lambda **_: make_mesh(**axes, devices=jax.devices()[:number]))
        yield


def on_one_device():
    return on_devices(1)


@pytest.fixture
def one_device():
    with on_one_device():
        yield
