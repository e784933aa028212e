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

from pera_jax import checkpoint, files
from pera_jax.bands import Bands
from pera_jax.common import json_files
from pera_jax.common.text import several
from pera_jax.errors import UserError
from pera_jax.weights import arrays, card, exported, fit, tables

_LEFT_OUT = re.compile(r"(head\.|decoder_).*|mask_token")
_SCALE = re.compile(r"(blocks\.\d+\.)ls([12])\.gamma")
_SCALED = {"1": "attn.proj", "2": "mlp.fc2"}  # what each of a block's two factors follows
ARCHITECTURE = "vit_base_patch16_224"  # timm's entry point; `model_args` says all of its sizes anew


def table(depth: int, split: int) -> list[tables.Entry]:
    """The entries of `{"teacher": {"backbone": ...}}`."""
    return tables.backbone("", ("teacher", "backbone"), depth, split)


# ---------------------------------------------------------------- in


def without_extras(named: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], list[str]]:
    """The ViT of a file with LayerScale multiplied in, and the names of what is left out.

    Raises:
      UserError: factors that do not fit their layer; all are named.
    """
    left_out = sorted(name for name in named if _LEFT_OUT.fullmatch(name))
    scales = {name: _SCALE.fullmatch(name) for name in named}
    scales = {name: match[1] + _SCALED[match[2]] for name, match in scales.items() if match}
    kept = {name: each for name, each in named.items() if name not in scales and name not in left_out}
    wrong = []
    for name, layer in scales.items():
        weight, bias, gamma = kept.get(f"{layer}.weight"), kept.get(f"{layer}.bias"), named[name]
        if weight is None or bias is None or not (bias.shape == gamma.shape == weight.shape[:1]):
            wrong.append(name)
            continue
        kept[f"{layer}.weight"], kept[f"{layer}.bias"] = gamma[:, None] * weight, gamma * bias
    if wrong:
        raise UserError(f"LayerScale does not fit the layer before it: {several(sorted(wrong), tables.NAMED)}")
    return kept, left_out


@dataclasses.dataclass
class _Pretrained:
    mean: tuple[json_files.Finite, ...] | None = None
    std: tuple[json_files.Finite, ...] | None = None


@dataclasses.dataclass
class _Arguments:
    num_heads: json_files.Positive | None = None


@dataclasses.dataclass
class _Config:
    """What is read of timm's config.json."""

    pretrained_cfg: _Pretrained
    model_args: _Arguments = dataclasses.field(default_factory=_Arguments)


def beside(file: pathlib.Path) -> dict[str, Any]:
    """What timm's config.json in the folder of `file` says, where there is one: `heads`, `mean`, `std`, or None for each.

    Raises:
      UserError: a config.json that is none of timm's.
    """
    place = file.with_name("config.json")
    try:
        told = json_files.parse(place.read_bytes(), _Config)
        return {"heads": told.model_args.num_heads, "mean": told.pretrained_cfg.mean, "std": told.pretrained_cfg.std}
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
    shape, bands = meta["model"], Bands.of(meta)
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


def export(weights: checkpoint.Weights, which: str, size: tuple[int, int] | None, output: pathlib.Path) -> None:
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
        arrays.write(folder / exported.FILE, named)
        files.write_json(folder / "config.json", config(meta, weights.step, which, height, width))
        files.write(folder / "README.md", card.text(weights, which, height, width).encode())
