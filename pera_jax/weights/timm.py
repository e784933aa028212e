"""The names of timm's VisionTransformer: weights of DINO, DINOv2, MAE or supervised ViTs in, our backbones out.

What such files hold beside the ViT is left out: classifiers (`head.*`), the decoder and the mask token of pre-training.
LayerScale, a factor for each channel at the end of a block's branch, `x + gamma * (W y + b)`, is multiplied into the
branch's last linear layer, `(gamma W) y + gamma b`: the same function, each weight rounded once more.

No file tells the activation and the norms' epsilon: here they are the exact GELU and 1e-6, as in the ViTs named above;
CLIP's networks, for one, have others and would give other features.
"""

import dataclasses
import pathlib
import re
from typing import Any

import jax
import numpy as np

from pera_jax.bands import Bands
from pera_jax.common import files, json_files
from pera_jax.common.errors import UserError
from pera_jax.common.text import every, several
from pera_jax.encoder import exported, fit
from pera_jax.encoder.load import Weights
from pera_jax.formats import arrays, tables
from pera_jax.training.checkpoints import meta_fields
from pera_jax.weights import card

_LEFT_OUT = re.compile(r"(head\.|decoder_).*|mask_token")
_PREFIXES = ("", "teacher.backbone.", "teacher.", "backbone.", "student.backbone.", "student.")  # the first one is taken
_PART = re.compile(r"^([^.]*\.[^.]*\.).*")
_CHUNK = re.compile(r"^(blocks\.)\d+\.(?=\d+\.)")
_SCALE = re.compile(r"(blocks\.\d+\.)ls([12])\.gamma")
_BLOCK = re.compile(r"(blocks\.\d+\.)")
_SCALED = {"1": "attn.proj", "2": "mlp.fc2"}  # what each of a block's two factors follows
ARCHITECTURE = "vit_base_patch16_224"  # timm's entry point; `model_args` says all of its sizes anew


def table(depth: int, split: int) -> list[tables.Entry]:
    """The entries of `{"teacher": {"backbone": ...}}`."""
    return tables.backbone("", ("teacher", "backbone"), depth, split)


# ---------------------------------------------------------------- in


def without_extras(named: dict[str, np.ndarray], what: str) -> tuple[dict[str, np.ndarray], list[str], list[str]]:
    """The ViT of a file with LayerScale multiplied in, the names of what is left out, and a line that says so of LayerScale.

    Args:
      what: the file, for errors.

    Raises:
      UserError: factors that are missing, not finite or do not fit their layer; all are named.
    """
    left_out = sorted(name for name in named if _LEFT_OUT.fullmatch(name))
    scales = {name: _SCALE.fullmatch(name) for name in named}
    scales = {name: match[1] + _SCALED[match[2]] for name, match in scales.items() if match}
    kept = {name: each for name, each in named.items() if name not in scales and name not in left_out}
    if not scales:
        return kept, left_out, []
    blocks = {_BLOCK.match(name)[1] for name in named if _BLOCK.match(name)}
    lacking = {f"{block}ls{number}.gamma" for block in blocks for number in _SCALED} - scales.keys()
    infinite, wrong = {name for name in scales if not np.isfinite(named[name]).all()}, set()
    for name, layer in scales.items():
        weight, bias, gamma = kept.get(f"{layer}.weight"), kept.get(f"{layer}.bias"), named[name]
        if weight is None or bias is None or not (bias.shape == gamma.shape == weight.shape[:1]):
            wrong.add(name)
            continue
        kept[f"{layer}.weight"], kept[f"{layer}.bias"] = gamma[:, None] * weight, gamma * bias
    problems = {"lacks": lacking, "has values that are not finite in": infinite, "has what does not fit the layer before it:": wrong}
    tables.check([f"{verb} {every(sorted(found))}" for verb, found in problems.items() if found], f"of LayerScale, {what}")
    return kept, left_out, [f"LayerScale of {len(blocks)} blocks is multiplied into the layers before it"]


@dataclasses.dataclass
class _Pretrained:
    mean: tuple[json_files.Finite, ...] | None = None
    std: tuple[json_files.Finite, ...] | None = None
    input_size: tuple[json_files.Positive, json_files.Positive, json_files.Positive] | None = None  # bands, height, width


@dataclasses.dataclass
class _Arguments:
    num_heads: json_files.Positive | None = None
    depth: json_files.Positive | None = None
    embed_dim: json_files.Positive | None = None
    patch_size: int | list[int] | None = None
    in_chans: json_files.Positive | None = None
    img_size: int | list[int] | None = None


@dataclasses.dataclass
class _Config:
    """What is read of timm's config.json."""

    pretrained_cfg: _Pretrained
    model_args: _Arguments = dataclasses.field(default_factory=_Arguments)
    num_features: json_files.Positive | None = None
    pera_jax: dict[str, Any] | None = None


def backbone_in(named: dict[str, np.ndarray], what: str) -> tuple[str, dict[str, np.ndarray], list[str]]:
    """The ViT of a file that may hold several networks and their heads, as DINO's and DINOv2's checkpoints do.

    Blocks in chunks, DINOv2's `blocks.CHUNK.NUMBER`, become `blocks.NUMBER`.

    Args:
      what: the file, for errors.

    Returns:
      what its names began with, the teacher's before the student's; its arrays under timm's names; the names of the rest, of
      a network or a head one, as `student.backbone.*`.

    Raises:
      UserError: several networks, none of which is known to be the teacher.
    """
    found = sorted(name.removesuffix("cls_token") for name in named if name == "cls_token" or name.endswith(".cls_token"))
    prefix = next((known for known in _PREFIXES if known in found), found[0] if len(found) == 1 else "")
    if prefix not in found and len(found) > 1:
        raise UserError(f"{what} holds several networks, under {several(found)}; save one of them alone")
    kept = {_CHUNK.sub(r"\1", name.removeprefix(prefix)): each for name, each in named.items() if name.startswith(prefix)}
    return prefix, kept, sorted({_PART.sub(r"\1*", name) for name in named if not name.startswith(prefix)})


def beside(file: pathlib.Path, verify: bool = True) -> dict[str, Any]:
    """What config.json of timm's in the folder of `file` says, where there is one; nothing without.

    Args:
      verify: compare `file` with the digest that this program has written there.

    Returns:
      `heads`, `mean`, `std`, `size` (height and width in px), or None for each; `sizes`, for `tables.check_sizes`; of an
      export of this program `bands`, `dtype` and `ranges` too.

    Raises:
      UserError: a config.json that is none of timm's, or damaged.
    """
    place = file.with_name("config.json")
    try:
        told = json_files.parse(place.read_bytes(), _Config)
        cfg, entry, size = told.pretrained_cfg, told.pera_jax, told.model_args.img_size
        size = (size, size) if isinstance(size, int) else tuple(size or (cfg.input_size or ())[1:])
        args, patch = told.model_args, told.model_args.patch_size
        sizes = {"depth": args.depth, "width": args.embed_dim or told.num_features, "bands": args.in_chans}
        sizes |= {"patch": patch[0] if isinstance(patch, list) and patch else patch}
        sizes = {name: size for name, size in sizes.items() if isinstance(size, int)}
        found = {"heads": args.num_heads, "mean": cfg.mean, "std": cfg.std, "size": size, "sizes": sizes}
        if entry is None:
            return found
        meta_fields.check_exported(entry)
        exported.check(entry, place)
        if verify and file.name == exported.FILE:
            exported.check_file(entry, place, file)
        bands = Bands.from_metadata(entry)
        if (bands.mean, bands.std) != (cfg.mean, cfg.std):
            raise UserError(
                f"{place} gives one mean and std in pretrained_cfg and another in {exported.ENTRY}; export it anew, or take "
                f"{exported.ENTRY} out of it"
            )
        return found | {"bands": bands.names, "dtype": bands.dtype, "ranges": bands.ranges}
    except FileNotFoundError:
        return {}
    except (OSError, json_files.Invalid) as error:
        raise UserError(f"{place} is no config of timm's ({error}); move {file.name} to a folder without it") from error


# ---------------------------------------------------------------- out


def of_backbone(backbone: dict[str, Any], shape: dict[str, Any], height: int, width: int) -> dict[str, np.ndarray]:
    """timm's arrays, float32, for images of `height` x `width` px.

    Args:
      shape: the `vit.description`.

    Raises:
      UserError: sides that the patch does not divide.
    """
    patch = shape["patch"]
    fit.check_size(height, width, patch)
    backbone = fit.resized(backbone, shape, height // patch, width // patch)
    tree = {"teacher": {"backbone": jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), backbone)}}
    return tables.to_named(tree, table(shape["depth"], shape["split"]), shape["heads"], patch)


def config(meta: dict[str, Any], step: int, which: str, height: int, width: int) -> dict[str, Any]:
    """config.json as timm and the Hugging Face hub read it, with what only this program reads in an entry of its own."""
    shape, bands = meta["model"], Bands.from_metadata(meta)
    return {
        "architecture": ARCHITECTURE,
        "num_classes": 0,
        "num_features": shape["width"],
        "global_pool": "token",
        "model_args": {
            "img_size": [height, width], "patch_size": shape["patch"], "in_chans": shape["bands"],
            "embed_dim": shape["width"], "depth": shape["depth"], "num_heads": shape["heads"],
            "mlp_ratio": shape["mlp_ratio"], "num_classes": 0, "global_pool": "token",
        },
        "pretrained_cfg": {
            "num_classes": 0, "input_size": [shape["bands"], height, width], "fixed_input_size": True, "pool_size": None,
            "interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "squash", "mean": list(bands.mean),
            "std": list(bands.std), "first_conv": "patch_embed.proj", "classifier": "head",
        },
        exported.ENTRY: exported.described(meta, step, which, height, width),
    }  # fmt: skip


def export(weights: Weights, which: str, size: tuple[int, int] | None, output: pathlib.Path) -> None:
    """Writes the folder `output`: model.safetensors, config.json and README.md.

    Args:
      which: the network that `weights` are of, for the card.
      size: (height, width) in px of the images, whose position embedding is stored; None: the training's.

    Raises:
      UserError: a size that does not fit; a folder that is not empty or cannot be written.
    """
    meta = weights.meta
    height, width = size or (meta["model"]["image_size"],) * 2
    named = of_backbone(weights.backbone, meta["model"], height, width)
    with files.whole_folder(output) as folder:
        file, settings = folder / exported.FILE, config(meta, weights.step, which, height, width)
        arrays.write(file, named)
        settings[exported.ENTRY] = exported.sealed(settings[exported.ENTRY], file)
        files.write_json(folder / exported.CONFIG, settings)
        files.write(folder / "README.md", card.text(weights, which, height, width).encode())
