"""Import and export of the state dictionaries of the methods' official programs: networks, heads and decoders.

The objective knows the names (`Objective.official`). Fixed position embeddings are written, and compared with
this program's when they are read.
"""

import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from pera_jax import config as configs
from pera_jax import objectives
from pera_jax.bands import RGB
from pera_jax.common.errors import UserError
from pera_jax.common.text import every, printable
from pera_jax.encoder import load
from pera_jax.formats import arrays, tables
from pera_jax.training import step as steps
from pera_jax.training.checkpoints import checkpoint
from pera_jax.weights import imports, timm

_COLORS = ("saturation", "hue", "grayscale")  # operations that need red, green and blue
_CLOSE = 1e-5  # largest difference between the fixed position embeddings of two programs


def import_official(
    method: str, file: pathlib.Path, output: pathlib.Path, options: imports.Options, changes: Sequence[str] = (),
    verify: bool = True,
) -> tuple[dict[str, Any], list[str]]:  # fmt: skip
    """Writes the run folder `output` from a state dictionary of the official program of `method`; returns the metadata
    and the names of ignored arrays.

    Args:
      options, changes: settings that the file does not contain; `changes` are fields of the config, as FIELD=VALUE.

    Raises:
      UserError: the method has no official program whose format is known; the file is not of it (the error names every
        wrong array); its fixed position embeddings differ from those of the method.
    """
    official = _official(method)
    notes: list[str] = []
    named = timm.without_chunks(arrays.read(file, verify, notes))
    if f"{official.backbone}cls_token" not in named:
        raise UserError(
            f"{file} has no array {official.backbone}cls_token, so it is not a state dictionary of {method}'s official "
            "program; choose the --method that wrote it, or import a ViT alone with import-timm"
        )
    try:
        shape = tables.shape_of(named, official.backbone, options.heads, str(file))
    except KeyError as error:
        raise UserError(f"{file} lacks the array {error.args[0]}, which gives a size; get a complete file") from error
    options, assumed = options.completed({}, str(file))
    bands = imports.bands_of(file, shape["bands"], options)
    config, guessed = _config(method, file.stem, shape, bands.names, named)
    config = configs.load(config, changes)
    objective = objectives.from_config(config, bands)
    constants = {name: np.asarray(array) for name, array in official.constants(objective).items()}
    other = [name for name, array in constants.items() if name in named and not _same(array, named[name])]
    if other:
        raise UserError(
            f"{file} has fixed positions that differ from those of {method}: {every(sorted(other))}; choose the "
            "--method that wrote it"
        )
    named = {name: array for name, array in named.items() if name not in constants}
    entries = official.entries(objective)
    wanted = {entry.name for entry in entries}
    unused = sorted(name for name in named if official.is_unused(name) and name not in wanted)
    named = {name: array for name, array in named.items() if name not in unused}
    optional = {entry.name for entry in entries if entry.path[0] == "objective"}  # not in every checkpoint
    entries = [entry for entry in entries if entry.name in named or entry.name not in optional]
    optimizer = steps.make_optimizer(objective, config.optimizer)
    abstract = jax.eval_shape(lambda: steps.new_state(objective, optimizer, 0))
    tree = {"params": abstract.params, "teacher": abstract.teacher, "objective": abstract.objective}
    problems = [*tables.misfits(named, entries), *tables.misshapen(named, tree, entries, shape)]
    tables.check(problems, str(file))
    found = tables.from_named(named, entries, shape["heads"], shape["patch"])
    return imports.write_run(file, output, config, objective, named, found, [*notes, *assumed, *guessed]), unused


def export(run: str, step: int | None, output: pathlib.Path, verify: bool = True) -> int:
    """Writes the safetensors file `output` with the arrays of a checkpoint under the official program's names; returns
    the step.

    Raises:
      UserError: a run or step that does not exist; a method without an official format; a checkpoint that holds only a
        backbone; a file that cannot be written.
    """

    def read(chosen: int) -> tuple[list[load.Weights], dict[str, Any]]:
        meta = checkpoint.load_meta(checkpoint.folder_of(run, chosen)[0])
        _official(str(meta["config"]["objective"]))
        networks = load.networks_of(meta)
        if "student" not in networks:
            raise UserError(f"{run} holds only a backbone; use pera-jax export timm")
        held = [load.load_weights(run, chosen, which, verify=verify) for which in networks]
        return held, load.load_state(run, chosen, verify)

    found, state = checkpoint.read_while_present(run, step, read)
    weights = {each.network: each for each in found}
    meta = weights["student"].meta
    objective = objectives.from_metadata(meta)
    tree = {"params": weights["student"].params, "objective": state}
    tree |= {"teacher": weights["teacher"].params} if "teacher" in weights else {}
    tree = jax.tree.map(np.asarray, tree)
    named = tables.to_named(tree, objective.official.entries(objective), meta["model"]["heads"], meta["model"]["patch"])
    named |= objective.official.constants(objective)
    try:
        arrays.write(output, {name: np.asarray(array, np.float32) for name, array in named.items()})
    except OSError as error:
        raise UserError(
            f"cannot write {output}: {error.strerror}; free disk space or choose another --output"
        ) from error
    return weights["student"].step


def _official(method: str) -> Any:
    found = objectives.method(method).official
    if found is None:
        known = [name for name in objectives.METHODS if objectives.method(name).official]
        raise UserError(
            f"{printable(method)} has no official format here; expected one of {', '.join(known)}, or use export timm, "
            "export released or import-released"
        )
    return found


def _same(one: np.ndarray, other: np.ndarray) -> bool:
    return one.shape == other.shape and bool(np.abs(one - other).max(initial=0.0) < _CLOSE)


def _config(
    method: str, name: str, shape: dict[str, Any], bands: tuple[str, ...], named: dict[str, np.ndarray]
) -> tuple[ConfigDict, list[str]]:
    """The default config of a method with the sizes and bands of a file; and notes on what is assumed."""
    config = configs.default(method)
    config.name, config.data.bands = name, bands
    config.model.update({field: shape[field] for field in ("width", "depth", "heads", "patch", "mlp_ratio")})
    local = max(config.crops.local_size // shape["patch"], 2) * shape["patch"]
    config.crops.update(dict(global_size=shape["image_size"], local_size=local))
    own = objectives.method(method)
    notes = own.official.set_sizes(config, named)
    if bands != RGB:
        _without_colors(config[own.name])
    return config, notes


def _without_colors(fields: ConfigDict) -> None:
    for name, value in fields.items():
        if isinstance(value, ConfigDict):
            _without_colors(value)
        elif name in _COLORS:
            fields[name] = 0.0
