"""Checks the program against numbers computed by the authors' released program.

    python tests/check_reference.py FILE.npz [FILE.npz ...]

Each file holds initial parameters, and for some steps the inputs, masks, outputs, losses and gradients, then the final
parameters and features of whole images. The program's own model, losses, optimizer and moving average run from the
file's initial values through all its steps in float32. Exit status 1 when a relative error passes its bound.
"""

import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from einops import rearrange  # noqa: E402

from pera_jax import config as configs  # noqa: E402
from pera_jax.bands import RGB, Bands  # noqa: E402
from pera_jax.formats import tables
from pera_jax.objectives.pera import masks as masking  # noqa: E402
from pera_jax.objectives.pera import objective as pera  # noqa: E402
from pera_jax.objectives.pera.views import Views  # noqa: E402
from pera_jax.training import step as steps  # noqa: E402
from pera_jax.weights import released  # noqa: E402

OUTPUT, GRADIENT, CHANGE = 5e-5, 1e-4, 1e-3


class Table:
    """Collects rows (quantity, largest absolute error, that relative to the largest value, bound) and prints them."""

    def __init__(self):
        self.rows = []

    def add(self, name: str, ours, theirs, bound: float, scale=None):
        ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
        if ours.shape != theirs.shape:
            raise SystemExit(f"{name}: ours has shape {ours.shape}, the file {theirs.shape}")
        error = np.abs(ours - theirs).max()
        largest = np.abs(theirs if scale is None else scale).max()
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


class Reference:
    """One file, and our objective and optimizer of the same sizes."""

    def __init__(self, path: str):
        self.arrays = dict(np.load(path))
        self.meta = json.loads(str(self.arrays["meta"]))
        cfg = self.meta["cfg"]
        self.batch, self.numbers = cfg["b"], {"global": cfg["ng"], "local": cfg["nl"]}
        self.steps = sum(f"step{n}/loss/total" in self.arrays for n in range(len(self.meta["temps"])))
        bands = self.arrays["step0/in/S_global_crops"].shape[1]

        config = configs.default()
        config.precision = "float32"
        config.model.update(dict(width=cfg["dim"], depth=cfg["depth"], heads=cfg["heads"], patch=cfg["patch"]))
        hidden = self.arrays["init/student.backbone.blocks.0.mlp.fc1.weight"].shape[0]
        config.model.mlp_ratio = hidden / cfg["dim"]
        config.pera.heads.update(dict(hidden=cfg["hid"], bottleneck=cfg["bot"], prototypes=cfg["k"]))
        config.crops.update(dict(global_size=cfg["global_size"], local_size=cfg["local_size"]))
        config.crops.update(dict(global_number=cfg["ng"], local_number=cfg["nl"]))
        config.pera.masks.update(dict(student=cfg["s"], teacher=cfg["t"]))
        config.pera.loss.koleo_group = 0
        config.optimizer.clip_norm = self.meta["clip"]
        config.optimizer.beta1, config.optimizer.beta2 = self.meta["betas"]
        config.optimizer.eps = self.meta["eps"]
        self.config = config
        self.objective = pera.PerA.from_config(config, Bands.plain(RGB[:bands], mean=0.0, std=1.0))
        self.optimizer = steps.make_optimizer(self.objective, config.optimizer)
        self.entries = released.table(cfg["depth"], self.objective.encoder.split)

    def tree(self, prefix: str):
        arrays = {k[len(prefix) :]: v for k, v in self.arrays.items() if k.startswith(prefix)}
        tree = tables.from_named(arrays, self.entries, self.objective.encoder.heads, self.objective.encoder.patch)
        return jax.tree.map(jnp.asarray, tree)

    def released(self, **tree):
        return tables.to_named(tree, self.entries, self.objective.encoder.heads, self.objective.encoder.patch)

    def batch_major(self, array: np.ndarray, kind: str) -> np.ndarray:
        """The file orders rows crop by crop; the program sample by sample."""
        return rearrange(array, "(v b) ... -> (b v) ...", v=self.numbers[kind])

    def views(self, step: int) -> dict[str, Views]:
        result = {}
        for kind, number in self.numbers.items():
            if not number:
                continue
            student, teacher = (
                jnp.asarray(
                    self.batch_major(self.arrays[f"step{step}/in/{n}_{kind}_crops"], kind).transpose(0, 2, 3, 1)
                )
                for n in "ST"
            )
            order = self.batch_major(self.arrays[f"step{step}/mask/{kind}_order"], kind)
            masks = masking.cut(jnp.asarray(np.argsort(order, axis=1), jnp.int32), self.objective.parts[kind])
            # The file lists tokens in raster order.
            result[kind] = Views(student, teacher, jax.tree.map(lambda i: jnp.sort(i, axis=1), masks))
        return result


def check(path: str) -> Table:
    """Runs one file and returns the table of errors."""
    file, table = Reference(path), Table()
    objective, meta = file.objective, file.meta
    init = file.tree("init/")
    state = steps.TrainState(
        jnp.zeros((), jnp.int32), init["params"], init["teacher"], file.optimizer.init(init["params"]),
        objective.init_state() | {"center": jnp.asarray(file.arrays["step0/center_before"][0])},
    )

    @jax.jit
    def gradients(state, views, hyper):
        grad_fn = jax.value_and_grad(objective.loss_on_views, has_aux=True)
        return grad_fn(state.params, state.teacher, state.objective, views, None, hyper)

    @jax.jit
    def update(state, grads, objective_state, hyper):
        return steps.apply_gradients(
            state, grads, objective, objective_state, hyper, file.optimizer, file.config.optimizer
        )

    outputs_of = jax.jit(objective.outputs)
    for n in range(file.steps):
        views = file.views(n)
        hyper = {
            "learning_rate": meta["lrs"][n], "weight_decay": meta["wds"][n],
            "one_minus_momentum": 1 - meta["momenta"][n],
            "teacher_temperature": meta["temps"][n], "student_temperature": 0.1,
        }
        hyper = {k: np.float32(v) for k, v in hyper.items()}
        outputs = outputs_of(state.params, state.teacher, views, None)
        compare_outputs(file, table, n, objective, outputs, views["global"])
        (_, means), grads = gradients(state, views, hyper)
        objective_state, metrics = objective.update(state.objective, means)
        theirs = {k.split("/")[-1]: v for k, v in file.arrays.items() if k.startswith(f"step{n}/loss/")}
        globals_ = file.numbers["global"]
        ours = {
            "total": metrics["loss"], "global_dino_loss": metrics["loss/class_global"],
            "local_dino_loss": metrics["loss/class_local"], "koleo_loss": metrics["loss/koleo"] / globals_,
            "mae_loss": metrics["loss/pixel"] / (100 * globals_),
        }
        for name in theirs:
            table.add(f"step{n}/loss/{name}", ours[name], theirs[name], OUTPUT)
        table.add(f"step{n}/center_before", state.objective["center"], file.arrays[f"step{n}/center_before"][0], OUTPUT)
        for name, gradient in file.released(params=grads).items():
            if f"step{n}/grad/{name}" in file.arrays:
                table.add(f"step{n}/grad/{name}", gradient, file.arrays[f"step{n}/grad/{name}"], GRADIENT)
        state, norms = update(state, grads, objective_state, hyper)
        table.add(f"step{n}/grad_norm", norms["norm/gradient"], file.arrays[f"step{n}/grad_norm"], GRADIENT)

    for name, final in file.released(params=state.params, teacher=state.teacher).items():
        start, theirs = file.arrays[f"init/{name}"], file.arrays[f"final/{name}"]
        table.add(f"change of {name}", np.float64(final) - start, np.float64(theirs) - start, CHANGE)
    table.add("final/center", state.objective["center"], file.arrays["final/center"][0], OUTPUT)
    compare_features(file, table)
    return table


def compare_outputs(file, table, n, objective, outputs, global_views):
    student, teacher, predicted, _ = outputs
    for network, out in (("student", student), ("teacher", teacher)):
        z = objective.precision.logits(out.units, out.weights)  # [B, V, K]
        parts = {"global": z[:, : file.numbers["global"]], "local": z[:, file.numbers["global"] :]}
        for kind, part in parts.items():
            name = f"step{n}/{network}/{kind}_cls_tokens"
            if name in file.arrays:
                table.add(name, rearrange(part, "b v k -> (v b) k"), file.arrays[name], OUTPUT)
    for name, ours in (
        ("global_pred_tokens", predicted),
        ("global_patch_target", objective.pixel_targets(global_views)),
    ):
        theirs = file.batch_major(file.arrays[f"step{n}/student/{name}"], "global")
        table.add(f"step{n}/student/{name}", ours, theirs, OUTPUT)


def compare_features(file, table):
    final = file.tree("final/")
    features = jax.jit(lambda params, images: file.objective.encoder.apply({"params": params}, images))
    for size in ("same", "other"):
        images = jnp.asarray(file.arrays[f"eval/{size}/image"].transpose(0, 2, 3, 1))
        for network, root in (("teacher", "teacher"), ("student", "params")):
            ours = features(final[root]["backbone"], images)
            for name, token in (("cls", "class_token"), ("patch", "patch_tokens")):
                key = f"eval/{size}/{network}_{name}"
                table.add(key, ours[token], file.arrays[key], OUTPUT)


def main():
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    bad = 0
    for path in sys.argv[1:]:
        print(f"== {path}")
        table = check(path)
        table.show()
        failed = table.failed()
        bad += bool(failed)
        print(f"{path}: {'FAILED: ' + ', '.join(failed) if failed else f'all {len(table.rows)} quantities agree'}")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
