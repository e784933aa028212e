#!/usr/bin/env bash
# Benchmarks one GPU in about eight minutes: first the authors' reference values, then benchmarks/gpu.py.
# Needs Python, JAX with CUDA, Flax, Optax, Orbax, einops and ml_collections; no data library.
#
#   benchmarks/gpu.sh [FOLDER FOR gpu.json] [SECONDS]
set -u
cd "$(dirname "$0")/.."
python3 tests/check_reference.py tests/files/reference_tiny.npz | tail -1
exec python3 benchmarks/gpu.py --json "${1:-.}/gpu.json" --seconds "${2:-440}"
