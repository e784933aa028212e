"""Benchmarks one GPU: accuracy and speed of attention kernels, images per second, MFU and memory of the step, a
profile.

    python benchmarks/gpu.py --json gpu.json                       # everything, about eight minutes on an H100
    python benchmarks/gpu.py --parts kernels --seconds 60

Needs jax, flax, optax, einops and ml_collections, but no data library. Parts, in this order: `kernels` (errors and
times of attention by cuDNN and by XLA at the published sequence lengths), `gradients` (of the whole loss with both,
compared with float32), `steps` (the table), `profile` (the ten kernels that take most time in its first row). Results
are printed and written as soon as they are measured; rows that do not fit into `--seconds` are listed and skipped.

MFU is the FLOPs of the method (`Objective.flops_per_image`, without recomputation) divided by time and peak bf16
FLOP/s.
"""

import argparse
import collections
import gzip
import json
import pathlib
import statistics
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from pera_jax import config as configs  # noqa: E402
from pera_jax.common import errors, files
from pera_jax.common.errors import UserError  # noqa: E402
from pera_jax.common.text import first_line  # noqa: E402
from pera_jax.cost.program import Program, memory_of  # noqa: E402
from pera_jax.models import attention  # noqa: E402
from pera_jax.models.precision import Precision  # noqa: E402
from pera_jax.objectives import batches  # noqa: E402
from pera_jax.objectives.base import Context, Streams  # noqa: E402
from pera_jax.parallel import chips, sharding  # noqa: E402
from pera_jax.training import step as steps  # noqa: E402

PARTS = ("kernels", "gradients", "steps", "profile")
# Sequence lengths with the published crops: student and teacher, global and local, with class token; and a whole image.
LENGTHS = (8, 23, 158, 315, 471, 785)
# (batch, remat, attention, scan, prototypes), the most important first.
TABLE = (
    (128, "none", "auto", True, 131072),
    (64, "block", "auto", True, 131072),
    (64, "block", "xla", True, 131072),
    (128, "dots", "auto", True, 131072),
    (256, "block", "auto", True, 131072),
    (16, "block", "auto", True, 131072),
    (64, "none", "auto", True, 131072),
    (128, "none", "auto", True, 16384),
    (64, "none", "auto", False, 131072),
    (16, "none", "auto", True, 131072),
)


def timed(function, *arguments, seconds: float = 0.3) -> float:
    """Seconds per call: the median of five runs that together take `seconds`, after three warmup calls."""
    for _ in range(3):
        jax.block_until_ready(function(*arguments))
    began = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    calls = max(1, int(seconds / 5 / max(time.perf_counter() - began, 1e-6)))
    runs = []
    for _ in range(5):
        began = time.perf_counter()
        for _ in range(calls):
            result = function(*arguments)
        jax.block_until_ready(result)
        runs.append((time.perf_counter() - began) / calls)
    return statistics.median(runs)


def relative(ours, wanted) -> float:
    """|ours - wanted| / |wanted| over all leaves of two trees."""
    pairs = list(zip(jax.tree.leaves(ours), jax.tree.leaves(wanted), strict=True))
    squares = [(np.sum((np.float64(a) - np.float64(b)) ** 2), np.sum(np.float64(b) ** 2)) for a, b in pairs]
    return float(np.sqrt(sum(top for top, _ in squares) / sum(bottom for _, bottom in squares)))


def kernels(crops: int = 64, heads: int = 12, width: int = 64) -> list[dict]:
    """Errors and times of attention, forward and backward, by length. Errors are relative to float32 on the same bf16
    inputs."""
    half, single = Precision.from_names("bfloat16"), Precision()
    rows = []
    for tokens in LENGTHS:
        keys = jax.random.split(jax.random.key(tokens), 4)
        padding = [(0, 0), (0, attention.padded_length(tokens) - tokens), (0, 0), (0, 0)]
        query, key, value, weight = (jax.random.normal(k, (crops, tokens, heads, width), jnp.bfloat16) for k in keys)

        def fused(q, k, v):
            # not zeros, to test that padding is masked
            q, k, v = (jnp.pad(x, padding, constant_values=3.0) for x in (q, k, v))
            return attention._fused(q, k, v, tokens)[:, :tokens]

        def plain(precision):
            return lambda q, k, v: attention._mix(q, k, v, precision)

        def both(function):
            def loss(q, k, v):
                out = function(q, k, v)
                return jnp.sum(out.astype(jnp.float32) * weight.astype(jnp.float32)), out

            return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))

        wide = [x.astype(jnp.float32) for x in (query, key, value)]
        wanted = jax.device_get(both(plain(single))(*wide))
        row = {"tokens": tokens}
        for name, function in (("cudnn", fused), ("xla", plain(half))):
            run = both(function)
            grads, out = jax.device_get(run(query, key, value))
            row[f"{name}_output_error"] = relative(out, wanted[1])
            row[f"{name}_gradient_error"] = relative(grads, wanted[0])
            row[f"{name}_microseconds"] = 1e6 * timed(run, query, key, value)
        rows.append(row)
    return rows


def gradients() -> dict:
    """Relative error of the gradients of the whole loss, compared with float32, for a ViT-B of four blocks."""
    found = {}
    for name, settings in {
        "float32": {"precision": "float32"}, "cudnn": {"model.attention": "cudnn"}, "xla": {"model.attention": "xla"},
    }.items():  # fmt: skip
        config = configs.load("configs/pera_vitb16.py")
        config.update_from_flattened_dict(
            {"batch_size": 4, "model.depth": 4, "pera.heads.prototypes": 4096, "drop_path.rate": 0.0,
             "drop_path.group": 4, "pera.loss.koleo_group": 4} | settings
        )  # fmt: skip
        program = Program(config)
        objective = program.objective
        crops = batches.random(objective, config.batch_size, np.random.default_rng(0))
        params = objective.init(jax.random.key(0))
        teacher = {key: params[key] for key in objective.teacher_keys}

        def loss(params, crops, objective=objective, teacher=teacher, hyper=program.hyper):
            rngs = Streams.at(0, "step", 0)
            examples, context = objective.prepare(rngs, crops), Context(rngs, hyper)
            return objective.loss(params, teacher, objective.init_state(), examples, context)[0]

        found[name] = jax.device_get(jax.jit(jax.value_and_grad(loss))(params, crops))
    return {
        name: {"loss": float(found[name][0]), "gradient_error": relative(found[name][1], found["float32"][1])}
        for name in ("cudnn", "xla")
    } | {"float32": {"loss": float(found["float32"][0])}}


def program_of(row) -> Program:
    batch, remat, kernel, scan, prototypes = row
    config = configs.load("configs/pera_vitb16.py")
    config.update_from_flattened_dict(
        {"batch_size": batch, "model.remat": remat, "model.attention": kernel, "model.scan": scan,
         "pera.heads.prototypes": prototypes}
    )  # fmt: skip
    return Program(config, jax.devices()[:1])


class Table:
    """The steps of `TABLE`, compiled and timed one after the other, so that autotuning does not disturb a
    measurement."""

    def __init__(self):
        self.programs, self.compiled = {}, {}
        self.state, self.prototypes = None, None

    def compile(self, row) -> float:
        """Compiles a row; returns the seconds this took."""
        began = time.monotonic()
        self.programs[row] = program_of(row)
        self.compiled[row] = self.programs[row].trace().lower().compile()
        return time.monotonic() - began

    def run(self, row, calls=None, before=lambda: None) -> float:
        """Seconds per step; with `calls`, runs that many steps after one warmup step and `before()`, and returns 0."""
        program, compiled = self.programs[row], self.compiled[row]
        if self.prototypes != row[-1]:
            self.state = None
            self.state = steps.init_sharded(program.objective, program.optimizer, program.mesh, 0)
            self.prototypes = row[-1]
        noise = batches.random(program.objective, program.config.batch_size, np.random.default_rng(0))
        batch = jax.device_put(noise, jax.sharding.NamedSharding(program.mesh, sharding.BATCH))

        def step():
            self.state, metrics = compiled(self.state, batch, program.hyper)
            return metrics

        with jax.set_mesh(program.mesh):
            if calls is None:
                return timed(step, seconds=4.0)
            jax.block_until_ready(step())
            before()
            for _ in range(calls):
                jax.block_until_ready(step())
            return 0.0

    def measure(self, row) -> dict:
        batch, remat, kernel, scan, prototypes = row
        result = dict(batch=batch, remat=remat, attention=kernel, scan=scan, prototypes=prototypes)
        try:
            compiling = self.compile(row)
            result["attention"] = self.programs[row].objective.encoder.attention
            seconds = self.run(row)
        except jax.errors.JaxRuntimeError as error:
            self.state = self.prototypes = None
            return result | {"failed": first_line(error)}
        program, compiled = self.programs[row], self.compiled[row]
        chip = chips.chip_of(jax.devices()[0].device_kind)
        work = sum(program.objective.flops_per_image().values()) * batch
        memory = memory_of(compiled)
        return result | {
            "milliseconds": 1e3 * seconds, "images_per_second": batch / seconds,
            "mfu": work / seconds / chip.peak_flops if chip else None,
            "state_gib": memory.arguments / 2**30, "temporaries_gib": memory.temporaries / 2**30,
            "compiled_in_s": compiling,
        }  # fmt: skip


def largest_kernels(table: Table, row, number: int = 10) -> list[dict]:
    """The kernels that take most time in three traced steps: name, ms per step, calls per step, share."""
    calls = 3
    with tempfile.TemporaryDirectory() as folder:
        table.run(row, calls, before=lambda: jax.profiler.start_trace(folder))
        jax.profiler.stop_trace()
        (path,) = pathlib.Path(folder).rglob("*.trace.json.gz")
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    processes = {e["pid"]: e["args"]["name"] for e in events if e.get("name") == "process_name"}
    threads = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e.get("name") == "thread_name"}
    spent, count = collections.Counter(), collections.Counter()
    for event in events:
        if event.get("ph") == "X" and "GPU" in processes.get(event["pid"], ""):
            if "Stream" in threads.get((event["pid"], event["tid"]), ""):
                operation = event.get("args", {}).get("tf_op") or event.get("args", {}).get("hlo_op", "")
                name = event["name"][:70], operation.split("jit(step)/")[-1][:90]
                spent[name] += event["dur"]
                count[name] += 1
    whole = sum(spent.values())
    return [
        {"kernel": name[0], "operation": name[1], "milliseconds": time_ / 1e3 / calls, "calls": count[name] / calls,
         "share": time_ / whole} for name, time_ in spent.most_common(number)
    ]  # fmt: skip


def show(rows: list[dict]) -> None:
    def text(value):
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names, *([text(row.get(name, "")) for name in names] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    for line in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--parts", default=",".join(PARTS), help=f"comma-separated list of {', '.join(PARTS)} (default: all)"
    )
    parser.add_argument("--rows", type=int, default=len(TABLE), help="number of rows of the table of steps to measure")
    parser.add_argument(
        "--seconds", type=float, default=480, help="start no new measurement after this time (default: 480)"
    )
    parser.add_argument("--json", type=pathlib.Path, help="also write the numbers to this file, after each part")
    options = parser.parse_args()
    parts = options.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        raise UserError(f"unknown --parts {', '.join(sorted(unknown))}; expected any of {', '.join(PARTS)}")
    began = time.monotonic()
    deadline = began + options.seconds
    result = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}

    def done(part, value):
        result[part] = value
        print(f"\n{part}, after {time.monotonic() - began:.0f} s")
        show(value if isinstance(value, list) else [{"": name} | each for name, each in value.items()])
        if options.json:
            files.write_json(options.json, result)

    print(f"{result['device']}, jax {result['jax']}", flush=True)
    refusal = attention.cudnn_refusal(Precision.from_names("bfloat16"), 64, jax.devices()[0])
    print(f"attention by cuDNN: {refusal or 'yes'}", flush=True)
    if "kernels" in parts and not refusal:
        done("kernels", kernels())
    if "gradients" in parts and not refusal:
        done("gradients", gradients())
    rows = TABLE[: options.rows] if "steps" in parts else TABLE[: int("profile" in parts)]
    table, measured = Table(), []
    for row in rows:
        if time.monotonic() > deadline:
            break
        measured.append(table.measure(row))
        if "profile" in parts and "failed" not in measured[0] and len(measured) == 1:
            done("profile", largest_kernels(table, row))
        show(measured[-1:])
        if options.json:
            files.write_json(options.json, result | {"steps": measured})
    if measured:
        done("steps", measured)
        print("".join(f"skipped, out of time: {row}\n" for row in rows[len(measured) :]), end="")


if __name__ == "__main__":
    errors.run(main)
