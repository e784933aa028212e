"""Reads folders written by `pera-jax export timm`.

config.json has an entry for this program, with the SHA-256 of model.safetensors and a digest of the entry itself.
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


def to_dict(meta: dict[str, Any], step: int, which: str, height: int, width: int) -> dict[str, Any]:
    """This program's entry of config.json: the network and the normalization of its input.

    Args:
      meta, step, which: metadata, step and network name of the exported checkpoint.
      height, width: px, the image size of the position embedding.
    """
    names = ("bands", "dtype", "ranges", "mean", "std")
    return {
        "format_version": _FORMAT_VERSION, "network": which, "step": step, "image_size": [height, width],
        "model": meta["model"] | {"image_size": height}, **{name: meta[name] for name in names}, "git": meta["git"],
    }  # fmt: skip


def with_digests(entry: dict[str, Any], file: pathlib.Path) -> dict[str, Any]:
    """The entry from `to_dict` with the digests of the weight file and of the entry itself. Raises OSError."""
    entry = entry | {"sha256": digests.file_digest(file)}
    return entry | {"digest": digests.json_digest(entry)}


def check(entry: dict[str, Any], place: pathlib.Path) -> None:
    """Raises UserError if the entry of the config.json `place` was modified or has an unsupported version."""
    version = entry.get("format_version")
    if version not in (_FORMAT_VERSION, _WITHOUT_DIGESTS):
        raise UserError(
            f"unsupported format version in {place}: expected {_WITHOUT_DIGESTS} or {_FORMAT_VERSION}, got {version}; "
            "export the weights again"
        )
    content = {name: value for name, value in entry.items() if name != "digest"}
    wanted = None if version == _WITHOUT_DIGESTS and "digest" not in entry else digests.json_digest(content)
    if entry.get("digest") != wanted:
        raise UserError(f"{place} is damaged: its entry {ENTRY} does not match its digest; export the weights again")


def check_file(entry: dict[str, Any], place: pathlib.Path, file: pathlib.Path) -> None:
    """Raises UserError if the weight file does not match the digest in the entry of the config.json `place`."""
    try:
        if "sha256" in entry and entry["sha256"] != digests.file_digest(file):
            raise UserError(
                f"{file} is damaged, or from another export than {place.name} beside it; export the weights again"
            )
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from error


def load(folder: pathlib.Path, step: int | None, which: str | None, verify: bool = True) -> Weights:
    """Loads the weights of an exported folder; their `meta` is this program's entry of config.json.

    Args:
      step, which: step and network that the folder must have; None accepts any.
      verify: check the weights against their digests.

    Raises:
      UserError: files that are missing, damaged or inconsistent; another step or network; weights for non-square
        images.
    """
    try:
        meta = json_files.parse((folder / CONFIG).read_bytes(), dict[str, Any]).get(ENTRY)
        version = meta.get("format_version") if isinstance(meta, dict) else None
        if version is None or version in (_FORMAT_VERSION, _WITHOUT_DIGESTS):
            meta_fields.check_exported(meta)
    except (OSError, json_files.Invalid) as error:
        raise UserError(
            f"{folder / CONFIG} was not written by pera-jax export timm ({error}); export the weights again, "
            "or import the file with pera-jax export import-timm"
        ) from error
    check(meta, folder / CONFIG)
    shape, (height, width), held = meta["model"], meta["image_size"], (meta["network"], meta["step"])
    if (which or held[0], held[1] if step is None else step) != held:
        raise UserError(
            f"{folder} has only the {held[0]} of step {held[1]}; leave out step and network, or give the run folder"
        )
    if height != width:
        raise UserError(
            f"{folder} was exported for {height} x {width} px; export it for a square image size, or give the run "
            "folder"
        )
    file, named = folder / FILE, arrays.read(folder / FILE, verify)
    learned = shape.get("position", "learned") == "learned"
    entries = tables.backbone(
        "", ("backbone",), shape["depth"], shape["split"], layer_scale="layer_scale" in shape, positions=learned
    )
    if not learned:
        named.pop("pos_embed", None)  # it is computed
    if verify:
        check_file(meta, folder / CONFIG, file)
    network, image = vit.build(shape), jnp.zeros((1, height, width, shape["bands"]))
    abstract = jax.eval_shape(lambda: network.init(jax.random.key(0), image))
    misshapen = tables.misshapen(named, {"backbone": abstract["params"]}, entries, shape)
    tables.check([*tables.misfits(named, entries), *misshapen], str(file))
    tree = tables.from_named(named, entries, shape["heads"], shape["patch"])
    return Weights(jax.tree.map(jnp.asarray, tree), meta, held[1], held[0])
