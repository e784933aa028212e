"""JAX's rules for cuDNN's attention, answered on a machine without a GPU as an H100 with cuDNN 9.10 would."""

import dataclasses

import jax
from jax._src.cudnn import fused_attention_stablehlo as rules


@dataclasses.dataclass(frozen=True)
class Device:
    """What `attention.choose` reads of a device; a `jax.Device` to `isinstance`."""

    __class__ = jax.Device
    platform: str = "gpu"
    device_kind: str = "NVIDIA H100 80GB HBM3"
    compute_capability: str = "9.0"


H100 = Device()


def in_force(monkeypatch) -> None:
    """Tracing and lowering meet the checks that they would meet on an H100."""
    monkeypatch.setattr(rules, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(rules, "check_compute_capability", lambda wanted: float(wanted) <= 9.0)
    monkeypatch.setattr(rules, "is_cuda_compute_capability_equal", lambda other: other == "9.0")
