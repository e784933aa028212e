"""Drop path (stochastic depth) that saves compute: a residual branch runs only on a random subset of the crops.

Each group of `g` crops keeps exactly `max(floor((1 - rate) g), 1)` of them. The group size is a config field, and each
group lies on one device, so the result does not depend on the mesh and the gathers need no communication.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Float


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


def kept_of(group: int, rate: float) -> int:
    """The number of crops of a group that are kept, that is, on which the branch runs."""
    # In floating point 0.7 * 10 can be 6.999999999999999; rounding recovers the decimal product.
    return max(math.floor(round((1.0 - rate) * group, 9)), 1)


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
    branch: Callable[[jax.Array], jax.Array], x: Float[jax.Array, "B N D"], drop_path: DropPath | None
) -> Float[jax.Array, "B N D"]:
    """`x + branch(x)`, with the branch applied to a random subset of each group of crops and scaled by `group / kept`.

    Args:
      branch: maps [n, N, D] to [n, N, D].
      drop_path: for G groups of g crops, B = G g; None: the branch runs on every crop.
    """
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
