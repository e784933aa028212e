"""Drop path (stochastic depth, Huang et al., arXiv:1603.09382): residual branches are skipped at random, crop by crop.

`DropPath` saves compute: a branch runs only on a random subset of the crops. Each group of `g` crops keeps exactly
`max(floor((1 - rate) g), 1)` of them, with the same rate in all blocks. The group size is a config field, and each
group lies on one device, so the result does not depend on the mesh and the gathers need no communication.

`GrowingDropPath` has a rate that grows linearly over the blocks, as in DINO (Caron et al., arXiv:2104.14294). The
number of crops that a block keeps would then differ from block to block, but a loop over blocks is compiled once. So
each crop is dropped independently with the block's rate, and branches run on all crops: it saves no compute.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple, no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int32, Key


@no_type_check  # as a pytree, it also holds what JAX puts in place of arrays: shapes, shardings, None
@functools.partial(jax.tree_util.register_dataclass, data_fields=("key", "places"), meta_fields=("rate", "group"))
@dataclasses.dataclass(frozen=True)
class DropPath:
    """The drop path of one forward pass.

    Attributes:
      key: a PRNG key.
      places: int32 [G], the index of each group in the whole batch. Each group's draw depends on this index, so that
        microbatches draw the same as the whole batch.
      rate: the fraction of the crops that is skipped.
      group: number of crops per group.
    """

    key: jax.Array
    places: jax.Array
    rate: float
    group: int

    def of_blocks(self, stream: int, first: int, length: int) -> Key[jax.Array, " {length}"]:
        """What the blocks of a stack need besides `self`, with a leading axis of `length` blocks: a key each.

        Args:
          stream: number of the stack. first: number of the stack's first block.
        """
        return jax.random.split(jax.random.fold_in(self.key, stream), length)

    def of_branches(self, block: Key[jax.Array, ""]) -> tuple["DropPath", "DropPath"]:
        """The drop path of both branches of a block; `block`: its entry of `of_blocks`."""
        first, second = jax.random.split(block)
        return dataclasses.replace(self, key=first), dataclasses.replace(self, key=second)


@no_type_check  # as `DropPath`
@functools.partial(jax.tree_util.register_dataclass, data_fields=("key", "places"), meta_fields=("rate", "depth"))
@dataclasses.dataclass(frozen=True)
class GrowingDropPath:
    """A drop path of one forward pass whose rate grows linearly, from 0 in the first block to `rate` in the last.

    Attributes:
      key: a PRNG key.
      places: int32 [B], the index of each crop in the whole batch, on which its draws depend.
      rate: the probability that a crop skips a branch of the last block.
      depth: number of blocks, at least 2.
    """

    key: jax.Array
    places: jax.Array
    rate: float
    depth: int

    def of_blocks(self, stream: int, first: int, length: int) -> tuple[jax.Array, jax.Array]:
        """As `DropPath.of_blocks`: keys and rates."""
        keys = jax.random.split(jax.random.fold_in(self.key, stream), length)
        return keys, self.rate * jnp.arange(first, first + length, dtype=jnp.float32) / (self.depth - 1)

    def of_branches(self, block: tuple[jax.Array, jax.Array]) -> tuple["PerCrop", "PerCrop"]:
        key, rate = block
        first, second = jax.random.split(key)
        return PerCrop(first, self.places, rate), PerCrop(second, self.places, rate)


class PerCrop(NamedTuple):
    """The drop path of one branch that drops each crop independently; attributes as in `GrowingDropPath`, `rate` is
    float32 []."""

    key: jax.Array
    places: jax.Array
    rate: jax.Array

    def factors(self) -> Float[jax.Array, " B"]:
        """What the branch's output is multiplied by for each crop: 0 if it is dropped, else 1 / (1 - rate)."""
        words = jax.vmap(lambda place: jax.random.uniform(jax.random.fold_in(self.key, place), (), jnp.float32))
        kept = words(self.places) < 1 - self.rate
        return jnp.where(kept, 1 / (1 - self.rate), 0.0)


def kept_of(group: int, rate: float) -> int:
    """The number of crops of a group that are kept, that is, on which the branch runs."""
    # In floating point 0.7 * 10 can be 6.999999999999999; rounding recovers the decimal product.
    return max(math.floor(round((1.0 - rate) * group, 9)), 1)


def kept_fraction(rate: float, group: int, crops: int) -> float:
    """The fraction of the crops that are kept, of `crops` per image in groups of `group` images; for groups of all
    images (0), it is not rounded to whole crops."""
    return kept_of(group * crops, rate) / (group * crops) if group and rate else 1.0 - rate


def by_type(
    key: Key[jax.Array, ""], places: Int32[jax.Array, " b"], crops: Mapping[str, int], rate: float, group: int,
    depth: int | None = None,
) -> dict[str, DropPath | GrowingDropPath | None]:  # fmt: skip
    """The drop path of each crop type, independent of each other; None if `rate` is 0.

    Args:
      places: the index of each image in the whole batch.
      crops: the number of crops per image by type; crops are batch-major.
      group: images per group of a `DropPath`, or 0 for all of `places`.
      depth: number of blocks for a `GrowingDropPath`; None for a `DropPath`.
    """
    result: dict[str, DropPath | GrowingDropPath | None] = {}
    images = group or len(places)
    for index, (name, number) in enumerate(crops.items()):
        type_key = jax.random.fold_in(key, index)
        if not rate:
            result[name] = None
        elif depth is None:
            result[name] = DropPath(type_key, places[::images] // images, rate, images * number)
        else:
            rows = (places[:, None] * number + jnp.arange(number, dtype=places.dtype)).reshape(-1)  # [b V]
            result[name] = GrowingDropPath(type_key, rows, rate, depth)
    return result


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _take(x: jax.Array, order: jax.Array, inverse: jax.Array, kept: int) -> jax.Array:
    return jnp.take_along_axis(x, order[:, :kept, None, None], axis=1)  # [G, g, N, D] -> [G, k, N, D]


@jax.custom_vjp
def _put(y: jax.Array, order: jax.Array, inverse: jax.Array) -> jax.Array:
    padding = [(0, 0), (0, order.shape[1] - y.shape[1]), (0, 0), (0, 0)]
    return jnp.take_along_axis(jnp.pad(y, padding), inverse[:, :, None, None], axis=1)  # [G, k, N, D] -> [G, g, N, D]


# The transpose of a gather is a scatter, which is slow and, when sharded, not deterministic. Here the indices come from
# a permutation, so the two functions are each other's transpose and both are gathers.
_take.defvjp(
    lambda x, order, inverse, kept: (_take(x, order, inverse, kept), (order, inverse)),
    lambda kept, indices, g: (_put(g, *indices), None, None),
)
_put.defvjp(
    lambda y, order, inverse: (_put(y, order, inverse), (order, inverse, y.shape[1])),
    lambda saved, g: (_take(g, *saved), None, None),
)


def residual(
    branch: Callable[[jax.Array], jax.Array], x: Float[jax.Array, "B N D"], drop_path: DropPath | PerCrop | None
) -> Float[jax.Array, "B N D"]:
    """`x + branch(x)`, with the branch applied to a random subset of each group of crops and scaled by `group / kept`;
    or with the branch of each crop times `PerCrop.factors`.

    Args:
      branch: maps [n, N, D] to [n, N, D].
      drop_path: for G groups of g crops, B = G g; None: the branch runs on every crop.
    """
    if isinstance(drop_path, PerCrop):
        return x + branch(x).astype(x.dtype) * drop_path.factors().astype(x.dtype)[:, None, None]
    if drop_path is None or drop_path.rate == 0.0:
        return x + branch(x).astype(x.dtype)
    groups, group, kept = len(drop_path.places), drop_path.group, kept_of(drop_path.group, drop_path.rate)
    words = jax.vmap(lambda place: jax.random.bits(jax.random.fold_in(drop_path.key, place), (group,)))(
        drop_path.places
    )
    order = jnp.argsort(words, axis=1).astype(jnp.int32)  # [G, g]
    inverse = jnp.argsort(order, axis=1).astype(jnp.int32)  # [G, g]
    grouped = x.reshape(groups, group, *x.shape[1:])  # [G, g, N, D]
    subset = _take(grouped, order, inverse, kept)  # [G, k, N, D]
    result = branch(subset.reshape(groups * kept, *x.shape[1:]))  # [G k, N, D]
    result = (result.astype(x.dtype) * (group / kept)).reshape(subset.shape)
    return x + _put(result, order, inverse).reshape(x.shape)
