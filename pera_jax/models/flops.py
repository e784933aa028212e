"""FLOPs of the networks' matrix products in a forward pass, computed from their sizes: 2 m n k each.

A backward pass costs twice the forward pass. `TRAINED` is the factor of forward and backward for layers whose inputs
need a gradient, `TRAINED_FIRST` for the first layer, whose inputs are pixels.
"""

from typing import Any

TRAINED, TRAINED_FIRST, FORWARD = 3, 2, 1


def block(vit: Any, tokens: int) -> int:
    """One block of a `ViT`, for one crop of `tokens` tokens."""
    width, hidden = vit.width, int(vit.width * vit.mlp_ratio)
    projections = 2 * tokens * width * (3 * width + width)  # query, key, value; output
    attention = 2 * 2 * tokens * tokens * width  # scores; mixing
    return projections + attention + 2 * 2 * tokens * width * hidden


def embedding(vit: Any, patches: int) -> int:
    """The projection of `patches` patches."""
    return 2 * patches * vit.patch**2 * vit.bands * vit.width


def head(head: Any, width: int) -> int:
    """A `Head` and its last layer, for one token of size `width`."""
    mlp = width * head.hidden + head.hidden**2 + head.hidden * head.bottleneck
    return 2 * (mlp + head.bottleneck * head.outputs)


def layers(*widths: int) -> int:
    """Linear layers from each of the `widths` to the next one, for one token."""
    return 2 * sum(inputs * outputs for inputs, outputs in zip(widths, widths[1:]))
