"""The KoLeo regularizer (Sablayrolles et al., arXiv:1806.03198), which spreads the prototype outputs `z = W u`, or
tokens.

Written per device (`shard_map`): `W^T W` is computed once a step, and a group that spans devices gathers the rows of
the others. The docstring shows the naive loop; the code materializes no array of batch x prototypes.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Float

from pera_jax.models.precision import Precision
from pera_jax.parallel import sharding

_EPS = 1e-8


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gram(precision: Precision, weights: jax.Array) -> jax.Array:
    """`W^T W` [D, D] of `weights` [K, D]."""
    return precision.wide_einsum("kd,ke->de", weights, weights)


# One product over the prototypes instead of the two of the product rule.
_gram.defvjp(
    lambda precision, weights: (_gram(precision, weights), weights),
    lambda precision, weights, cotangent: (precision.wide_einsum("kd,de->ke", weights, cotangent + cotangent.T),),
)


@jax.named_scope("koleo")
def koleo(
    units: Float[jax.Array, "B V D"], weights: Float[jax.Array, "K D"] | None, group: int, precision: Precision
) -> Float[jax.Array, ""]:
    """The KoLeo term, summed over crops: minus the mean log distance to the nearest other sample of the group.

        for v in range(V):
            x = [z / norm(z) for z in units[:, v] @ weights.T]
            for i in group:
                j = the other sample of the group with the largest inner product x[i] @ x[j]
                loss -= log(norm(x[i] - x[j] + 1e-8) + 1e-8) / B

    Inner products of `z = W u` are `u^T (W^T W) v`, so no array of batch x prototypes is materialized. Gradients flow
    through both samples.

    Args:
      weights: None for the term on `units` themselves, of any length, in place of `z`; norms below 1e-8 count as 1e-8.
      group: number of samples per group, a divisor of B.

    Returns:
      The term; 0 for groups of one sample, which have no neighbor.
    """
    if group == 1:
        return jnp.zeros((), units.dtype)
    batch, (rows, _) = len(units), sharding.axes_in_use()
    if weights is None:
        gram, total, outputs = None, jnp.ones(units.shape[-1], units.dtype), units.shape[-1]  # W is the unit matrix
    else:
        gram, total, outputs = _gram(precision, weights), jnp.sum(weights, axis=0), len(weights)  # [D, D]; [D], W^T 1

    def local(units, gram, total):
        scaled = _unit_outputs(units, gram, precision)  # [B, V, D]
        own = min(group, len(scaled))
        first, others = jnp.zeros(len(scaled) // own, jnp.int32), scaled  # [G], index of the first row within its group
        if group > len(scaled):  # the group includes rows of other devices
            begin = jax.lax.axis_index(rows) * len(scaled)
            others = jax.lax.all_gather(scaled, rows, axis=0, tiled=True)  # [B, V, D]
            others = jax.lax.dynamic_slice_in_dim(others, begin // group * group, group)
            first += begin % group
        scaled, others = (x.reshape(-1, size, *x.shape[1:]) for x, size in ((scaled, own), (others, group)))
        gap = _gap_to_nearest(scaled, others, gram, first, precision)  # [G, g, V, D]
        distance = _length(gap, gram, total, outputs, precision)
        total_log = jnp.sum(jnp.log(distance + _EPS))
        return -(jax.lax.psum(total_log, rows) if rows else total_log) / batch

    shape = dict(in_specs=(sharding.BATCH, P(), P()), out_specs=P())
    return (jax.shard_map(local, **shape) if rows else local)(units, gram, total)


def _unit_outputs(units: jax.Array, gram: jax.Array | None, precision: Precision) -> jax.Array:
    """`units` [B, V, D], scaled so that `W u` has norm 1."""
    if gram is None:
        square, floor = jnp.sum(jnp.square(units), axis=-1), _EPS
    else:
        square, floor = precision.wide_einsum("bvd,de,bve->bv", units, gram, units), precision.norm_floor
    return units * jax.lax.rsqrt(jnp.maximum(square, floor**2))[..., None]


def _gap_to_nearest(scaled, others, gram, first, precision: Precision) -> jax.Array:
    """`scaled` [G, o, V, D] minus the nearest of `others` [G, g, V, D], except itself, which has index `first[G] +
    i`."""
    # [G, V, o, g]
    if gram is None:
        inner = precision.wide_einsum("givd,gjvd->gvij", *map(jax.lax.stop_gradient, (scaled, others)))
    else:
        inner = precision.wide_einsum("givd,de,gjve->gvij", *map(jax.lax.stop_gradient, (scaled, gram, others)))
    itself = first[:, None] + jnp.arange(scaled.shape[1])  # [G, o]
    inner = jnp.where(itself[:, None, :, None] == jnp.arange(others.shape[1]), -jnp.inf, inner)
    nearest = jnp.argmax(inner, axis=-1).swapaxes(1, 2)  # [G, o, V]
    # Subtract before applying W: 2 - 2 cos would lose precision for near neighbors.
    return scaled - jnp.take_along_axis(others, nearest[..., None], axis=1)  # [G, o, V, D]


def _length(gap, gram, total, outputs: int, precision: Precision) -> jax.Array:
    """`|| W gap + eps ||` of [G, o, V, D] -> [G, o, V]."""
    if gram is None:
        square = jnp.sum(jnp.square(gap), axis=-1)
    else:
        square = precision.wide_einsum("givd,de,give->giv", gap, gram, gap)
    square += 2 * _EPS * precision.wide_einsum("givd,d->giv", gap, total) + outputs * _EPS**2
    return jnp.sqrt(jnp.maximum(square, outputs * _EPS**2))
