"""The state dict of the authors' PyTorch code (arXiv:2505.19447): names and sizes of its arrays.

`student.backbone.*`, `student.cls_head.*`, `teacher.*` alike, `pred_head.*` (the pixel head) and `s_mask_token`. The
backbones have timm's names. The center of the teacher's outputs is not part of it. Bands and normalization are stored
in a sidecar file, NAME.json, with the SHA-256 of the state dict.
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
from pera_jax.common.text import printable
from pera_jax.encoder import load
from pera_jax.formats import tables
from pera_jax.formats.tables import Entry, backbone, head
from pera_jax.training.checkpoints import checkpoint


def table(depth: int, split: int) -> list[Entry]:
    """The entries of all parameters; paths start with `params` (the student) or `teacher`."""
    entries = [Entry("s_mask_token", ("params", "mask_token"), "d", "1 1 d")]
    entries += head("pred_head.mlp0.mlp", "pred_head.last_layer", ("params", "pixel_head"))
    for network, root in (("student", "params"), ("teacher", "teacher")):
        entries += backbone(f"{network}.backbone.", (root, "backbone"), depth, split)
        name = f"{network}.cls_head"
        entries += head(f"{name}.mlp", f"{name}.last_layer", (root, "prototype_head"))
    return entries


def head_sizes(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """`config.heads` from the shapes of the arrays; 1 for a scalar or empty array. Raises KeyError if both networks
    lack an array that gives a size."""
    sizes = {"hidden": "mlp.0.weight", "bottleneck": "mlp.4.weight", "prototypes": "last_layer.weight_v"}
    heads = {name.removeprefix("student.cls_head."): each for name, each in arrays.items()}
    heads = {name.removeprefix("teacher.cls_head."): each for name, each in arrays.items()} | heads
    return {field: (*heads[name].shape, 1)[0] or 1 for field, name in sizes.items()}


@dataclasses.dataclass(frozen=True)
class _Sidecar:
    """The contents of NAME.json for a state dict NAME."""

    format_version: int
    sha256: str
    heads: Positive
    bands: list[Name]
    dtype: Literal["uint8", "uint16", "float32"]
    ranges: list[tuple[Finite, Finite]]
    mean: list[Finite]
    std: list[Finite]
    digest: str  # of all other fields


def sidecar_path(file: pathlib.Path) -> pathlib.Path:
    """The path of the sidecar file, with the settings that a state dict does not contain."""
    return file.with_name(f"{file.name}.json")


def read_sidecar(file: pathlib.Path, verify: bool = True) -> dict[str, Any]:
    """Reads the sidecar file of a state dict: `heads`, `bands`, `dtype`, `ranges`, `mean`, `std`; {} if there is none.

    Raises:
      UserError: the sidecar file is damaged, or belongs to another file.
    """
    place = sidecar_path(file)
    if not place.is_file():
        return {}
    fix = f"export {file.name} again, or delete {place.name} and give --bands, --mean and --std"
    found = dataclasses.asdict(json_files.read(place, _Sidecar, fix))
    if digests.json_digest({name: value for name, value in found.items() if name != "digest"}) != found["digest"]:
        raise UserError(f"{place} is damaged: it does not match its digest; {fix}")
    if verify and digests.file_digest(file) != found["sha256"]:
        raise UserError(f"{file} is damaged, or {place.name} belongs to another file; {fix}")
    listed = {name: tuple(found[name]) for name in ("bands", "ranges", "mean", "std")}
    return {"heads": found["heads"], "dtype": found["dtype"]} | listed


def export(run: str, step: int | None, output: pathlib.Path, verify: bool = True) -> int:
    """Writes {"model": state dict} of a checkpoint for torch.load, and its sidecar file; returns the step.

    Each file is written atomically.

    Raises:
      UserError: a run or step that does not exist; a checkpoint without a student, or of another method than PerA; a
        file that cannot be written, or that exists with other contents; PyTorch is not installed.
    """

    def both(chosen: int) -> list[load.Weights]:
        method = checkpoint.load_meta(checkpoint.folder_of(run, chosen)[0])["config"]["objective"]
        if method != "pera":
            raise UserError(
                f"{run} was trained by {printable(str(method))}, and the format of the authors' code holds PerA only; "
                "use pera-jax export timm"
            )
        return [load.load_weights(run, chosen, which, verify=verify) for which in ("student", "teacher")]

    student, teacher = checkpoint.read_while_present(run, step, both)
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"writing {output} needs PyTorch; run pip install pera_jax[torch] or pip install torch"
        ) from error
    shape = teacher.meta["model"]
    tree = jax.tree.map(np.asarray, {"params": student.params, "teacher": teacher.params})
    named = tables.to_named(tree, table(shape["depth"], shape["split"]), shape["heads"], shape["patch"])
    content = io.BytesIO()
    torch.save({"model": {name: torch.from_numpy(np.array(array)) for name, array in named.items()}}, content)
    owned.check(output, lambda file: file.read_bytes() == content.getvalue())  # the authors' own files look the same
    owned.check(sidecar_path(output))
    meta = teacher.meta
    sidecar = _Sidecar(
        1, hashlib.sha256(content.getvalue()).hexdigest(), shape["heads"], meta["bands"], meta["dtype"],
        [(float(low), float(high)) for low, high in meta["ranges"]],
        [float(value) for value in meta["mean"]], [float(value) for value in meta["std"]], "",
    )  # fmt: skip
    fields = {name: value for name, value in dataclasses.asdict(sidecar).items() if name != "digest"}
    try:
        sidecar_path(output).unlink(missing_ok=True)  # of an earlier export
        files.write(output, content.getvalue())
        files.write(sidecar_path(output), owned.json_text(fields | {"digest": digests.json_digest(fields)}))
    except OSError as error:
        raise UserError(
            f"cannot write {output}: {error.strerror}; free disk space or choose another --output"
        ) from error
    return teacher.step
