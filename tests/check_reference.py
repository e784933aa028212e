"""Checks the program against numbers computed by the official program of each method.

    python tests/check_reference.py FILE.npz [FILE.npz ...]

Each file holds initial parameters, and for some steps the inputs, masks, outputs, losses and gradients, then the final
parameters and features of whole images; its `meta` names the method (none: PerA). The program's own model, losses,
optimizer and moving average run from the file's initial values through all its steps in float32, on one device. Where
batch and prototypes divide, they run again in float64 on 1, 2 and 4 virtual devices, which must agree to 1e-9. Exit
status 1 when a relative error passes its bound.
"""

import importlib
import json
import os
import pathlib
import sys

if __name__ == "__main__":
    # Steps of so small networks take milliseconds, and optimizing them takes most of the compilation time.
    fast = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {fast} --xla_force_host_platform_device_count=4"
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ["NPROC"] = "32"  # fewer threads than virtual devices would deadlock
sys.path[:0] = [str(pathlib.Path(__file__).resolve().parent), str(pathlib.Path(__file__).resolve().parent.parent)]

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from references.base import Reference  # noqa: E402

from pera_jax.common.errors import UserError  # noqa: E402
from pera_jax.parallel import sharding  # noqa: E402
from pera_jax.training import step as steps  # noqa: E402

GRADIENT, CHANGE, DEVICES = 1e-4, 1e-3, 1e-9
MESHES = {1: {}, 2: dict(data=1, fsdp=2), 4: dict(data=2, fsdp=2)}


class Table:
    """Collects rows (quantity, largest absolute error, that relative to the largest value, bound) and prints them."""

    def __init__(self):
        self.rows = []

    def add(self, name: str, ours, theirs, bound: float):
        ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
        if ours.shape != theirs.shape:
            raise SystemExit(f"{name}: ours has shape {ours.shape}, the file {theirs.shape}")
        error = np.abs(ours - theirs).max(initial=0.0)  # there may be no masked patch
        largest = np.abs(theirs).max(initial=0.0)
        # NaN must not pass: max() keeps it, and `not (nan <= bound)` is true.
        relative = error / largest if largest > 0 else (0.0 if error == 0 else np.inf)
        self.rows.append((name, error, relative, bound))

    def failed(self) -> list[str]:
        return [name for name, _, relative, bound in self.rows if not relative <= bound]

    def show(self):
        width = max(len(row[0]) for row in self.rows)
        print(f"{'quantity':{width}}  {'abs error':>10}  {'rel error':>10}  {'bound':>8}")
        for name, error, relative, bound in self.rows:
            mark = "" if relative <= bound else "  <-- too large"
            print(f"{name:{width}}  {error:10.2e}  {relative:10.2e}  {bound:8.0e}{mark}")


def load(path: str, precision: str = "float32") -> Reference:
    arrays = dict(np.load(path))
    meta = json.loads(str(arrays["meta"]))
    module = importlib.import_module(f"references.{meta.get('method', 'pera')}")
    return module.Reference(arrays, meta, precision)


def run(file: Reference, devices: int):
    """All steps of a file: yields (outputs, metrics, gradients, state after the step) on the host."""
    objective = file.objective
    optimizer = steps.make_optimizer(objective, file.config.optimizer)
    mesh = sharding.make_mesh(**MESHES[devices], devices=jax.devices()[:devices])

    def step(state, examples, scalars):
        outputs = file.outputs(state.params, state.teacher, state.objective, examples, scalars)
        grad_fn = jax.grad(file.loss, has_aux=True)
        grads, aux = grad_fn(state.params, state.teacher, state.objective, examples, scalars)
        after, metrics = objective.update(state.objective, aux)
        state, norms = steps.apply_gradients(
            state, grads, objective, after, scalars, optimizer, file.config.optimizer
        )
        return state, outputs, metrics | norms, grads

    with jax.set_mesh(mesh):
        state = file.initial(optimizer)
        where = sharding.tree_shardings(state, mesh, steps.sharding_rules(objective))
        state, compiled = jax.device_put(state, where), jax.jit(step, out_shardings=(where, None, None, None))
        batch = jax.sharding.NamedSharding(mesh, sharding.BATCH)
        for n in range(file.number_of_steps):
            scalars = {name: np.asarray(value, objective.precision.wide) for name, value in file.scalars(n).items()}
            before = state.objective
            state, *found = compiled(state, jax.device_put(file.examples(n), batch), scalars)
            yield jax.device_get((*found, before, state))


def check(path: str) -> Table:
    """Runs one file on one device in float32 and returns the table of errors."""
    file = load(path)
    return compare(file, list(run(file, 1)))


def compare(file: Reference, found: list) -> Table:
    """The table of errors of `found`, the results of `run` in float32."""
    table = Table()
    for n, (outputs, metrics, grads, before, state) in enumerate(found):
        for name, ours in outputs.items():
            bound = file.LOSS if name.startswith("loss/") else file.OUTPUT
            table.add(f"step{n}/{name}", file.arranged(n, name, ours), file.arrays[f"step{n}/{name}"], bound)
        ours = file.losses(metrics)
        for name, theirs in file.of(f"step{n}/loss/").items():
            if f"loss/{name}" not in outputs:
                table.add(f"step{n}/loss/{name}", ours[name], theirs, file.LOSS)
        for name, value in before.items():
            table.add(f"step{n}/{name}_before", value, file.arrays[f"step{n}/{name}_before"].reshape(-1), file.OUTPUT)
        for name, gradient in file.official(params=grads).items():
            if f"step{n}/grad/{name}" in file.arrays and name not in file.SKIPPED:
                table.add(f"step{n}/grad/{name}", gradient, file.arrays[f"step{n}/grad/{name}"], GRADIENT)
        table.add(f"step{n}/grad_norm", metrics["norm/gradient"], file.arrays[f"step{n}/grad_norm"], GRADIENT)

    for name, final in file.official(params=state.params, teacher=state.teacher).items():
        if name not in file.SKIPPED and f"final/{name}" in file.arrays:
            start, theirs = file.arrays[f"init/{name}"], file.arrays[f"final/{name}"]
            table.add(f"change of {name}", np.float64(final) - start, np.float64(theirs) - start, CHANGE)
    for name, theirs in file.objective_state("final/").items():
        table.add(f"final/{name}", state.objective[name], theirs, file.OUTPUT)
    compare_features(file, table)
    return table


def compare_features(file: Reference, table: Table) -> None:
    final = file.tree("final/")
    features = jax.jit(lambda params, images: file.objective.encoder.apply({"params": params}, images))
    networks = {"student": final["params"]} | ({"teacher": final["teacher"]} if "teacher" in final else {})
    for size in ("same", "other"):
        if f"eval/{size}/image" not in file.arrays:
            continue
        images = jnp.asarray(file.arrays[f"eval/{size}/image"].transpose(0, 2, 3, 1))
        for network, params in networks.items():
            ours = features(params["backbone"], images)
            for name, token in (("cls", "class_token"), ("patch", "patch_tokens")):
                key = f"eval/{size}/{network}_{name}"
                table.add(key, ours[token], file.arrays[key], file.OUTPUT)


def check_devices(path: str) -> Table:
    """Runs one file in float64 on 1, 2 and 4 devices, where its batch divides, and compares losses and final state."""
    table = Table()
    with jax.enable_x64(True):
        file = load(path, "float64")
        counts = [count for count in MESHES if file.fits(count) and count <= len(jax.devices())]
        found = {count: list(run(file, count)) for count in counts} if len(counts) > 1 else {}
        for count in counts[1:]:
            for n, (one, other) in enumerate(zip(found[1], found[count], strict=True)):
                table.add(f"{count} devices: step{n}/loss/total", other[1]["loss"], one[1]["loss"], DEVICES)
            one, other = found[1][-1][-1], found[count][-1][-1]
            for network in ("params", "teacher", "objective"):
                pairs = zip(
                    jax.tree_util.tree_leaves_with_path(getattr(one, network)),
                    jax.tree.leaves(getattr(other, network)),
                    strict=True,
                )
                for (key, value), ours in pairs:
                    name = f"{count} devices: final {network}/{sharding.path_of(key)}"
                    if not any(skipped in name for skipped in file.SKIPPED):
                        table.add(name, ours, value, DEVICES)
    return table


def main():
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    bad = 0
    for path in sys.argv[1:]:
        print(f"== {path}")
        try:
            table, devices = check(path), check_devices(path)
        except UserError as error:
            print(f"{path}: FAILED: {error}")
            bad += 1
            continue
        table.show()
        failed = [*table.failed(), *devices.failed()]
        bad += bool(failed)
        largest = max((row[2] for row in devices.rows), default=0.0)
        if devices.rows:
            print(f"several devices in float64: {len(devices.rows)} quantities, largest relative error {largest:.1e}")
        else:
            print("several devices: not tried, batch or prototypes do not divide")
        print(f"{path}: {'FAILED: ' + ', '.join(failed) if failed else f'all {len(table.rows)} quantities agree'}")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
