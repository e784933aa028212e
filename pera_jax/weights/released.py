"""The dictionary of the authors' PyTorch program (arXiv:2505.19447): its names, and its sizes.

`student.backbone.*`, `student.cls_head.*`, `teacher.*` alike, `pred_head.*` (the pixel head) and `s_mask_token`. The
backbones have timm's names. The centre of the teacher's outputs is not in it.
"""

import io
import pathlib
from typing import Any

import jax
import numpy as np

from pera_jax import checkpoint, files
from pera_jax.common import owned
from pera_jax.errors import UserError
from pera_jax.weights import tables
from pera_jax.weights.tables import Entry, backbone, linear


def _head(mlp: str, last: str, path: tuple[str, ...]) -> list[Entry]:
    """The entries of a head whose MLP is called `mlp` and whose weight-normalised layer is called `last`."""
    layers = zip((0, 2, 4), ("hidden_1", "hidden_2", "bottleneck"))
    return [
        *(entry for number, layer in layers for entry in linear(f"{mlp}.{number}", (*path, layer))),
        Entry(f"{last}.weight_v", (*path, "direction"), "k d", "k d"),
        Entry(f"{last}.weight_g", (*path, "gain"), "k", "k 1"),
    ]


def table(depth: int, split: int) -> list[Entry]:
    """Every parameter; paths begin with `params` (the student's) or `teacher`."""
    entries = [Entry("s_mask_token", ("params", "mask_token"), "d", "1 1 d")]
    entries += _head("pred_head.mlp0.mlp", "pred_head.last_layer", ("params", "pixel_head"))
    for network, root in (("student", "params"), ("teacher", "teacher")):
        entries += backbone(f"{network}.backbone.", (root, "backbone"), depth, split)
        head = f"{network}.cls_head"
        entries += _head(f"{head}.mlp", f"{head}.last_layer", (root, "prototype_head"))
    return entries


def head_sizes(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """`config.heads` of a dictionary that has all names; where an array has no first axis to tell a size, 1."""
    sizes = {"hidden": "mlp.0.weight", "bottleneck": "mlp.4.weight", "prototypes": "last_layer.weight_v"}
    return {field: (*arrays[f"student.cls_head.{name}"].shape, 1)[0] or 1 for field, name in sizes.items()}


def export(run: str, step: int | None, output: pathlib.Path) -> int:
    """Writes {"model": the dictionary} of a run's checkpoint for torch.load, whole or not at all; returns the step.

    Raises:
      UserError: no such run or step, one without a student, a file that cannot be written, or is there and holds other
        values; PyTorch is not installed.
    """

    def both(chosen: int) -> list[checkpoint.Weights]:
        return [checkpoint.load_weights(run, chosen, which) for which in ("student", "teacher")]

    student, teacher = checkpoint.while_kept(run, step, both)
    try:
        import torch
    except ImportError as error:
        raise UserError(f"writing {output} needs PyTorch; pip install pera_jax[torch], or pip install torch") from error
    shape = teacher.meta["model"]
    tree = jax.tree.map(np.asarray, {"params": student.params, "teacher": teacher.params})
    named = tables.to_named(tree, table(shape["depth"], shape["split"]), shape["heads"], shape["patch"])
    content = io.BytesIO()
    torch.save({"model": {name: torch.from_numpy(np.array(array)) for name, array in named.items()}}, content)
    owned.check(output, lambda file: file.read_bytes() == content.getvalue())  # the authors' own files look the same
    try:
        files.write(output, content.getvalue())
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror}; make room or choose another --output") from error
    return teacher.step
