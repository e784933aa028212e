"""The dictionary of the authors' PyTorch program (arXiv:2505.19447): its names, and its sizes.

`student.backbone.*`, `student.cls_head.*`, `teacher.*` alike, `pred_head.*` (the pixel head) and `s_mask_token`. The
backbones have timm's names. The centre of the teacher's outputs is not in it, and neither are the bands and what is done to
their values: those lie beside it, in NAME.json, with the SHA-256 of the file.
"""

import dataclasses
import hashlib
import io
import pathlib
from typing import Any, Literal

import jax
import numpy as np

from pera_jax.common import digests, files, json_files, owned
from pera_jax.common.errors import UserError
from pera_jax.common.json_files import Finite, Name, Positive
from pera_jax.encoder import load
from pera_jax.formats import tables
from pera_jax.formats.tables import Entry, backbone, linear
from pera_jax.training.checkpoints import checkpoint


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
    """`config.heads` of a dictionary; where an array has no first axis to tell a size, 1. Raises KeyError where neither
    network has an array that tells one."""
    sizes = {"hidden": "mlp.0.weight", "bottleneck": "mlp.4.weight", "prototypes": "last_layer.weight_v"}
    heads = {name.removeprefix("student.cls_head."): each for name, each in arrays.items()}
    heads = {name.removeprefix("teacher.cls_head."): each for name, each in arrays.items()} | heads
    return {field: (*heads[name].shape, 1)[0] or 1 for field, name in sizes.items()}


@dataclasses.dataclass(frozen=True)
class _Beside:
    """What NAME.json says of a dictionary NAME."""

    format_version: int
    sha256: str
    heads: Positive
    bands: list[Name]
    dtype: Literal["uint8", "uint16", "float32"]
    ranges: list[tuple[Finite, Finite]]
    mean: list[Finite]
    std: list[Finite]
    digest: str  # of all other fields


def place_beside(file: pathlib.Path) -> pathlib.Path:
    """The file of what a dictionary does not tell."""
    return file.with_name(f"{file.name}.json")


def beside(file: pathlib.Path, verify: bool = True) -> dict[str, Any]:
    """What `export` has written beside a dictionary: `heads`, `bands`, `dtype`, `ranges`, `mean`, `std`; nothing without.

    Raises:
      UserError: it is damaged, or of another file.
    """
    place = place_beside(file)
    if not place.is_file():
        return {}
    mend = f"export {file.name} anew, or remove {place.name} and give --bands, --mean and --std"
    found = dataclasses.asdict(json_files.read(place, _Beside, mend))
    if digests.of_json({name: value for name, value in found.items() if name != "digest"}) != found["digest"]:
        raise UserError(f"{place} is damaged: it is not what was exported; {mend}")
    if verify and digests.of_file(file) != found["sha256"]:
        raise UserError(f"{file} is damaged, or {place.name} beside it is of another file; {mend}")
    listed = {name: tuple(found[name]) for name in ("bands", "ranges", "mean", "std")}
    return {"heads": found["heads"], "dtype": found["dtype"]} | listed


def export(run: str, step: int | None, output: pathlib.Path, verify: bool = True) -> int:
    """Writes {"model": the dictionary} of a run's checkpoint for torch.load, and what is beside it; returns the step.

    Each file is there whole or not at all.

    Raises:
      UserError: no such run or step, one without a student, a file that cannot be written, or is there and holds other
        values; PyTorch is not installed.
    """

    def both(chosen: int) -> list[load.Weights]:
        return [load.load_weights(run, chosen, which, verify=verify) for which in ("student", "teacher")]

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
    owned.check(place_beside(output))
    meta = teacher.meta
    told = _Beside(
        1, hashlib.sha256(content.getvalue()).hexdigest(), shape["heads"], meta["bands"], meta["dtype"],
        [(float(low), float(high)) for low, high in meta["ranges"]],
        [float(value) for value in meta["mean"]], [float(value) for value in meta["std"]], "",
    )  # fmt: skip
    described = {name: value for name, value in dataclasses.asdict(told).items() if name != "digest"}
    try:
        place_beside(output).unlink(missing_ok=True)  # of a dictionary that was there
        files.write(output, content.getvalue())
        files.write(place_beside(output), owned.json_text(described | {"digest": digests.of_json(described)}))
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror}; make room or choose another --output") from error
    return teacher.step
