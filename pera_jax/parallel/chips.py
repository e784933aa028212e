"""Peak FLOP/s and memory of accelerators by JAX's device kind, from the vendors' data sheets."""

import dataclasses

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """The peak performance of one JAX device.

    Attributes:
      peak_flops: dense bf16 FLOP/s with float32 accumulation.
      memory_bytes: device memory in bytes, including what the runtime reserves.
    """

    name: str
    peak_flops: float
    memory_bytes: int


# (substring of the device kind, name, TFLOP/s, GiB); the first match counts, so longer names come first.
_CHIPS = (
    ("TPU v2", "TPU v2 (one core)", 22.5, 8),
    ("TPU v3", "TPU v3 (one core)", 61.5, 16),
    ("TPU v4", "TPU v4", 275.0, 32),
    ("TPU v5 lite", "TPU v5e", 197.0, 16),
    ("TPU v5e", "TPU v5e", 197.0, 16),
    ("TPU v5", "TPU v5p", 459.0, 95),
    ("TPU v6", "TPU v6e", 918.0, 32),
    ("TPU7x", "TPU v7x (one of a chip's two devices)", 1153.5, 96),
    ("V100-SXM2-16GB", "V100 16 GB (float16)", 125.0, 16),
    ("V100", "V100 32 GB (float16)", 125.0, 32),
    ("A100-SXM4-40GB", "A100 40 GB", 312.0, 40),
    ("A100-PCIE-40GB", "A100 40 GB", 312.0, 40),
    ("A100", "A100 80 GB", 312.0, 80),
    ("H100 PCIe", "H100 PCIe", 756.0, 80),
    ("H100", "H100 SXM", 989.0, 80),
    ("GH200", "GH200", 989.0, 96),
    ("H200", "H200", 989.0, 141),
    ("B200", "B200", 2250.0, 180),
    ("L40S", "L40S", 362.0, 48),
    ("L40", "L40", 181.0, 48),
    ("L4", "L4", 121.0, 24),
    ("A10G", "A10G", 70.0, 24),
    ("A10", "A10", 125.0, 24),
    ("RTX 4090", "RTX 4090", 165.0, 24),
    ("RTX 3090", "RTX 3090", 71.0, 24),
)


def chip_of(device_kind: str) -> Chip | None:
    """The chip of a `jax.Device.device_kind`; None if it is not in the table, such as a CPU."""
    for part, name, teraflops, gibibytes in _CHIPS:
        if part in device_kind:
            return Chip(name, teraflops * 1e12, gibibytes * _GIB)
    return None
