"""Weights of other programs as a run with one checkpoint, of step 0, that probes, reports and `init_from` read.

A whole dictionary of the released program becomes a whole state, with a new optimizer and the centre at 0; a teacher's
backbone alone becomes a checkpoint without a student and without heads.
"""

import dataclasses
import errno
import hashlib
import pathlib
from collections.abc import Callable
from typing import Any

import jax
from ml_collections import ConfigDict

from pera_jax import config as configs
from pera_jax import objectives
from pera_jax.bands import RGB, Bands
from pera_jax.common import files
from pera_jax.common.errors import UserError
from pera_jax.common.text import printable, several
from pera_jax.data.mixture import IMAGENET
from pera_jax.encoder import exported
from pera_jax.formats import arrays, tables
from pera_jax.training import step as steps
from pera_jax.training.checkpoints import checkpoint, intact, ocp, run_meta
from pera_jax.weights import released, timm

_REST = ("student.", "teacher.cls_head.", "pred_head.", "s_mask_token")  # all of a dictionary but the teacher's backbone


@dataclasses.dataclass(frozen=True)
class Options:
    """What a file does not tell.

    Attributes:
      heads: of attention; None: 64 values each.
      bands: names; None: red, green, blue.
      mean, std: of each band, of values in [0, 1]; None: ImageNet's, for red, green, blue.
      dtype: of stored values; None: uint8.
      ranges: (low, high) of each band, stored values that become 0 and 1; None: 0 and 255.
    """

    heads: int | None = None
    bands: tuple[str, ...] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    dtype: str | None = None
    ranges: tuple[tuple[float, float], ...] | None = None

    def told(self, beside: dict[str, Any], place: str) -> tuple["Options", list[str]]:
        """These, and for what is None what `place`, a file beside the weights, says; and where each comes from, in words."""
        fields = [field.name for field in dataclasses.fields(self)]
        found = {name: beside[name] for name in fields if beside.get(name) is not None and getattr(self, name) is None}
        said = [f"{', '.join(found)} from {place}, beside the file"] * bool(found)
        chosen = dataclasses.replace(self, **found)
        assumed = [name for name in ("mean", "std") if getattr(chosen, name) is None]
        if assumed:
            said.append(f"{' and '.join(assumed)}: ImageNet's, as nothing beside the file says others")
        return chosen, said


def import_released(
    file: pathlib.Path, output: pathlib.Path, options: Options, teacher_only: bool, verify: bool = True
) -> dict[str, Any]:
    """Writes the run folder `output` from a dictionary of the released program; returns the `meta`.

    Args:
      options: before what `export released` has written beside the file.
      teacher_only: take the teacher's backbone, whether the rest is there or not.
      verify: check the checksums that the file and what lies beside it have.

    Raises:
      UserError: a file that is no such dictionary (all names that are wrong are in the sentence), options that do not fit,
        an output that cannot be written.
    """
    passed_over: list[str] = []
    named, beside = arrays.read(file, verify, passed_over), released.beside(file, verify)
    options, told = options.told(beside, released.place_beside(file).name)
    told = [*passed_over, *told]
    if teacher_only:
        named = {name: each for name, each in named.items() if not name.startswith(_REST)}
        return _import(file, output, options, named, "teacher.backbone.", _teacher_table, told)
    if "teacher.backbone.cls_token" in named and not any(name.startswith("student.") for name in named):
        raise UserError(f"{file} holds no student; take the teacher's backbone alone with --teacher-only")
    return _import(file, output, options, named, "teacher.backbone.", released.table, told)


def import_timm(
    file: pathlib.Path, output: pathlib.Path, options: Options, verify: bool = True
) -> tuple[dict[str, Any], list[str]]:
    """Writes the run folder `output` from a ViT under timm's names; returns the `meta` and the names that were left out.

    Of a file of several networks the teacher's backbone is taken; `meta["imported"]["prefix"]` says what its names began
    with.

    Args:
      options: before what timm's config.json beside the file says.
      verify: check the checksums that the file and config.json have.

    Raises:
      UserError: as `import_released`; a config.json that is none of timm's; positions for a rectangle.
    """
    passed_over: list[str] = []
    prefix, named, others = timm.backbone_in(arrays.read(file, verify, passed_over), str(file))
    named, left_out, scaled = timm.without_extras(named, str(file))
    beside = timm.beside(file, verify)
    tables.check_grid(named, beside.get("size"), str(file))
    tables.check_sizes(named, beside.get("sizes", {}), str(file))
    options, told = options.told(beside, exported.CONFIG)
    told = [*passed_over, *scaled, *told]
    meta = _import(file, output, options, named, "", timm.table, told, prefix)
    return meta, others + [prefix + name for name in left_out]


def said_of(meta: dict[str, Any]) -> list[str]:
    """What an import took from where, and how far its arrays could be checked, a line each."""
    of = meta["imported"]
    taken = [f"taken is {printable(of['prefix'])}* of the file"] * bool(of["prefix"])
    return [*taken, *map(printable, of["told"]), f"SHA-256 of the file: {of['sha256']}"]


def _teacher_table(depth: int, split: int) -> list[tables.Entry]:
    return tables.backbone("teacher.backbone.", ("teacher", "backbone"), depth, split)


def _import(
    file, output, options, named, prefix, table: Callable[[int, int], list[tables.Entry]], told: list[str], taken: str = ""
) -> dict[str, Any]:
    depth = tables.depth_of(named, prefix)
    entries = table(depth, depth // 2)
    whole, said = any(entry.path[0] == "params" for entry in entries), tables.misfits(named, entries)
    try:
        shape = tables.shape_of(named, prefix, options.heads, str(file))
        bands = _bands(file, shape["bands"], options)
        config = _config(file.stem, shape, released.head_sizes(named) if whole else {}, bands.names)
        objective = objectives.from_config(config, bands)
        optimizer = steps.make_optimizer(config.optimizer)
        abstract = jax.eval_shape(lambda: steps.new_state(objective, optimizer, 0))
        tree = {"params": abstract.params, "teacher": abstract.teacher}
        said += tables.misshapen(named, tree, entries, shape)
    except (UserError, KeyError):  # arrays that tell the sizes are missing: then the names are all that can be told
        if not said:
            raise
    tables.check(said, str(file))
    empty = sorted(name for name, each in named.items() if each.ndim > 1 and not each.any())
    if empty:
        told = [*told, f"holding nothing but 0, as what a download has not reached: {several(empty, 12)}"]
    tree = jax.tree.map(jax.numpy.asarray, tables.from_named(named, entries, shape["heads"], shape["patch"]))

    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    card = {"name": file.name, "split": None, "records": None, "fingerprint": digest, "class_names": None}
    origin = {"file": file.name, "sha256": digest, "backbone_alone": not whole, "prefix": taken, "told": told}
    meta = run_meta.describe(config, objective, card) | {"imported": origin}
    with files.whole_folder(output) as folder:
        _save(folder, objective, optimizer, tree.get("params"), tree["teacher"], meta)
        run_meta.write(str(folder), meta)
    return meta


def _save(run: pathlib.Path, objective, optimizer, params, teacher, meta: dict[str, Any]) -> None:
    """Writes the checkpoint of step 0; without the student's `params` that of the teacher alone. Raises OSError."""
    items = {"teacher": teacher, "data": {"batches": 0, "replaced": 0, "drawn": []}, "meta": meta | {"step": 0}}
    if params is not None:
        step, opt_state = jax.numpy.zeros((), jax.numpy.int32), optimizer.init(params)
        items |= checkpoint.split(steps.TrainState(step, params, teacher, opt_state, objective.init_state()))
    try:
        (run / checkpoint.FOLDER).mkdir()
        ocp.save_checkpointables(run / checkpoint.FOLDER / "0", intact.sealed(items))
    except checkpoint.WRITE_ERRORS as error:
        raise OSError(errno.EIO, str(error).splitlines()[0][:200]) from error


def _config(name: str, shape: dict[str, Any], heads: dict[str, int], bands: tuple[str, ...]) -> ConfigDict:
    """The published settings with a file's sizes and bands."""
    config, patch = configs.default("pera"), shape["patch"]
    config.name = name
    config.data.bands = bands
    config.model.update({field: shape[field] for field in ("width", "depth", "heads", "patch", "mlp_ratio")})
    config.crops.update(dict(global_size=shape["image_size"], local_size=max(config.crops.local_size // patch, 2) * patch))
    config.pera.heads.update(heads)
    if bands != RGB:
        config.pera.views.update(dict(saturation=0.0, hue=0.0, student_grayscale=0.0))  # which are for red, green and blue
    return config


def _bands(file: pathlib.Path, number: int, options: Options) -> Bands:
    names = options.bands or RGB
    plain = names == RGB
    if len(names) != number:
        raise UserError(f"{file} is for {number} band(s), and {', '.join(names)} are {len(names)}; name them with --bands")
    mean, std = options.mean or (IMAGENET[0] if plain else None), options.std or (IMAGENET[1] if plain else None)
    if mean is None or std is None or not len(mean) == len(std) == number or min(std) <= 0:
        raise UserError(f"{file} needs --mean and --std with one number for each of {', '.join(names)}, std above 0")
    dtype, ranges = options.dtype or "uint8", options.ranges or ((0.0, 255.0),) * number
    if len(ranges) != number:
        raise UserError(f"{file} is for {number} band(s), and what lies beside it gives the ranges of {len(ranges)}")
    return Bands(names, dtype, tuple((float(low), float(high)) for low, high in ranges), tuple(mean), tuple(std))
