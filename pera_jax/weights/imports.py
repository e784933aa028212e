"""Imports weights of other programs as a run folder with one checkpoint at step 0, for probes, reports and `init_from`.

A complete state dict of the authors' code becomes a complete training state, with a new optimizer and a zero center;
the backbone of a teacher becomes a checkpoint without student and heads.
"""

import dataclasses
import errno
import hashlib
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from pera_jax import config as configs
from pera_jax import objectives
from pera_jax.bands import RGB, Bands
from pera_jax.common import files
from pera_jax.common.errors import UserError
from pera_jax.common.text import first_line, printable, several
from pera_jax.data.mixture import IMAGENET
from pera_jax.encoder import exported
from pera_jax.formats import arrays, tables
from pera_jax.training import step as steps
from pera_jax.training.checkpoints import checkpoint, intact, ocp, run_meta
from pera_jax.weights import released, timm

_REST = ("student.", "teacher.cls_head.", "pred_head.", "s_mask_token")  # everything but the teacher's backbone


@dataclasses.dataclass(frozen=True)
class Options:
    """Settings that a weight file does not contain.

    Attributes:
      heads: number of attention heads; None for width / 64.
      bands: band names; None for red, green, blue.
      mean, std: of each band, for values in [0, 1]; None for ImageNet's, with red, green, blue only.
      dtype: of stored values; None for uint8.
      ranges: (low, high) of each band, the stored values that map to 0 and 1; None for (0, 255).
    """

    heads: int | None = None
    bands: tuple[str, ...] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    dtype: str | None = None
    ranges: tuple[tuple[float, float], ...] | None = None

    def completed(self, sidecar: dict[str, Any], place: str) -> tuple["Options", list[str]]:
        """Fills the fields that are None from `sidecar`, the contents of the file `place`; returns also notes on the
        sources."""
        fields = [field.name for field in dataclasses.fields(self)]
        found = {
            name: sidecar[name] for name in fields if sidecar.get(name) is not None and getattr(self, name) is None
        }
        notes = [f"{', '.join(found)} from {place}, beside the file"] * bool(found)
        chosen = dataclasses.replace(self, **found)
        assumed = [name for name in ("mean", "std") if getattr(chosen, name) is None]
        if assumed:
            notes.append(f"{' and '.join(assumed)}: ImageNet's, since no file beside the weights has them")
        return chosen, notes


def import_released(
    file: pathlib.Path, output: pathlib.Path, options: Options, teacher_only: bool, verify: bool = True
) -> dict[str, Any]:
    """Writes the run folder `output` from a state dict of the authors' code; returns the metadata.

    Args:
      options: take precedence over the sidecar file written by `export released`.
      teacher_only: import only the teacher's backbone, even if the file has more.
      verify: check the checksums of the file and of its sidecar file.

    Raises:
      UserError: a file that is not such a state dict (the error names every wrong array), options that do not fit, an
        output that cannot be written.
    """
    reading: list[str] = []
    named, sidecar = arrays.read(file, verify, reading), released.read_sidecar(file, verify)
    options, notes = options.completed(sidecar, released.sidecar_path(file).name)
    notes = [*reading, *notes]
    if teacher_only:
        named = {name: each for name, each in named.items() if not name.startswith(_REST)}
        return _import(file, output, options, named, "teacher.backbone.", _teacher_table, notes)
    if "teacher.backbone.cls_token" in named and not any(name.startswith("student.") for name in named):
        raise UserError(f"{file} has no student; import only the teacher's backbone with --teacher-only")
    return _import(file, output, options, named, "teacher.backbone.", released.table, notes)


def import_timm(
    file: pathlib.Path, output: pathlib.Path, options: Options, verify: bool = True
) -> tuple[dict[str, Any], list[str]]:
    """Writes the run folder `output` from a ViT with timm's names; returns the metadata and the names of ignored
    arrays.

    From a file with several networks the teacher's backbone is imported; `meta["imported"]["prefix"]` is the prefix of
    its names.

    Args:
      options: take precedence over timm's config.json beside the file.
      verify: check the checksums of the file and of config.json.

    Raises:
      UserError: as `import_released`; a config.json not written by timm; a position embedding of a non-square grid.
    """
    reading: list[str] = []
    prefix, named, others = timm.select_backbone(arrays.read(file, verify, reading), str(file))
    named, ignored, scaled = timm.without_extras(named, str(file))
    stored = timm.read_config(file, verify)
    tables.check_grid(named, stored.get("size"), str(file))
    tables.check_sizes(named, stored.get("sizes", {}), str(file))
    options, notes = options.completed(stored, exported.CONFIG)
    notes = [*reading, *scaled, *notes]
    meta = _import(file, output, options, named, "", timm.table, notes, prefix)
    return meta, others + [prefix + name for name in ignored]


def summary(meta: dict[str, Any]) -> list[str]:
    """Lines to print about an import: what was imported from where, and the checksum of the file."""
    origin = meta["imported"]
    prefix = [f"imported {printable(origin['prefix'])}* of the file"] * bool(origin["prefix"])
    return [*prefix, *map(printable, origin["told"]), f"SHA-256 of the file: {origin['sha256']}"]


def _teacher_table(depth: int, split: int) -> list[tables.Entry]:
    return tables.backbone("teacher.backbone.", ("teacher", "backbone"), depth, split)


def _import(
    file,
    output,
    options,
    named,
    prefix,
    table: Callable[[int, int], list[tables.Entry]],
    notes: list[str],
    source: str = "",
) -> dict[str, Any]:
    depth = tables.depth_of(named, prefix)
    entries = table(depth, depth // 2)
    complete, problems = any(entry.path[0] == "params" for entry in entries), tables.misfits(named, entries)
    try:
        shape = tables.shape_of(named, prefix, options.heads, str(file))
        bands = bands_of(file, shape["bands"], options)
        config = _config(file.stem, shape, released.head_sizes(named) if complete else {}, bands.names)
        objective = objectives.from_config(config, bands)
        optimizer = steps.make_optimizer(objective, config.optimizer)
        abstract = jax.eval_shape(lambda: steps.new_state(objective, optimizer, 0))
        tree = {"params": abstract.params, "teacher": abstract.teacher}
        problems += tables.misshapen(named, tree, entries, shape)
    except (UserError, KeyError):  # without the arrays that give the sizes, only the names can be checked
        if not problems:
            raise
    tables.check(problems, str(file))
    tree = tables.from_named(named, entries, shape["heads"], shape["patch"])
    return write_run(file, output, config, objective, named, tree, notes, source)


def write_run(
    file: pathlib.Path, output: pathlib.Path, config: ConfigDict, objective: objectives.Objective,
    named: dict[str, np.ndarray], tree: dict[str, Any], notes: list[str], source: str = "",
) -> dict[str, Any]:  # fmt: skip
    """Writes the run folder `output` with the parameters of a file; returns the metadata.

    Args:
      named: the arrays of the file. tree: the same as our trees, "params" (unless the backbone is alone), "teacher",
        "objective".
      notes: lines for `summary`. source: the prefix of the names that were imported.
    """
    complete = "params" in tree
    empty = sorted(name for name, each in named.items() if each.ndim > 1 and not each.any())
    if empty:
        notes = [*notes, f"all values are 0, as in an incomplete download: {several(empty, 12)}"]
    tree = jax.device_put(tree)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    card = {"name": file.name, "split": None, "records": None, "fingerprint": digest, "class_names": None}
    origin = {"file": file.name, "sha256": digest, "backbone_alone": not complete, "prefix": source, "told": notes}
    meta = run_meta.describe(config, objective, card) | {"imported": origin}
    with files.whole_folder(output) as folder:
        _save(folder, config, objective, tree, meta)
        run_meta.write(str(folder), meta)
    return meta


def _save(run: pathlib.Path, config: ConfigDict, objective, tree: dict[str, Any], meta: dict[str, Any]) -> None:
    """Writes the checkpoint of step 0; without "params" in `tree`, with the teacher only. Raises OSError."""
    items = {"data": {"batches": 0, "replaced": 0, "drawn": []}, "meta": meta | {"step": 0}}
    if "params" in tree:
        optimizer = steps.make_optimizer(objective, config.optimizer)
        step, opt_state = jax.device_put(np.int32(0)), jax.jit(optimizer.init)(tree["params"])
        state = objective.init_state() | tree.get("objective", {})
        items |= checkpoint.split(steps.TrainState(step, tree["params"], tree.get("teacher", {}), opt_state, state))
    else:
        items["teacher"] = tree["teacher"]
    try:
        (run / checkpoint.FOLDER).mkdir()
        ocp.save_checkpointables(run / checkpoint.FOLDER / "0", intact.with_digests(items))
    except checkpoint.WRITE_ERRORS as error:
        raise OSError(errno.EIO, first_line(error)) from error


def _config(name: str, shape: dict[str, Any], heads: dict[str, int], bands: tuple[str, ...]) -> ConfigDict:
    """The default config of PerA with the sizes and bands of a file."""
    config, patch = configs.default("pera"), shape["patch"]
    config.name = name
    config.data.bands = bands
    config.model.update({field: shape[field] for field in ("width", "depth", "heads", "patch", "mlp_ratio")})
    config.crops.update(
        dict(global_size=shape["image_size"], local_size=max(config.crops.local_size // patch, 2) * patch)
    )
    config.pera.heads.update(heads)
    if bands != RGB:
        config.pera.views.update(dict(saturation=0.0, hue=0.0, student_grayscale=0.0))  # they need red, green and blue
    return config


def bands_of(file: pathlib.Path, number: int, options: Options) -> Bands:
    """The bands of a network with `number` of them. Raises UserError if `options` do not fit."""
    names = options.bands or RGB
    rgb = names == RGB
    if len(names) != number:
        raise UserError(
            f"{file} has {number} band(s), got {len(names)} band names ({', '.join(names)}); give {number} names with "
            "--bands"
        )
    mean, std = options.mean or (IMAGENET[0] if rgb else None), options.std or (IMAGENET[1] if rgb else None)
    if mean is None or std is None or not len(mean) == len(std) == number or min(std) <= 0:
        raise UserError(
            f"{file} needs --mean and --std; give one number for each of the bands {', '.join(names)}, with std > 0"
        )
    dtype, ranges = options.dtype or "uint8", options.ranges or ((0.0, 255.0),) * number
    if len(ranges) != number:
        raise UserError(
            f"{file} has {number} band(s), but its sidecar file gives ranges for {len(ranges)}; export the file again"
        )
    return Bands(names, dtype, tuple((float(low), float(high)) for low, high in ranges), tuple(mean), tuple(std))
