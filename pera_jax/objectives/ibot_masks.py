"""Block masks of iBOT (Zhou et al., arXiv:2111.07832), drawn as DINOv2 draws them (arXiv:2304.07193).

Half of the global crops are masked, with ratios that are spread evenly over a range. The host draws the masks in groups
of images, and each group has a fixed bound for its masked patches, so that the device gathers them into a buffer of
fixed size.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int32, UInt8

from pera_jax.common.errors import UserError
from pera_jax.parallel import sharding

_VIEWS = 2  # global crops per image
_TRIES = 10  # to place a block
_CHUNK = 512  # uniform numbers drawn at a time, which is much faster than one by one


@dataclasses.dataclass(frozen=True)
class BlockMasks:
    """Masks of the two global crops of each image: `base.HostDraws` with the entry "masks", uint8 [g, 2, L].

    1 marks a masked patch; patches are in raster order. Of the 2g crops of a group, `floor(probability 2g)` are masked:
    the range `ratio` is cut into as many equal strata, the masked crop of stratum i draws a ratio r uniformly in it and
    is to have `floor(r L)` masked patches, and the crops are shuffled. A mask may have fewer, see `block_mask`.

    Attributes:
      side: of the square grid of patches, L = side^2.
      group: g, number of images drawn together.
      probability: fraction of the crops that are masked.
      ratio: range of the masked fraction of a masked crop.
      smallest: area of the smallest block, in patches.
      aspect: smallest ratio of a block's height and width; the largest is its inverse.
    """

    side: int
    group: int
    probability: float = 0.5
    ratio: tuple[float, float] = (0.1, 0.5)
    smallest: int = 4
    aspect: float = 0.3

    @property
    def patches(self) -> int:
        """L, number of patches of a crop."""
        return self.side**2

    @property
    def edges(self) -> list[float]:
        """The n + 1 edges of the strata of n masked crops per group, ascending."""
        # In floating point 0.7 * 10 can be 6.999999999999999; rounding recovers the decimal product.
        masked = math.floor(round(self.probability * _VIEWS * self.group, 9))
        return np.linspace(*self.ratio, masked + 1).tolist()

    @property
    def bound(self) -> int:
        """The largest possible number of masked patches of a group, the sum of the upper ends of its strata."""
        return sum(int(self.patches * edge) for edge in self.edges[1:])

    def shapes(self) -> dict[str, tuple[tuple[int, ...], Any]]:
        """Shape without the axis of images, and dtype."""
        return {"masks": ((_VIEWS, self.patches), np.uint8)}

    def draw(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Draws the masks of one group, uint8 [g, 2, L]."""
        edges, uniform = self.edges, _uniform(rng)
        masks = np.zeros((self.group * _VIEWS, self.patches), np.uint8)
        places = rng.permutation(len(masks))[: len(edges) - 1]
        for place, low, high in zip(places, edges, edges[1:], strict=False):
            wanted = int(self.patches * min(low + (high - low) * next(uniform), high))
            masks[place] = block_mask(uniform, wanted, self.side, self.smallest, self.aspect)
        return {"masks": masks.reshape(self.group, _VIEWS, self.patches)}


def block_mask(uniform: Iterator[float], wanted: int, side: int, smallest: int, aspect: float) -> np.ndarray:
    """A mask uint8 [side^2] of rectangular blocks with at most `wanted` masked patches, usually exactly as many.

    Blocks are added until the mask has `wanted` patches. Each is tried up to ten times: area uniform between `smallest`
    and the smaller of the number still missing and half of the grid (in reverse where that is less than `smallest`),
    height / width log-uniform between `aspect` and its inverse, both smaller than `side`, position uniform. A try
    succeeds if it adds at least one patch and at most as many as are missing; after ten failures the mask is left as it
    is.

    Args:
      uniform: random numbers in [0, 1).
    """
    # The mask and its blocks are integers with one bit per patch, so that placing a block takes a few operations.
    columns = [sum(1 << side * row for row in range(height)) for height in range(side)]  # of that height, at the left
    mask, missing, log_aspect = 0, wanted, math.log(aspect)
    while missing:
        for _ in range(_TRIES):
            area = smallest + (min(missing, 0.5 * side**2) - smallest) * next(uniform)
            ratio = math.exp(log_aspect * (1.0 - 2.0 * next(uniform)))
            height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if not (0 < height < side and 0 < width < side):
                continue
            top, left = int((side - height + 1) * next(uniform)), int((side - width + 1) * next(uniform))
            block = columns[height] * ((1 << width) - 1) << top * side + left
            added = (block & ~mask).bit_count()
            if 0 < added <= missing:
                break
        else:
            break
        mask, missing = mask | block, missing - added
    packed = np.frombuffer(mask.to_bytes(-(-(side**2) // 8), "little"), np.uint8)
    return np.unpackbits(packed, count=side**2, bitorder="little")


def _uniform(rng: np.random.Generator) -> Iterator[float]:
    while True:
        yield from rng.random(_CHUNK).tolist()


def check(settings: Any, name: str) -> None:
    """Checks the fields of `config.<name>` for masks.

        mask_probability: fraction of the global crops that are masked
        mask_ratio: range of the masked fraction of their patches
        mask_group: number of images drawn together; `batches.check_group` checks that it fits the batch

    Raises:
      UserError: a field is out of range, or no crop of a group would be masked.
    """
    probability, group, ratio = settings.mask_probability, settings.mask_group, tuple(settings.mask_ratio)
    if group < 1:
        raise UserError(f"{name}.mask_group={group} must be >= 1")
    if not 0 < probability <= 1:
        raise UserError(f"{name}.mask_probability={probability} must lie in (0, 1]")
    if len(ratio) != 2 or not 0 < ratio[0] <= ratio[1] < 1:
        raise UserError(f"{name}.mask_ratio={ratio} must be (low, high) with 0 < low <= high < 1")
    if len(BlockMasks(1, group, probability).edges) < 2:
        raise UserError(
            f"{name}.mask_probability={probability} masks none of the {_VIEWS * group} global crops of "
            f"{name}.mask_group={group} image(s); increase one of them"
        )


def from_config(settings: Any, name: str, side: int) -> BlockMasks:
    """The masks that the fields of `check` describe, for global crops of `side` x `side` patches.

    Raises:
      UserError: the crops are so small that no patch would be masked.
    """
    masks = BlockMasks(side, settings.mask_group, settings.mask_probability, tuple(settings.mask_ratio))
    if side < 2 or not masks.bound:
        raise UserError(
            f"{name}.mask_ratio={masks.ratio} masks no patch of global crops of {masks.patches} patch(es); use larger "
            "crops, smaller patches or a larger ratio"
        )
    return masks


def index_buffer(
    masks: UInt8[jax.Array, "B 2 L"], group: int, bound: int, dtype: Any = jnp.float32
) -> tuple[Int32[jax.Array, "G M"], Float[jax.Array, "G M"]]:
    """The masked patches of each group in a buffer of fixed size, made on the group's device.

    Args:
      group: g, number of images per group, B = G g.
      bound: M, `BlockMasks.bound`.
      dtype: of the weights.

    Returns:
      Indices into the 2 g L patches of the group, ascending, with the crops batch-major: patch l of crop v of the
      group's image i is `(2 i + v) L + l`; and weights: 1 / number of masked patches of the crop. The rest of the
      buffer has index 0 and weight 0.
    """
    patches = masks.shape[-1]

    def of_groups(masked):  # [G, 2 g, L]
        flat = masked.reshape(masked.shape[0], -1)  # [G, 2 g L]
        total = flat.shape[1]
        places = jnp.where(flat, jnp.arange(total, dtype=jnp.int32), total)
        places = jnp.sort(places, axis=1)[:, :bound]  # [G, M]
        filled = places < total
        indices = jnp.where(filled, places, 0)
        counts = jnp.sum(masked, axis=-1, dtype=jnp.int32)  # [G, 2 g]
        weights = 1 / jnp.maximum(jnp.take_along_axis(counts, indices // patches, axis=1), 1).astype(dtype)
        return indices, jnp.where(filled, weights, jnp.zeros((), dtype))  # [G, M] each

    return sharding.per_shard(of_groups, masks.reshape(-1, group * _VIEWS, patches) != 0)


def masked_tokens(
    tokens: Float[jax.Array, "N L D"], masks: UInt8[jax.Array, "B 2 L"], indices: Int32[jax.Array, "G M"]
) -> Float[jax.Array, "G M D"]:
    """The tokens at `indices`, the result of `index_buffer` of `masks`; each group's on its own device.

    No gradient flows through the rows that pad a group. Args: tokens: of N = 2 B crops, batch-major.
    """
    groups = len(indices)
    grouped = tokens.reshape(groups, -1, tokens.shape[-1])  # [G, 2 g L, D]
    return _take(grouped, masks.reshape(groups, -1) != 0, indices)


@jax.custom_vjp
def _take(tokens: jax.Array, masked: jax.Array, indices: jax.Array) -> jax.Array:
    return jnp.take_along_axis(tokens, indices[:, :, None], axis=1)  # [G, T, D] -> [G, M, D]


def _take_backward(masked: jax.Array, g: jax.Array):
    # The transpose of a gather is a scatter, which is slow. A masked patch's row is its number among the masked ones.
    row = jnp.cumsum(masked, axis=1, dtype=jnp.int32) - 1  # [G, T]
    held = masked & (row < g.shape[1])
    rows = jnp.take_along_axis(g, jnp.where(held, row, 0)[:, :, None], axis=1)  # [G, T, D]
    return jnp.where(held[:, :, None], rows, jnp.zeros((), g.dtype)), None, None


_take.defvjp(lambda tokens, masked, indices: (_take(tokens, masked, indices), masked), _take_backward)
