"""What disjoint masks save: memory of a training step as PerA, and with dense inputs.

    python benchmarks/memory.py --topology v5e:4x4                        # ViT-B/16 at 448 px, bf16
    python benchmarks/memory.py --topology local --config configs/demo.py --batches 8 16

Compiles the step twice for each row, for the two `--batches` of images a chip, so that what each image costs is told
apart from what does not grow; nothing is run. "Dense": both networks see all patches of the same crops; there are no masks,
hence no learnable tokens and no pixel term. Networks, heads, the other terms and stochastic depth are the same.
A topology that is not there needs libtpu (the extra `tpu`).
"""

import argparse
import dataclasses
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
from einops import rearrange

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from pera_jax import config as configs  # noqa: E402
from pera_jax import plan
from pera_jax.common import errors, files  # noqa: E402
from pera_jax.losses import prototypes
from pera_jax.objectives.pera import PerA  # noqa: E402

CHIPS = (16, 32, 80)  # GB of memory of chips of today, for the largest batch
_GB, _GIB = 1e9, 2**30


class Dense(PerA):
    """PerA without masks: both networks see every patch of every crop."""

    def outputs(self, params, teacher, views, drop_path):
        tokens = {"teacher": [], "student": []}
        for name, tree in (("teacher", teacher), ("student", params)):
            tokens, views = jax.lax.optimization_barrier((tokens, views))  # one network after the other, as PerA
            for kind, view in views.items():
                depth = drop_path[kind] if drop_path and name == "student" else None
                seen = self.encoder.apply({"params": tree["backbone"]}, getattr(view, name), drop_path=depth)["class_token"]
                tokens[name].append(rearrange(seen, "(b v) d -> b v d", v=self.crops[kind].number))
        student, teacher = (
            prototypes.Prototypes(*self.prototype_head.apply({"params": tree["prototype_head"]}, jnp.concatenate(x, axis=1)))
            for tree, x in ((params, tokens["student"]), (teacher, tokens["teacher"]))
        )
        teacher, aligned = jax.lax.stop_gradient((teacher, jnp.concatenate(tokens["teacher"], axis=1)))
        return student, teacher, self.pixel_targets(None), aligned

    def pixel_targets(self, view):
        return jnp.zeros((1, 1, 1))  # nothing is guessed


def dense(config, bands, device=None):
    objective = PerA.from_config(config, bands, device)
    return Dense(**{field.name: getattr(objective, field.name) for field in dataclasses.fields(objective)})


def measure(config, devices, batches: tuple[int, int], make) -> dict:
    """Bytes of the step on a device for two batches, and what follows from them; "refused" where a batch found no room."""
    trials = [plan.compile_step(config, devices, images, make) for images in batches]
    for trial in trials:
        if not trial.text:  # what the compiler says it wanted is after it gave up on speed, and not to be compared
            return {"refused": trial.per_device, "wanted": trial.memory.temporaries if trial.memory else None}
    small, large = (trial.memory for trial in trials)
    each = (large.temporaries - small.temporaries) / (batches[1] - batches[0])
    fixed = large.total - each * batches[1]
    return {
        "arguments": large.arguments, "temporaries": large.temporaries, "per_image": each, "fixed": fixed,
        "largest": {str(chip): max(int((chip * _GB - fixed) / each), 0) for chip in CHIPS},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/pera_vitb16.py")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="changes a config field")
    parser.add_argument("--topology", default="local", help="v5e:4x4, ... or local (default)")
    parser.add_argument("--batches", type=int, nargs=2, default=(16, 32), help="images a chip (default: 16 32)")
    parser.add_argument("--remat", nargs="+", default=("none", "dots", "block"), help="policies (default: all)")
    parser.add_argument("--json", type=pathlib.Path, help="file to write the numbers to, row by row")
    arguments = parser.parse_args()
    devices = plan.devices_of(arguments.topology)
    rows = []
    print(f"{arguments.config} on {arguments.topology}, {arguments.batches[1]} images a chip; GB = 1e9 bytes\n")
    print(f"{'input':8}{'remat':8}{'state':>10}{'temporaries':>13}{'per image':>11}   largest batch on "
          + ", ".join(f"{chip} GB" for chip in CHIPS))  # fmt: skip
    for name, make in (("PerA", PerA.from_config), ("dense", dense)):
        for remat in arguments.remat:
            config = configs.load(arguments.config, [*arguments.set, f"model.remat={remat}"])
            began = time.perf_counter()
            row = {"input": name, "remat": remat} | measure(config, devices, tuple(arguments.batches), make)
            rows.append(row)
            said = f"({time.perf_counter() - began:.0f} s)"
            if "refused" in row:
                wanted = f": it wanted {row['wanted'] / _GB:.1f} GB" if row["wanted"] else ""
                print(f"{name:8}{remat:8}no room for {row['refused']} images a chip{wanted}   {said}", flush=True)
            else:
                largest = ", ".join(f"{images:,}" for images in row["largest"].values())
                print(
                    f"{name:8}{remat:8}{row['arguments'] / _GB:7.2f} GB{row['temporaries'] / _GB:10.2f} GB"
                    f"{row['per_image'] / 1e6:8.1f} MB   {largest}   {said}", flush=True
                )  # fmt: skip
            if arguments.json:
                files.write_json(arguments.json, rows)


if __name__ == "__main__":
    errors.run(main)
