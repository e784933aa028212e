"""Adapts a backbone to other image sizes and other bands than it was trained on."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from einops import rearrange, repeat

from pera_jax.bands import band_order
from pera_jax.common.errors import UserError
from pera_jax.models import vit


def check_size(height: int, width: int, patch: int) -> None:
    """Raises UserError if height or width is not a multiple of the patch size, all in px."""
    if min(height, width) < patch or height % patch or width % patch:
        raise UserError(
            f"the image size {height}x{width} is not a multiple of the patch size {patch} px; choose a multiple"
        )


def repositioned(
    backbone: dict[str, Any], shape: dict[str, Any], position: str, rows: int, columns: int
) -> dict[str, Any]:
    """`backbone` with the position embedding of a network for `rows` x `columns` patches.

    A learned embedding is interpolated, as in the forward pass, or starts as the fixed one of the weights. Fixed
    embeddings are no parameters.

    Args:
      shape: the `vit.description` of the weights' network.
      position: `ViT.position` of the network that they are for.
    """
    if position != "learned":
        return {name: leaf for name, leaf in backbone.items() if name != "position_embedding"}
    side = shape["image_size"] // shape["patch"]
    if (rows, columns) == (side, side) and "position_embedding" in backbone:
        return backbone
    return with_positions(backbone, shape, rows, columns)


def with_positions(backbone: dict[str, Any], shape: dict[str, Any], rows: int, columns: int) -> dict[str, Any]:
    """`backbone` with a position embedding [1 + rows * columns, D] as an array, also if the network has a fixed one."""
    network = vit.build(shape)
    embedding = network.apply({"params": backbone}, rows, columns, method=network.positions)
    return backbone | {"position_embedding": embedding}


def rescaled(backbone: dict[str, Any], layer_scale: bool) -> dict[str, Any]:
    """`backbone` with or without LayerScale, and the same output: the gains are multiplied into the linear layers
    before them, or start as ones."""
    result = dict(backbone)
    for name in ("lower", "upper"):
        stack = dict(backbone[name])
        for number, (module, layer) in enumerate((("attention", "projection"), ("mlp", "out")), start=1):
            gain, last = stack.pop(f"layer_scale_{number}", None), stack[module][layer]  # gain: [depth, D]
            if layer_scale:
                stack[f"layer_scale_{number}"] = np.ones_like(last["bias"]) if gain is None else gain
            elif gain is not None:
                gains = np.expand_dims(gain, tuple(range(1, last["kernel"].ndim - 1)))  # [depth, 1, ..., D]
                scaled = {"kernel": last["kernel"] * gains, "bias": last["bias"] * gain}
                stack[module] = stack[module] | {layer: scaled}
        result[name] = stack
    return result


def rebanded(backbone: dict[str, Any], patch: int, there: Sequence[str], here: Sequence[str]) -> dict[str, Any]:
    """Adapts the patch projection of `backbone` from the bands `there` to the bands `here`.

    With the same number of bands, each takes the weights of its counterpart (`band_order`). With another number, every
    band takes the mean over the old bands, scaled by old number / new number, so that an image with equal bands keeps
    its output.
    """
    kernel = np.asarray(backbone["patch_projection"]["kernel"])  # [p q C, D]
    kernel = rearrange(kernel, "(p q c) d -> p q c d", p=patch, q=patch)
    order = band_order(there, here)
    if order is None:
        mean = kernel.mean(axis=2) * np.float32(len(there) / len(here))
        kernel = repeat(mean, "p q d -> p q c d", c=len(here))
    else:
        kernel = kernel[:, :, order]
    kernel = rearrange(kernel, "p q c d -> (p q c) d")
    return backbone | {"patch_projection": backbone["patch_projection"] | {"kernel": kernel}}
