"""Sets up the GPU compiler for the tests of this folder, before JAX is imported."""

import os
import pathlib
import sys

CUDA = next((p for p in (pathlib.Path(entry, "nvidia/cuda_nvcc") for entry in sys.path) if p.is_dir()), None)
if CUDA:
    # Without the CPU tests' haste. Nothing can be timed here, so nothing is autotuned; the Triton tiles that XLA takes
    # untuned do not fit every product ("Couldn't find output tile sizes"; a tuner passes over them): products use
    # cuBLAS.
    os.environ["XLA_FLAGS"] = (
        f"--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false --xla_gpu_cuda_data_dir={CUDA}"
    )
    os.environ["PATH"] = f"{CUDA / 'bin'}{os.pathsep}{os.environ['PATH']}"
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
