"""Patch tokens of the last block as PCA colors, and attention maps of the class token."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import treescope
from einops import rearrange

from pera_jax.bands import Bands, as_bytes
from pera_jax.models import vit
from pera_jax.reports.drawing.grid import Grid, Tile
from pera_jax.reports.drawing.images import Shown, name_of

PCA_READING = (
    "The first three principal components of the patch tokens after the last block, as red, green and blue. The "
    "components are shared by all images, so patches of the same color have similar features. A trained network gives "
    "the same color to similar objects; the untrained one (with components of its own) mostly shows brightness and "
    "edges."
)
ATTENTION_READING = (
    "Attention of the class token to each patch in the last block, for each head and averaged over heads. The scale "
    "runs from dark blue (0) to yellow (exceeded by {full:.0f}% of the patches); the maximum is below each map. "
    "Uniform attention over all tokens would be {even:.2%}."
)
_MOST_HEADS, _HEADS_IN_A_ROW = 12, 6  # shown
_PATCHES = 32  # along each side of a shown image
BRIGHT = 2.0  # percent of the patches that are yellow
_FULL = (2.0, 98.0)  # percentiles of a component mapped to 0 and 255


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Patch tokens of N images after the final norm, and the attention of the class token in the last block.

    Attributes:
      patches: float32 [N, h, w, D].
      attention: float32 [N, H, 1 + h w], attention over all tokens (the class token first) by head; sums to 1.
    """

    patches: np.ndarray
    attention: np.ndarray


def encode(meta: dict[str, Any], backbones: Sequence[dict[str, Any]], images: Sequence[np.ndarray]) -> list[Encoded]:
    """Encodes images with several networks of the same shape.

    Args:
      meta: metadata of their checkpoint.
      backbones: parameters of each network.
      images: stored values [S, S, C], S a multiple of the patch size; encoded one at a time to limit memory.
    """
    model, bands = vit.build(meta["model"]), Bands.from_metadata(meta)

    @jax.jit
    def apply(backbone, image):
        tokens = model.apply({"params": backbone}, bands.normalized(image)[None], class_attention=True)
        return tokens["patch_tokens"][0], tokens["class_attention"][0]

    found, rows = [], len(images[0]) // model.patch
    for backbone in backbones:
        patches, attention = zip(*(jax.device_get(apply(backbone, image)) for image in images), strict=True)
        found.append(Encoded(rearrange(np.stack(patches), "n (h w) d -> n h w d", h=rows), np.stack(attention)))
    return found


def default_size(model: dict[str, Any]) -> int:
    """The default side of shown images in px: 32 patches, or the size of the global crops if that is larger."""
    return max(_PATCHES * model["patch"], model["image_size"])


def components(tokens: np.ndarray, number: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """The first principal components of `tokens` [M, D].

    Returns:
      (scores float64 [M, number], explained variance ratio of each). Signs are chosen for a positive third moment, so
      that the longer tail is bright.
    """
    tokens = np.asarray(tokens, np.float64)
    centered = tokens - tokens.mean(axis=0)
    variances, axes = np.linalg.eigh(centered.T @ centered)  # ascending
    scores = centered @ axes[:, ::-1][:, :number]
    signs = np.where(np.sum(scores**3, axis=0) < 0.0, -1.0, 1.0)
    ratios = variances[::-1][:number] / max(variances.sum(), np.finfo(np.float64).tiny)
    return scores * signs, ratios


def colors(patches: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """PCA colors uint8 [N, h, w, 3] of tokens [N, h, w, D], with components shared by all images; and the explained
    variance ratio of each component."""
    number = min(3, patches.shape[-1])
    scores, ratios = components(patches.reshape(-1, patches.shape[-1]), number)
    low, high = np.percentile(scores, _FULL, axis=0)
    values = np.zeros((len(scores), 3))
    values[:, :number] = (scores - low) / np.maximum(high - low, 1e-12)
    return as_bytes(values, (0, 1, 2)).reshape(*patches.shape[:3], 3), ratios


def heat(values: np.ndarray) -> np.ndarray:
    """Values in [0, 1] as viridis colors, uint8 [..., 3]."""
    table = np.array(treescope.default_sequential_colormap.get(), np.float64)  # [20, 3]
    positions = np.clip(values, 0.0, 1.0) * (len(table) - 1)
    bands = [np.interp(positions, np.arange(len(table)), table[:, band]) for band in range(3)]
    return np.round(np.stack(bands, axis=-1)).astype(np.uint8)


def pca_grid(shown: Sequence[Shown], rgb: np.ndarray, maps: dict[str, np.ndarray], class_names) -> Grid:
    """Images with their maps, two images per row.

    Args:
      rgb: uint8 [N, S, S, 3].
      maps: by name, colors uint8 [N, h, w, 3].
    """
    cells = []
    for entry, image, *colored in zip(shown, rgb, *maps.values(), strict=True):
        named = Tile(image, name_of(entry.label, class_names) or entry.key)
        cells.append((named, *(Tile(each, exact=True) for each in colored)))
    each = 2 if len(cells) > 1 else 1
    rows = tuple(sum(cells[first : first + each], ()) for first in range(0, len(cells), each))
    return Grid(("image", *maps) * each, rows, 1176 // (each * (1 + len(maps))) - 8)


def attention_grid(shown: Sequence[Shown], rgb: np.ndarray, attention: np.ndarray, class_names) -> Grid:
    """Images with the attention averaged over heads and of each head.

    Args:
      rgb: uint8 [N, S, S, 3].
      attention: [N, H, 1 + h w].
    """
    heads = min(attention.shape[1], _MOST_HEADS)
    maps = np.concatenate([attention.mean(axis=1, keepdims=True), attention[:, :heads]], axis=1)  # [N, 1 + H, 1 + h w]
    side = round((maps.shape[2] - 1) ** 0.5)
    rows, across = [], min(heads, _HEADS_IN_A_ROW)
    for entry, image, attended in zip(shown, rgb, maps[:, :, 1:], strict=True):
        tiles = []
        for head, values in enumerate(attended):
            # the maximum would darken all other patches
            full = max(float(np.percentile(values, 100.0 - BRIGHT)), 1e-12)
            name = f"head {head}: " if head else ""
            map_ = _over(image, heat(values.reshape(side, side) / full))
            tiles.append(Tile(map_, f"{name}max {values.max():.1%}"))
        rows.append((Tile(image, name_of(entry.label, class_names) or entry.key), *tiles[: 1 + across]))
        for first in range(1 + across, len(tiles), across):
            rows.append((None, None, *tiles[first : first + across]))
    names = ("image", "mean of the heads", "heads", *[""] * (across - 1))
    return Grid(names, tuple(rows), min(1176 // len(names) - 8, 220))


def _over(image: np.ndarray, color: np.ndarray) -> np.ndarray:
    """A map [h, w, 3] of patches over the gray image [S, S, 3]."""
    factor = len(image) // len(color)
    wide = color.repeat(factor, axis=0).repeat(factor, axis=1).astype(np.float64)
    gray = image.mean(axis=2, keepdims=True)  # 0 to 255; half as bright at the darkest
    return np.round(wide * (0.45 + 0.55 * gray / 255.0)).astype(np.uint8)
