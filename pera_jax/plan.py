"""Predicts the memory and cost of a training by compiling its step for TPUs or for the devices of this machine.

    pera-jax plan --config pera_vitg16_1024 --topology v5e:16x16
    pera-jax plan --config pera_vitb16 --topology v6e:4x4 --per_device_batch 32 --no-search
    pera-jax plan --config demo --topology local

A TPU topology needs the extra `tpu`: libtpu, whose compiler runs without TPUs. `local` means the devices of this
machine. Nothing is run: memory and collectives are the compiler's own numbers for one chip.
"""

import argparse
import dataclasses
import importlib.util
import math
import os
import re
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import topologies

from pera_jax import config as configs
from pera_jax import objectives
from pera_jax.common import errors, files, owned, paths
from pera_jax.common.errors import UserError
from pera_jax.common.text import first_line
from pera_jax.cost import hlo
from pera_jax.cost.program import Memory, Program, memory_of
from pera_jax.objectives.base import networks
from pera_jax.parallel import chips, sharding
from pera_jax.training import schedules

_GIB = 2**30
_RESERVED = 0.5 * _GIB  # of a chip's memory, for the runtime and the transfer of the next batch
TRIALS = 6  # maximum number of compilations in a search


def devices_of(topology: str) -> list[Any]:
    """The devices of a TPU topology such as "v5e:16x16", or of this machine for "local".

    Raises:
      UserError: unknown topology, or libtpu is not installed.
    """
    if topology == "local":
        return jax.devices()
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"compiling for {topology} needs libtpu; run pip install 'jax[tpu]=={jax.__version__}'")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # otherwise libtpu queries the metadata server of a TPU VM
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except Exception as error:  # the type depends on the version of JAX
        raise UserError(
            f"--topology {topology!r} is invalid ({first_line(error)}); expected local, or a TPU topology such as "
            "v5e:16x16, v6e:8x8 or v5p:4x4x8"
        ) from error


def _memory_in_error(message: str) -> Memory | None:
    """The memory that a program needs, from the compiler's out-of-memory error; None if the error does not say."""
    used = re.search(r"(?:Used |HLO temporaries \()([\d.]+)([KMG])", message)
    return Memory(0, int(float(used[1]) * 2 ** {"K": 10, "M": 20, "G": 30}[used[2]])) if used else None


@dataclasses.dataclass(frozen=True)
class Trial:
    """A step compiled for a batch of `per_device` images per device."""

    per_device: int
    memory: Memory | None  # None: the compiler ran out of memory and did not say how much is needed
    program: Program
    text: str  # HLO of the compiled program; "" if the compiler ran out of memory
    seconds: float


def _shards(config, devices: list[Any]) -> int:
    data, fsdp, _ = sharding.mesh_sizes(**config.mesh, devices=len(devices))
    return data * fsdp


def compile_step(config, devices: list[Any], per_device: int, make: Callable = objectives.from_config) -> Trial:
    """Compiles the step of `config` for a batch of `per_device` images on each data shard of the mesh.

    Groups of images (of drop path and KoLeo) that are larger than the batch are reduced to the batch.
    """
    config = config.copy_and_resolve_references()
    shards = _shards(config, devices)
    config.batch_size = per_device * shards
    configs.limit_groups(config, per_device // config.accumulate)
    began = time.perf_counter()
    program = Program(config, devices, make=make)
    lowered = program.trace().lower()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) and "Ran out of memory" not in str(error):
            raise
        return Trial(per_device, _memory_in_error(str(error)), program, "", time.perf_counter() - began)
    return Trial(per_device, memory_of(compiled), program, compiled.as_text(), time.perf_counter() - began)


def largest(measure: Callable[[int], Memory | None], unit: int, limit: float, first: tuple[int, Memory | None]) -> int:
    """The largest number of images per device, a multiple of `unit`, that needs at most `limit` bytes; 0 if none fits.

    Memory is nearly linear in the number of images, so two measurements predict the next trial. The returned number was
    measured, and one unit more was measured not to fit, unless `TRIALS` was reached.

    Args:
      measure: maps images per device to memory, or to None if the compiler runs out of memory.
      first: an existing measurement, (images per device, memory).
    """
    known = {first[0]: first[1]}

    def fits(units: int) -> bool:
        count = units * unit
        if count not in known:
            known[count] = measure(count)
        memory = known[count]
        return memory is not None and memory.total <= limit

    low, high = 0, None  # the largest number known to fit and the smallest known not to fit, in units
    trial = max(first[0] // unit, 1)
    for _ in range(TRIALS):
        if fits(trial):
            low = max(low, trial)
        else:
            high = trial if high is None else min(high, trial)
        if high is not None and high - low <= 1:
            break
        trial = _next_trial(known, unit, limit, low, high)
    return low * unit


def _next_trial(known: dict[int, Memory | None], unit: int, limit: float, low: int, high: int | None) -> int:
    measured = sorted((count // unit, memory.total) for count, memory in known.items() if memory is not None)
    if len(measured) < 2:
        guess = 2 * low if high is None else (low + high) // 2
    else:
        (a, at_a), (b, at_b) = measured[0], measured[-1]
        slope = max((at_b - at_a) / (b - a), 1.0)
        guess = int((limit - at_b) / slope + b)
    return max(low + 1, guess if high is None else min(guess, high - 1), 1)


def plan(config, topology: str, per_device: int | None, search: bool, images: int, share: float, say=print) -> dict:
    """The numbers that the command prints, as a JSON-serializable dict.

    Args:
      topology: see `devices_of`.
      per_device: images per device; None uses the config's batch_size.
      search: also find the largest batch that fits.
      images: size of the dataset, for durations in epochs.
      share: assumed model FLOPs utilization, in (0, 1].
      say: called with each line of progress.

    Raises:
      UserError: unknown topology, or an invalid config.
    """
    configs.check_fields(config)
    devices = devices_of(topology)
    chip = chips.chip_of(devices[0].device_kind)
    shards = _shards(config, devices)
    if per_device is None:
        per_device = config.batch_size // shards
    if per_device < 1:
        raise UserError(
            f"batch_size={config.batch_size} is smaller than the {shards} data shards of the mesh; set "
            "--per_device_batch"
        )
    limit = chip.memory_bytes - _RESERVED if chip else math.inf

    def measure(count: int) -> Trial:
        trial = compile_step(config, devices, count)
        result = "out of memory" if trial.memory is None else f"{trial.memory.total / _GIB:.2f} GiB"
        say(f"compiled for {count} images per device in {trial.seconds:.0f} s: {result}")
        return trial

    trial = measure(per_device)
    best = None
    if search and math.isfinite(limit):
        unit = max(config.drop_path.group, 1) * config.accumulate
        unit = unit if per_device % unit == 0 else per_device
        best = largest(lambda count: measure(count).memory, unit, limit, (per_device, trial.memory))
    program = trial.program
    parts = program.objective.flops_per_image()
    batch = per_device * shards
    total = schedules.parse_duration(
        config.total, total_steps=None, steps_per_epoch=images // batch, batch_size=batch, name="total"
    )
    result = {
        "config": config.name, "topology": topology, "device": devices[0].device_kind, "devices": len(devices),
        "mesh": dict(program.mesh.shape), "per_device_batch": per_device, "batch_size": batch,
        "accumulate": config.accumulate, "remat": config.model.remat,
        "networks": list(networks(program.objective)),
        "compiled": bool(trial.text),
        "memory": trial.memory and dataclasses.asdict(trial.memory),
        "room": limit if math.isfinite(limit) else None,
        "fits": bool(trial.text) and trial.memory.total <= limit,
        "largest_per_device_batch": best,
        "flops_per_image": parts,
        "collectives": hlo.by_kind(hlo.collectives(trial.text)),
        "run": {"total": config.total, "images": images, "steps": total, "share_of_peak": share},
    }  # fmt: skip
    if chip:
        seconds = sum(parts.values()) * batch / (share * chip.peak_flops * len(devices))
        result["run"] |= {
            "seconds_per_step": seconds, "images_per_second": batch / seconds, "hours": total * seconds / 3600,
            "chip_hours": len(devices) * total * seconds / 3600,
        }  # fmt: skip
    return result


def show(result: dict) -> str:
    """Formats the result of `plan` as text."""
    lines = [
        f"{result['config']} on {result['topology']}: {result['devices']} x {result['device']}, mesh "
        + " x ".join(f"{name} {size}" for name, size in result["mesh"].items()),
        f"{result['per_device_batch']} images per device, {result['batch_size']:,} in a batch"
        + (f", in {result['accumulate']} microbatches" if result["accumulate"] > 1 else "")
        + f"; remat {result['remat']}",
        "",
    ]
    memory, limit = result["memory"], result["room"]
    if memory is None:
        lines.append("DOES NOT FIT: the compiler runs out of memory")
    elif not result["compiled"]:
        lines.append(
            f"DOES NOT FIT: the compiler runs out of memory, {memory['temporaries'] / _GIB:.1f} GiB are needed"
        )
    else:
        total = memory["arguments"] + memory["temporaries"]
        teacher = " teacher," if "teacher" in result["networks"] else ""
        lines += [
            f"{f'parameters, optimizer,{teacher} batch':40}{memory['arguments'] / _GIB:10.3f} GiB per chip",
            f"{'temporaries':40}{memory['temporaries'] / _GIB:10.3f} GiB per chip",
        ]
        if limit is not None:
            verdict = "fits" if result["fits"] else "DOES NOT FIT"
            lines.append(f"{verdict + ', memory left':40}{(limit - total) / _GIB:10.3f} GiB of {limit / _GIB:.1f}")
    if result["largest_per_device_batch"] is not None:
        lines.append(f"{'largest batch that fits':40}{result['largest_per_device_batch']:10,} images per chip")
    lines += ["", f"{'FLOPs per image':40}{'GFLOP':>10}"]
    lines += [f"  {name:38}{value / 1e9:10.1f}" for name, value in result["flops_per_image"].items()]
    lines.append(f"  {'total':38}{sum(result['flops_per_image'].values()) / 1e9:10.1f}")
    lines += ["", f"{'collectives per step and chip':40}{'count':>10}{'MiB':>12}"]
    for kind, row in result["collectives"].items():
        lines.append(f"  {kind:38}{row['count']:10,}{row['bytes'] / 2**20:12,.1f}")
    if not result["collectives"]:
        lines.append("  none")
    run = result["run"]
    lines += ["", f"run of {run['total']} on {run['images']:,} images: {run['steps']:,} steps"]
    if "hours" in run:
        lines.append(
            f"at {run['share_of_peak']:.0%} of peak: {run['seconds_per_step']:.3f} s per step, "
            f"{run['images_per_second']:,.0f} images/s, {run['hours']:,.1f} hours, {run['chip_hours']:,.0f} chip-hours"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="pera-jax plan", description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True, help="a name such as pera_vitb16 or demo:smoke, or a file")
    parser.add_argument(
        "--topology", required=True, help="TPU topology such as v5e:16x16, v6e:16x16 or v5p:4x4x8, or local"
    )
    parser.add_argument(
        "--per_device_batch", type=int, help="images per device (default: from the config's batch_size)"
    )
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="override a config field")
    parser.add_argument(
        "--no-search", action="store_true", help="compile once, without searching for the largest batch that fits"
    )
    parser.add_argument(
        "--images", type=int, default=5_000_000, help="number of images in the dataset (default: %(default)s)"
    )
    parser.add_argument(
        "--share", type=float, default=0.4, help="assumed fraction of peak FLOP/s (default: %(default)s)"
    )
    parser.add_argument("--json", type=paths.local_path, help="also write the numbers to this file")
    arguments = parser.parse_args(argv)
    if not 0 < arguments.share <= 1 or arguments.images < 1 or (arguments.per_device_batch or 1) < 1:
        raise UserError("--share must be in (0, 1], --images and --per_device_batch >= 1")
    if arguments.json:
        owned.check(arguments.json, fix="--json")
        try:
            files.check_writable(arguments.json)
        except OSError as error:
            raise UserError(f"cannot write {arguments.json}: {error.strerror}; choose another --json") from error
    result = plan(
        configs.load(arguments.config, arguments.set), arguments.topology, arguments.per_device_batch,
        not arguments.no_search, arguments.images, arguments.share,
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )  # fmt: skip
    print(show(result))
    if arguments.json:
        files.write(arguments.json, owned.json_text(result))


if __name__ == "__main__":
    errors.run(main)
