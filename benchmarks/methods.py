"""Compares the cost of all registered methods at the same vision transformer, crops and batch.

    python benchmarks/methods.py                                   # ViT-B/16, crops of 448 and 96 px, TPU v5e
    python benchmarks/methods.py --methods mae pera --topology none
    python benchmarks/methods.py --cpu-images 0 --json methods.json

Each method has its own defaults (views, heads, losses), with the options of `--set` on top. For each it prints

* GFLOP per image of a training step: by the method's arithmetic; as traced (matrix products) and by XLA's count (also
  elementwise, loops unrolled), both without recomputed blocks, as multiples of it.
* The temporaries per image that the TPU compiler plans for one chip of `--topology`, by `model.remat`, and the largest
  batch on chips of 16, 32 and 80 GB. Nothing is run. Compiled with both numbers of images in `--batches`, to separate
  memory per image from constant memory. Needs libtpu (the extra `tpu`).
* CPU seconds per image, of `--cpu-images` images on this machine in float32.
"""

import argparse
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import jax  # noqa: E402

from benchmarks import memory, step  # noqa: E402
from pera_jax import config as configs  # noqa: E402
from pera_jax import objectives, plan  # noqa: E402
from pera_jax.common import errors, files  # noqa: E402
from pera_jax.cost import flops  # noqa: E402
from pera_jax.cost.program import Program  # noqa: E402

_GB, _MB = 1e9, 1e6


def config_of(method: str, changes: list[str], images: int):
    """The default config of a method for `images` images on one device; groups of images are limited to them."""
    config = configs.load(configs.default(method), changes)
    config.batch_size, config.accumulate = images, 1
    config.mesh.update(dict(data=1, fsdp=1, tensor=1))
    configs.limit_groups(config, images)
    return config


def count(config) -> dict[str, float]:
    """GFLOP per image of a step, counted in three ways."""
    config.model.remat = "none"
    program = Program(config, jax.devices()[:1])
    traced = flops.matrix_products(program.trace().jaxpr.jaxpr) / config.batch_size
    method = sum(program.objective.flops_per_image().values())
    counts = {"method": method, "traced": traced, "xla": step.xla_flops(config, remat="none")}
    return {name: value / 1e9 for name, value in counts.items()}


def seconds(config, number: int) -> float:
    """CPU seconds per image of a step on this machine: the median of `number` steps."""
    program = Program(config, jax.devices()[:1])
    return step.time_step(program, program.trace().lower().compile(), number)["cpu"] / config.batch_size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(objectives.METHODS), help="default: all registered ones")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="override a config field")
    parser.add_argument("--topology", default="v5e:2x2", help="TPU topology, or none (default: v5e:2x2)")
    parser.add_argument("--batches", type=int, nargs=2, default=(16, 32), help="images per chip (default: 16 32)")
    parser.add_argument("--remat", nargs="+", default=("none", "block"), help="remat policies (default: none block)")
    parser.add_argument("--cpu-images", type=int, default=2, help="images of the timed step, 0 for none (default: 2)")
    parser.add_argument("--steps", type=int, default=1, help="number of timed steps (default: 1)")
    parser.add_argument("--json", type=pathlib.Path, help="also write the numbers to this file, row by row")
    arguments = parser.parse_args()
    devices = None if arguments.topology == "none" else plan.devices_of(arguments.topology)[:1]
    print(f"{'method':10}{'GFLOP':>8}{'traced':>8}{'XLA':>6}   per image; then memory and seconds", flush=True)
    rows = []
    for method in arguments.methods:
        row = {"method": method, "gflop_per_image": count(config_of(method, arguments.set, arguments.batches[0]))}
        counts = row["gflop_per_image"]
        relative = (counts[name] / counts["method"] for name in ("traced", "xla"))
        print(f"{method:10}{counts['method']:8,.1f}{next(relative):8.3f}{next(relative):6.3f}", flush=True)
        for remat in arguments.remat if devices else ():
            config = config_of(method, [*arguments.set, f"model.remat={remat}"], max(arguments.batches))
            found = row[f"remat_{remat}"] = memory.measure(
                config, devices, tuple(arguments.batches), objectives.from_config
            )
            print(f"{'':10}remat {remat:6}{_memory(found)}", flush=True)
        if arguments.cpu_images:
            config = config_of(method, [*arguments.set, "precision=float32"], arguments.cpu_images)
            row["cpu_seconds_per_image"] = seconds(config, arguments.steps)
            print(f"{'':10}{row['cpu_seconds_per_image']:.2f} CPU seconds per image", flush=True)
        rows.append(row)
        if arguments.json:
            files.write_json(arguments.json, rows)


def _memory(found: dict) -> str:
    if "refused" in found:
        needed = f", {found['wanted'] / _GB:.1f} GB needed" if found["wanted"] else ""
        return f"out of memory for {found['refused']} images{needed}"
    largest = ", ".join(f"{images:,} on {chip} GB" for chip, images in found["largest"].items())
    return f"{found['per_image'] / _MB:8,.1f} MB of temporaries per image; largest batch {largest}"


if __name__ == "__main__":
    errors.run(main)
