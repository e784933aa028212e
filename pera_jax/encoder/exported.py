"""A folder that `python -m pera_jax.export timm` has written, read back without its run.

Its config.json holds the SHA-256 of model.safetensors, and one over its own entry of this program.
"""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from pera_jax.common import digests, json_files
from pera_jax.common.errors import UserError
from pera_jax.encoder.load import Weights
from pera_jax.formats import arrays, tables
from pera_jax.models import vit
from pera_jax.training.checkpoints import meta_fields

FILE, CONFIG = "model.safetensors", "config.json"
ENTRY = "pera_jax"  # of config.json
_FORMAT_VERSION, _WITHOUT_DIGESTS = 2, 1


def described(meta: dict[str, Any], step: int, which: str, height: int, width: int) -> dict[str, Any]:
    """The entry of config.json: the network, and how stored values become what it takes.

    Args:
      meta, step, which: of the checkpoint that is exported.
      height, width: px, what the position embedding is for.
    """
    names = ("bands", "dtype", "ranges", "mean", "std")
    return {
        "format_version": _FORMAT_VERSION, "network": which, "step": step, "image_size": [height, width],
        "model": meta["model"] | {"image_size": height}, **{name: meta[name] for name in names}, "git": meta["git"],
    }  # fmt: skip


def sealed(entry: dict[str, Any], file: pathlib.Path) -> dict[str, Any]:
    """What `described` gives, with the digests of the weights' file and of itself. Raises OSError."""
    entry = entry | {"sha256": digests.of_file(file)}
    return entry | {"digest": digests.of_json(entry)}


def check(entry: dict[str, Any], place: pathlib.Path) -> None:
    """Raises UserError where the entry of the config.json `place` is not what was exported, or of another version."""
    version = entry.get("format_version")
    if version not in (_FORMAT_VERSION, _WITHOUT_DIGESTS):
        raise UserError(
            f"{place} has format version {version}, this program reads {_WITHOUT_DIGESTS} and {_FORMAT_VERSION}; export it "
            "anew"
        )
    described = {name: value for name, value in entry.items() if name != "digest"}
    wanted = None if version == _WITHOUT_DIGESTS and "digest" not in entry else digests.of_json(described)
    if entry.get("digest") != wanted:
        raise UserError(f"{place} is damaged: its entry {ENTRY} is not what was exported; export it anew")


def check_file(entry: dict[str, Any], place: pathlib.Path, file: pathlib.Path) -> None:
    """Raises UserError where the weights' file is not the one that the entry of the config.json `place` was written for."""
    try:
        if "sha256" in entry and entry["sha256"] != digests.of_file(file):
            raise UserError(f"{file} is damaged, or of another export than {place.name} beside it; export it anew")
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from error


def load(folder: pathlib.Path, step: int | None, which: str | None, verify: bool = True) -> Weights:
    """The weights of an exported folder; their `meta` is the entry of config.json.

    Args:
      step, which: what the folder must hold; None: any step.
      verify: compare the weights with their digests.

    Raises:
      UserError: files that are missing, damaged or do not fit each other; another step or network; not square.
    """
    try:
        meta = json_files.parse((folder / CONFIG).read_bytes(), dict[str, Any]).get(ENTRY)
        version = meta.get("format_version") if isinstance(meta, dict) else None
        if version is None or version in (_FORMAT_VERSION, _WITHOUT_DIGESTS):
            meta_fields.check_exported(meta)
    except (OSError, json_files.Invalid) as error:
        raise UserError(
            f"{folder / CONFIG} is not of python -m pera_jax.export timm ({error}); export it anew, or make a run of the "
            "file with import-timm"
        ) from error
    check(meta, folder / CONFIG)
    shape, (height, width), held = meta["model"], meta["image_size"], (meta["network"], meta["step"])
    if (which or held[0], held[1] if step is None else step) != held:
        raise UserError(f"{folder} holds the {held[0]} of step {held[1]}; ask for that, or name the run")
    if height != width:
        raise UserError(f"{folder} was exported for {height} x {width} px; export it for a square, or name the run")
    file, entries = folder / FILE, tables.backbone("", ("backbone",), shape["depth"], shape["split"])
    named = arrays.read(file, verify)
    if verify:
        check_file(meta, folder / CONFIG, file)
    network, image = vit.build(shape), jnp.zeros((1, height, width, shape["bands"]))
    abstract = jax.eval_shape(lambda: network.init(jax.random.key(0), image))
    misshapen = tables.misshapen(named, {"backbone": abstract["params"]}, entries, shape)
    tables.check([*tables.misfits(named, entries), *misshapen], str(file))
    tree = tables.from_named(named, entries, shape["heads"], shape["patch"])
    return Weights(jax.tree.map(jnp.asarray, tree), meta, held[1], held[0])
