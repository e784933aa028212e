"""What the last block makes of whole images: patch tokens as colors, and where the class token attends."""

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
    "The color of a patch is its token after the last block: the first three principal components of the tokens of "
    "all these images, as red, green and blue. The axes are the same in all images, so patches of one color are alike "
    "to the network wherever they lie. A trained network gives what belongs together one color, the untrained one "
    "(with axes of its own) mostly repeats brightness and edges."
)
ATTENTION_READING = (
    "How much of what the class token takes in the last block comes from each patch, for each head and averaged over "
    "the heads. A map runs from dark blue (nothing) to yellow (what only {full:.0f} % of its patches exceed); its "
    "largest value stands below it, and an even spread over all tokens would be {even:.2%} everywhere."
)
_MOST_HEADS, _HEADS_IN_A_ROW = 12, 6  # shown
_PATCHES = 32  # along a side of a shown image
BRIGHT = 2.0  # percent of the patches that are yellow
_FULL = (2.0, 98.0)  # percentiles of a component that are black and full color


@dataclasses.dataclass(frozen=True)
class Looked:
    """Tokens of N images after the last block and the final norm, and the attention in it.

    Attributes:
      patches: float32 [N, h, w, D].
      attention: float32 [N, H, 1 + h w], the class token's over all tokens (itself first) by head; adds up to 1.
    """

    patches: np.ndarray
    attention: np.ndarray


def look(meta: dict[str, Any], backbones: Sequence[dict[str, Any]], images: Sequence[np.ndarray]) -> list[Looked]:
    """What each of several networks of one shape makes of images.

    Args:
      meta: of their checkpoint; backbones: the parameters of each ViT.
      images: stored values [S, S, C], S a multiple of the patch; one after the other, since attention takes memory.
    """
    model, bands = vit.build(meta["model"]), Bands.from_metadata(meta)

    @jax.jit
    def encode(backbone, image):
        tokens = model.apply({"params": backbone}, bands.normalized(image)[None], class_attention=True)
        return tokens["patch_tokens"][0], tokens["class_attention"][0]

    found, rows = [], len(images[0]) // model.patch
    for backbone in backbones:
        patches, attention = zip(*(jax.device_get(encode(backbone, image)) for image in images), strict=True)
        found.append(Looked(rearrange(np.stack(patches), "n (h w) d -> n h w d", h=rows), np.stack(attention)))
    return found


def default_size(model: dict[str, Any]) -> int:
    """The side of shown images, px: 32 patches for the detail, or that of the global crops if it is more."""
    return max(_PATCHES * model["patch"], model["image_size"])


def components(tokens: np.ndarray, number: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """The first principal components of `tokens` [M, D].

    Returns:
      (scores float64 [M, number]; the share of the variance of each). The sign of a component is the one with which the
      cubes of its scores add up to more than zero: its longer tail is bright.
    """
    tokens = np.asarray(tokens, np.float64)
    centered = tokens - tokens.mean(axis=0)
    variances, axes = np.linalg.eigh(centered.T @ centered)  # ascending
    scores = centered @ axes[:, ::-1][:, :number]
    signs = np.where(np.sum(scores**3, axis=0) < 0.0, -1.0, 1.0)
    shares = variances[::-1][:number] / max(variances.sum(), np.finfo(np.float64).tiny)
    return scores * signs, shares


def colors(patches: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [N, h, w, D] as colors uint8 [N, h, w, 3], on axes that all N images share; the share of each axis."""
    number = min(3, patches.shape[-1])
    scores, shares = components(patches.reshape(-1, patches.shape[-1]), number)
    low, high = np.percentile(scores, _FULL, axis=0)
    values = np.zeros((len(scores), 3))
    values[:, :number] = (scores - low) / np.maximum(high - low, 1e-12)
    return as_bytes(values, (0, 1, 2)).reshape(*patches.shape[:3], 3), shares


def heat(values: np.ndarray) -> np.ndarray:
    """Values in [0, 1] on the perceptually uniform scale viridis, uint8 [..., 3]."""
    table = np.array(treescope.default_sequential_colormap.get(), np.float64)  # [20, 3]
    places = np.clip(values, 0.0, 1.0) * (len(table) - 1)
    bands = [np.interp(places, np.arange(len(table)), table[:, band]) for band in range(3)]
    return np.round(np.stack(bands, axis=-1)).astype(np.uint8)


def pca_grid(shown: Sequence[Shown], rgb: np.ndarray, maps: dict[str, np.ndarray], class_names) -> Grid:
    """Images beside their maps, two images a row.

    Args:
      rgb: uint8 [N, S, S, 3].
      maps: by name, colors uint8 [N, h, w, 3].
    """
    cells = []
    for entry, image, *colors_of in zip(shown, rgb, *maps.values(), strict=True):
        named = Tile(image, name_of(entry.label, class_names) or entry.key)
        cells.append((named, *(Tile(of, exact=True) for of in colors_of)))
    each = 2 if len(cells) > 1 else 1
    rows = tuple(sum(cells[first : first + each], ()) for first in range(0, len(cells), each))
    return Grid(("image", *maps) * each, rows, 1176 // (each * (1 + len(maps))) - 8)


def attention_grid(shown: Sequence[Shown], rgb: np.ndarray, attention: np.ndarray, class_names) -> Grid:
    """Images, the mean over the heads and each head.

    Args:
      rgb: uint8 [N, S, S, 3].
      attention: [N, H, 1 + h w].
    """
    heads = min(attention.shape[1], _MOST_HEADS)
    maps = np.concatenate([attention.mean(axis=1, keepdims=True), attention[:, :heads]], axis=1)  # [N, 1 + H, 1 + h w]
    side = round((maps.shape[2] - 1) ** 0.5)
    rows, across = [], min(heads, _HEADS_IN_A_ROW)
    for entry, image, of in zip(shown, rgb, maps[:, :, 1:], strict=True):
        tiles = []
        for place, values in enumerate(of):
            full = max(float(np.percentile(values, 100.0 - BRIGHT)), 1e-12)  # a few patches would darken all others
            name = f"head {place}: " if place else ""
            map_ = _over(image, heat(values.reshape(side, side) / full))
            tiles.append(Tile(map_, f"{name}at most {values.max():.1%}"))
        rows.append((Tile(image, name_of(entry.label, class_names) or entry.key), *tiles[: 1 + across]))
        for first in range(1 + across, len(tiles), across):
            rows.append((None, None, *tiles[first : first + across]))
    names = ("image", "mean of the heads", "heads", *[""] * (across - 1))
    return Grid(names, tuple(rows), min(1176 // len(names) - 8, 220))


def _over(image: np.ndarray, color: np.ndarray) -> np.ndarray:
    """A map [h, w, 3] over the gray image [S, S, 3], a patch as a square."""
    factor = len(image) // len(color)
    wide = color.repeat(factor, axis=0).repeat(factor, axis=1).astype(np.float64)
    gray = image.mean(axis=2, keepdims=True)  # 0 to 255; half as bright at the darkest
    return np.round(wide * (0.45 + 0.55 * gray / 255.0)).astype(np.uint8)
