"""Every published config compiled for H100s that are not there, by XLA's own GPU compiler (`make test-gpu-compile`).

Needs JAX's CUDA plug-in and NVIDIA's ptxas, and no GPU: kernels are chosen without being timed. What cuDNN would answer
to JAX's questions comes from `gpu_rules`; its kernels are custom calls in the compiled program.
"""

import importlib.util
import itertools
import pathlib

import gpu_rules
import jax
import pytest
from jax.experimental import topologies

from pera_jax import config as configs
from pera_jax import plan

HERE = pathlib.Path(__file__).parent
PUBLISHED = ("pera_vitb16", "pera_vitg16_1024", "aid_small", "demo")

if importlib.util.find_spec("jax_plugins") is None:
    pytest.skip("JAX's CUDA plug-in is not installed: make test-gpu-compile", allow_module_level=True)


def devices(number: int) -> list:
    """So many H100s of one host."""
    target = (HERE / "h100.txtpb").read_text()
    return topologies.get_topology_desc(
        platform="cuda", topology_name="h100", target_config=target, topology=f"1x1x{number}"
    ).devices


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize(
    ("number", "remat", "accumulate"), list(itertools.product((1, 8), ("none", "dots", "block"), (1, 2)))
)
def test_every_published_config_compiles_for_the_h100(name, number, remat, accumulate, monkeypatch):
    gpu_rules.in_force(monkeypatch)
    config = configs.load(f"configs/{name}.py")
    config.model.remat, config.accumulate = remat, accumulate
    trial = plan.compile_step(config, devices(number), 16)
    half = config.precision == "bfloat16"
    assert trial.program.objective.encoder.attention == ("cudnn" if half else "xla")
    if trial.memory is None or not trial.text:
        pytest.fail(f"{name} does not fit on {number} x H100 with 16 images each")
    assert ("__cudnn$fmhaSoftmax" in trial.text) == half and ("__cudnn$fmhaSoftmaxBackward" in trial.text) == half
    print(f"{name}, {number} x H100, {remat}, accumulate {accumulate}: {trial.memory.total / 2**30:.2f} GiB, "
          f"{trial.seconds:.0f} s")  # fmt: skip
    jax.clear_caches()
