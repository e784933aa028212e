"""The training step of a config: FLOPs, CPU time and memory.

    python benchmarks/step.py --config configs/aid_small.py
    python benchmarks/step.py --config configs/pera_vitb16.py --batch 16 --no-run
    python benchmarks/step.py --config configs/demo.py --set model.width=192 --set batch_size=32 --json step.json

Runs the training step on random crops on all local devices. Needs jax, flax, optax, einops and ml_collections, but no
data library.

FLOPs are counted in three ways: those of the method, by arithmetic; the matrix products of the traced step, loop bodies
once per iteration; and XLA's cost analysis, with elementwise operations. XLA counts the body of a loop only once, so
the loops over blocks and pairs are unrolled for it. The logits of the class loss are always recomputed in the backward
pass, which the last two numbers include. The loop over crops for color jitter on CPU has no matrix product and is not
unrolled.

On CPUs with glibc, GLIBC_TUNABLES=glibc.malloc.hugetlb=1 before the command avoids page faults (system time).
"""

import argparse
import dataclasses
import functools
import pathlib
import sys
import time
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from pera_jax import config as configs  # noqa: E402
from pera_jax.common import errors, files  # noqa: E402
from pera_jax.common.errors import UserError  # noqa: E402
from pera_jax.cost import flops
from pera_jax.cost.program import Program, memory_of  # noqa: E402
from pera_jax.models import attention
from pera_jax.objectives import batches
from pera_jax.parallel import sharding
from pera_jax.training import step as steps  # noqa: E402

_SIDE = 2048  # size of the matrix product that the step is compared with


def xla_flops(config, remat: str) -> float:
    """XLA's FLOPs per image of the step on one device, before fusion, with every `scan` unrolled.

    Args:
      remat: replaces `config.model.remat`.
    """
    config = config.copy_and_resolve_references()
    config.model.update(dict(scan=False, remat=remat))
    config.mesh.update(dict(data=1, fsdp=1, tensor=1))
    rolled = jax.lax.scan

    def unrolled(*arguments, unroll=1, **options):
        return rolled(*arguments, unroll=True, **options)

    # Attention of a part of the crops at a time is a loop, too.
    with mock.patch.object(jax.lax, "scan", unrolled), mock.patch.object(attention, "_SCORES", float("inf")):
        return Program(config, jax.devices()[:1]).trace().lower().cost_analysis()["flops"] / config.batch_size


def time_step(program: Program, compiled, number: int) -> dict[str, float]:
    """CPU seconds and wall-clock seconds per step: the medians of `number` steps after two warmup steps."""
    state = steps.init_sharded(program.objective, program.optimizer, program.mesh, program.config.seed)
    noise = batches.random(program.objective, program.config.batch_size, np.random.default_rng(0))
    batch = jax.device_put(noise, jax.sharding.NamedSharding(program.mesh, sharding.BATCH))
    spent = []
    with jax.set_mesh(program.mesh):
        for _ in range(number + 2):
            began = time.process_time(), time.perf_counter()
            state, metrics = compiled(state, batch, program.hyper)
            jax.block_until_ready((state, metrics))
            spent.append((time.process_time() - began[0], time.perf_counter() - began[1]))
    cpu, wall = np.median(spent[2:], axis=0)
    return {"cpu": float(cpu), "wall": float(wall)}


def time_product() -> dict[str, float]:
    """FLOP/s of a float32 matrix product, per CPU second and per wall-clock second: the best of five."""
    product = jax.jit(functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST))
    matrix = jax.random.normal(jax.random.key(0), (_SIDE, _SIDE))
    rates = []
    for _ in range(6):
        began = time.process_time(), time.perf_counter()
        jax.block_until_ready(product(matrix, matrix))
        spent = time.process_time() - began[0], time.perf_counter() - began[1]
        rates.append([2.0 * _SIDE**3 / seconds for seconds in spent])
    cpu, wall = np.max(rates[1:], axis=0)
    return {"cpu": float(cpu), "wall": float(wall)}


def measure(config, number: int, run: bool) -> dict:
    """The numbers that the command prints, as a JSON-serializable dict."""
    program = Program(config)
    parts = program.objective.flops_per_image()
    method = sum(parts.values())
    traced = program.trace()
    count = {
        "parts": parts, "method": method,
        "traced": flops.matrix_products(traced.jaxpr.jaxpr) / config.batch_size,
        "xla": xla_flops(config, remat="none"),
    }  # fmt: skip
    if config.model.remat != "none":
        count["xla_with_recomputation"] = xla_flops(config, config.model.remat)
    result = {"config": config.name, "batch_size": config.batch_size, "devices": len(program.mesh.devices.flat),
              "device": jax.devices()[0].device_kind, "flops_per_image": count}  # fmt: skip
    if run:
        compiled = traced.lower().compile()
        result["bytes"] = dataclasses.asdict(memory_of(compiled))
        before, spent, after = time_product(), time_step(program, compiled, number), time_product()
        product = {clock: max(before[clock], after[clock]) for clock in before}
        clock = "cpu" if jax.default_backend() == "cpu" else "wall"
        result |= {
            "cpu_seconds_per_image": spent["cpu"] / config.batch_size,
            "seconds_per_step": spent["wall"],
            "images_per_second": config.batch_size / spent["wall"],
            "matmul_flops_per_second": product[clock],
            "share_of_matmul": method * config.batch_size / spent[clock] / product[clock],
        }
    return result


def show(result: dict) -> None:
    count = result["flops_per_image"]
    print(f"{result['config']}, batch of {result['batch_size']} on {result['devices']} x {result['device']}\n")
    print(f"{'part':44}{'MFLOP per image':>18}")
    for name, value in count["parts"].items():
        print(f"{name:44}{value / 1e6:18,.1f}")
    print(f"{'the method: matrix products, by arithmetic':44}{count['method'] / 1e6:18,.1f}")
    rows = {
        "traced": "matrix products as configured, as traced", "xla": "XLA, loops unrolled, blocks not recomputed",
        "xla_with_recomputation": "XLA, loops unrolled, blocks recomputed",
    }  # fmt: skip
    for name, words in rows.items():
        if name in count:
            print(f"{words:44}{count[name] / 1e6:18,.1f}   {count[name] / count['method']:.3f} x the method")
    print(
        "Traced: loop bodies once per iteration. XLA: before fusion, one device; on CPU, color jitter of one crop only."
    )
    if "bytes" not in result:
        return
    print()
    for name, value in result["bytes"].items():
        print(f"{name + ', MB per device':44}{value / 1e6:18,.1f}")
    print(f"{'CPU seconds per image':44}{result['cpu_seconds_per_image']:18.4f}")
    print(f"{'seconds per step':44}{result['seconds_per_step']:18.4f}")
    print(f"{'images per second':44}{result['images_per_second']:18.2f}")
    per = "per CPU second" if jax.default_backend() == "cpu" else "per second"
    print(f"{f'GFLOP {per}, {_SIDE} x {_SIDE} float32 product':44}{result['matmul_flops_per_second'] / 1e9:18.1f}")
    print(f"{'fraction of it that the step reaches':44}{result['share_of_matmul']:18.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="config by name or path, e.g. demo:smoke")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="override a config field")
    parser.add_argument("--batch", type=int, help="number of images; larger groups are reduced to the batch")
    parser.add_argument("--steps", type=int, default=5, help="number of steps to time (default: 5)")
    parser.add_argument("--no-run", action="store_true", help="only count FLOPs, without compiling or running the step")
    parser.add_argument("--json", type=pathlib.Path, help="also write the numbers to this file")
    arguments = parser.parse_args()
    config = configs.load(arguments.config, arguments.set)
    if arguments.steps < 1 or (arguments.batch is not None and arguments.batch < 1):
        raise UserError("--steps and --batch must be >= 1")
    if arguments.batch:
        config.batch_size = arguments.batch
        configs.limit_groups(config, arguments.batch)
    result = measure(config, arguments.steps, not arguments.no_run)
    show(result)
    if arguments.json:
        files.write_json(arguments.json, result)


if __name__ == "__main__":
    errors.run(main)
