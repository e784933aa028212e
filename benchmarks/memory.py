"""Memory saved by disjoint masks: compares the step of PerA with one on dense inputs.

    python benchmarks/memory.py --topology v5e:4x4                        # ViT-B/16 at 448 px, bf16
    python benchmarks/memory.py --topology local --config configs/demo.py --batches 8 16

Compiles the step for each row with both numbers of images per chip in `--batches`, to separate memory per image from
constant memory. Nothing is run. In the dense variant, both networks see all patches of the same crops; without masks
there are no learnable tokens and no pixel loss. Networks, heads, the other losses and drop path are the same.
A TPU topology needs libtpu (the extra `tpu`).
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

CHIPS = (16, 32, 80)  # GB of memory per chip, for the largest batch
_GB, _GIB = 1e9, 2**30


class Dense(PerA):
    """PerA without masks: both networks see every patch of every crop."""

    def outputs(self, params, teacher, views, drop_path):
        tokens = {"teacher": [], "student": []}
        for name, tree in (("teacher", teacher), ("student", params)):
            tokens, views = jax.lax.optimization_barrier((tokens, views))  # one network after the other, as in PerA
            for kind, view in views.items():
                depth = drop_path[kind] if drop_path and name == "student" else None
                token = self.encoder.apply({"params": tree["backbone"]}, getattr(view, name), drop_path=depth)[
                    "class_token"
                ]
                tokens[name].append(rearrange(token, "(b v) d -> b v d", v=self.crops[kind].number))
        student, teacher = (
            prototypes.Prototypes(
                *self.prototype_head.apply({"params": tree["prototype_head"]}, jnp.concatenate(x, axis=1))
            )
            for tree, x in ((params, tokens["student"]), (teacher, tokens["teacher"]))
        )
        teacher, class_tokens = jax.lax.stop_gradient((teacher, jnp.concatenate(tokens["teacher"], axis=1)))
        return student, teacher, self.pixel_targets(None), class_tokens

    def pixel_targets(self, view):
        return jnp.zeros((1, 1, 1))  # nothing is predicted


def dense(config, bands, device=None):
    objective = PerA.from_config(config, bands, device)
    return Dense(**{field.name: getattr(objective, field.name) for field in dataclasses.fields(objective)})


def measure(config, devices, batches: tuple[int, int], make) -> dict:
    """Memory of the step per device for two batch sizes, and a linear fit; "refused" if the compiler ran out of
    memory."""
    trials = [plan.compile_step(config, devices, images, make) for images in batches]
    for trial in trials:
        if not trial.text:  # the size in the error is after memory reduction, so it is not comparable
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
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="override a config field")
    parser.add_argument("--topology", default="local", help="TPU topology such as v5e:4x4, or local (default: local)")
    parser.add_argument("--batches", type=int, nargs=2, default=(16, 32), help="images per chip (default: 16 32)")
    parser.add_argument("--remat", nargs="+", default=("none", "dots", "block"), help="remat policies (default: all)")
    parser.add_argument("--json", type=pathlib.Path, help="also write the numbers to this file, row by row")
    arguments = parser.parse_args()
    devices = plan.devices_of(arguments.topology)
    rows = []
    print(f"{arguments.config} on {arguments.topology}, {arguments.batches[1]} images per chip; GB = 1e9 bytes\n")
    print(f"{'input':8}{'remat':8}{'state':>10}{'temporaries':>13}{'per image':>11}   largest batch on "
          + ", ".join(f"{chip} GB" for chip in CHIPS))  # fmt: skip
    for name, make in (("PerA", PerA.from_config), ("dense", dense)):
        for remat in arguments.remat:
            config = configs.load(arguments.config, [*arguments.set, f"model.remat={remat}"])
            began = time.perf_counter()
            row = {"input": name, "remat": remat} | measure(config, devices, tuple(arguments.batches), make)
            rows.append(row)
            duration = f"({time.perf_counter() - began:.0f} s)"
            if "refused" in row:
                needed = f", {row['wanted'] / _GB:.1f} GB needed" if row["wanted"] else ""
                print(
                    f"{name:8}{remat:8}out of memory for {row['refused']} images per chip{needed}   {duration}",
                    flush=True,
                )
            else:
                largest = ", ".join(f"{images:,}" for images in row["largest"].values())
                print(
                    f"{name:8}{remat:8}{row['arguments'] / _GB:7.2f} GB{row['temporaries'] / _GB:10.2f} GB"
                    f"{row['per_image'] / 1e6:8.1f} MB   {largest}   {duration}", flush=True
                )  # fmt: skip
            if arguments.json:
                files.write_json(arguments.json, rows)


if __name__ == "__main__":
    errors.run(main)
