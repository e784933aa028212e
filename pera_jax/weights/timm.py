"""Import and export with the parameter names of timm's VisionTransformer, as used by DINO, DINOv2, MAE and supervised
ViTs.

Arrays that are not part of the ViT are ignored: classifiers (`head.*`), the decoder and the mask token of pre-training.
LayerScale, `x + gamma * (W y + b)`, is folded into the preceding linear layer, `(gamma W) y + gamma b`: the same
function up to one more rounding of each weight.

Weight files contain neither the activation nor the epsilon of the norms. This program uses exact GELU and 1e-6, as the
ViTs above do; others, such as CLIP's (QuickGELU), would give wrong features.
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

_IGNORED = re.compile(r"(head\.|decoder_).*|mask_token")
# in order of preference
_PREFIXES = ("", "teacher.backbone.", "teacher.", "backbone.", "student.backbone.", "student.")
_PART = re.compile(r"^([^.]*\.[^.]*\.).*")
_CHUNK = re.compile(r"(^|\.)(blocks\.)\d+\.(?=\d+\.)")
_SCALE = re.compile(r"(blocks\.\d+\.)ls([12])\.gamma")
_BLOCK = re.compile(r"(blocks\.\d+\.)")
_SCALED = {"1": "attn.proj", "2": "mlp.fc2"}  # the layer before each LayerScale of a block
ARCHITECTURE = "vit_base_patch16_224"  # timm's entry point; `model_args` overrides all sizes


def table(depth: int, split: int) -> list[tables.Entry]:
    """The entries of `{"teacher": {"backbone": ...}}`."""
    return tables.backbone("", ("teacher", "backbone"), depth, split)


# ---------------------------------------------------------------- in


def without_extras(named: dict[str, np.ndarray], what: str) -> tuple[dict[str, np.ndarray], list[str], list[str]]:
    """Removes arrays that are not part of the ViT and folds LayerScale into the linear layers.

    Args:
      what: the file, for error messages.

    Returns:
      The arrays of the ViT, the names of the ignored arrays, and notes to print about LayerScale.

    Raises:
      Misfit: LayerScale factors that are missing, not finite or of the wrong shape; the error names all of them.
    """
    ignored = sorted(name for name in named if _IGNORED.fullmatch(name))
    scales = {name: _SCALE.fullmatch(name) for name in named}
    scales = {name: match[1] + _SCALED[match[2]] for name, match in scales.items() if match}
    kept = {name: each for name, each in named.items() if name not in scales and name not in ignored}
    if not scales:
        return kept, ignored, []
    blocks = {_BLOCK.match(name)[1] for name in named if _BLOCK.match(name)}
    lacking = {f"{block}ls{number}.gamma" for block in blocks for number in _SCALED} - scales.keys()
    infinite, wrong = {name for name in scales if not np.isfinite(named[name]).all()}, set()
    for name, layer in scales.items():
        weight, bias, gamma = kept.get(f"{layer}.weight"), kept.get(f"{layer}.bias"), named[name]
        if weight is None or bias is None or not (bias.shape == gamma.shape == weight.shape[:1]):
            wrong.add(name)
            continue
        kept[f"{layer}.weight"], kept[f"{layer}.bias"] = gamma[:, None] * weight, gamma * bias
    problems = {
        "lacks": lacking,
        "has NaN or infinite values in": infinite,
        "has factors that do not fit the preceding layer:": wrong,
    }
    tables.check(
        [f"{verb} {every(sorted(found))}" for verb, found in problems.items() if found], f"LayerScale in {what}"
    )
    return kept, ignored, [f"LayerScale of {len(blocks)} blocks is folded into the preceding layers"]


def without_chunks(named: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays with chunked blocks, `blocks.CHUNK.NUMBER` in DINOv2, renamed to `blocks.NUMBER`."""
    return {_CHUNK.sub(r"\1\2", name): array for name, array in named.items()}


@dataclasses.dataclass
class _Pretrained:
    mean: tuple[json_files.Finite, ...] | None = None
    std: tuple[json_files.Finite, ...] | None = None
    # bands, height, width
    input_size: tuple[json_files.Positive, json_files.Positive, json_files.Positive] | None = None


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
    """The fields of timm's config.json that are read."""

    pretrained_cfg: _Pretrained
    model_args: _Arguments = dataclasses.field(default_factory=_Arguments)
    num_features: json_files.Positive | None = None
    pera_jax: dict[str, Any] | None = None


def select_backbone(named: dict[str, np.ndarray], what: str) -> tuple[str, dict[str, np.ndarray], list[str]]:
    """Selects the ViT in a file that may have several networks and heads, as the checkpoints of DINO and DINOv2 do.

    Chunked blocks, `blocks.CHUNK.NUMBER` in DINOv2, are renamed to `blocks.NUMBER`.

    Args:
      what: the file, for error messages.

    Returns:
      The prefix of the selected network, preferring the teacher; its arrays under timm's names; the names of all other
      networks and heads, as `student.backbone.*`.

    Raises:
      UserError: the file has several networks, and none is known to be the teacher.
    """
    found = sorted(
        name.removesuffix("cls_token") for name in named if name == "cls_token" or name.endswith(".cls_token")
    )
    prefix = next((known for known in _PREFIXES if known in found), found[0] if len(found) == 1 else "")
    if prefix not in found and len(found) > 1:
        raise UserError(
            f"{what} has several networks ({several(found)}), none of them known as the teacher; save one of them to a "
            "file of its own"
        )
    kept = without_chunks(
        {name.removeprefix(prefix): each for name, each in named.items() if name.startswith(prefix)}
    )
    return prefix, kept, sorted({_PART.sub(r"\1*", name) for name in named if not name.startswith(prefix)})


def read_config(file: pathlib.Path, verify: bool = True) -> dict[str, Any]:
    """Reads timm's config.json in the folder of `file`; {} if there is none.

    Args:
      verify: check `file` against the digest in config.json, if this program wrote it.

    Returns:
      `heads`, `mean`, `std`, `size` (height and width in px), or None for each; `sizes`, for `tables.check_sizes`; for
      an export of this program also `bands`, `dtype` and `ranges`.

    Raises:
      UserError: a config.json that is damaged or not timm's.
    """
    place = file.with_name("config.json")
    try:
        stored = json_files.parse(place.read_bytes(), _Config)
        cfg, entry, size = stored.pretrained_cfg, stored.pera_jax, stored.model_args.img_size
        size = (size, size) if isinstance(size, int) else tuple(size or (cfg.input_size or ())[1:])
        args, patch = stored.model_args, stored.model_args.patch_size
        sizes = {"depth": args.depth, "width": args.embed_dim or stored.num_features, "bands": args.in_chans}
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
                f"{place} has different mean and std in pretrained_cfg and in {exported.ENTRY}; export the weights "
                f"again, or delete the entry {exported.ENTRY}"
            )
        return found | {"bands": bands.names, "dtype": bands.dtype, "ranges": bands.ranges}
    except FileNotFoundError:
        return {}
    except (OSError, json_files.Invalid) as error:
        raise UserError(f"{place} is not a timm config ({error}); move {file.name} to a folder without it") from error


# ---------------------------------------------------------------- out


def to_timm(backbone: dict[str, Any], shape: dict[str, Any], height: int, width: int) -> dict[str, np.ndarray]:
    """The arrays of a backbone under timm's names, float32, for images of `height` x `width` px.

    Args:
      shape: the `vit.description` of the network.

    Raises:
      UserError: sides that are not multiples of the patch size.
    """
    patch = shape["patch"]
    fit.check_size(height, width, patch)
    backbone = fit.with_positions(backbone, shape, height // patch, width // patch)
    tree = {"teacher": {"backbone": jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), backbone)}}
    scaled = bool(shape.get("layer_scale"))
    entries = tables.backbone("", ("teacher", "backbone"), shape["depth"], shape["split"], layer_scale=scaled)
    return tables.to_named(tree, entries, shape["heads"], patch)


def config(meta: dict[str, Any], step: int, which: str, height: int, width: int) -> dict[str, Any]:
    """The contents of config.json, as read by timm and the Hugging Face Hub, with an additional entry for this
    program."""
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
        } | ({"init_values": shape["layer_scale"]} if "layer_scale" in shape else {}),
        "pretrained_cfg": {
            "num_classes": 0, "input_size": [shape["bands"], height, width], "fixed_input_size": True,
            "pool_size": None, "interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "squash",
            "mean": list(bands.mean), "std": list(bands.std), "first_conv": "patch_embed.proj", "classifier": "head",
        },
        exported.ENTRY: exported.to_dict(meta, step, which, height, width),
    }  # fmt: skip


def export(weights: Weights, which: str, size: tuple[int, int] | None, output: pathlib.Path) -> None:
    """Writes the folder `output`: model.safetensors, config.json and README.md.

    Args:
      which: name of the network, for the model card.
      size: (height, width) of the images in px, for the position embedding; None for the size in training.

    Raises:
      UserError: a size that is not a multiple of the patch size; a folder that is not empty or cannot be written.
    """
    meta = weights.meta
    height, width = size or (meta["model"]["image_size"],) * 2
    named = to_timm(weights.backbone, meta["model"], height, width)
    with files.whole_folder(output) as folder:
        file, settings = folder / exported.FILE, config(meta, weights.step, which, height, width)
        arrays.write(file, named)
        settings[exported.ENTRY] = exported.with_digests(settings[exported.ENTRY], file)
        files.write_json(folder / exported.CONFIG, settings)
        files.write(folder / "README.md", card.text(weights, which, height, width).encode())
