"""What the losses on prototype outputs share: sums over mesh axes, softmaxes over sharded prototypes, chunks of rows.

These functions are called per device, inside `shard_map`; on a single device, where the axes are empty, they
communicate nothing.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pera_jax.models.precision import Precision

CHUNK = 2**24  # logits of a chunk of rows: 64 MB in float32


def total(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Sum over the mesh `axes`."""
    return jax.lax.psum(x, axes) if axes else x


def mean(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Mean over the mesh `axes`."""
    return jax.lax.pmean(x, axes) if axes else x


def highest(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Maximum over the mesh `axes`."""
    return jax.lax.pmax(x, axes) if axes else x


def vary(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Marks `x`, which is replicated along the mesh `axes`, as varying along them."""
    return jax.lax.pcast(x, axes, to="varying") if axes else x


def log_sum_exp(z: jax.Array, axes: tuple[str, ...]) -> tuple[jax.Array, jax.Array]:
    """log sum exp over the last axis, which is sharded over `axes`, and its maximum; [B, K] -> [B], [B]."""
    top = highest(jnp.max(jax.lax.stop_gradient(z), axis=-1), axes)
    return top + jnp.log(total(jnp.sum(jnp.exp(z - top[:, None]), axis=-1), axes)), top


def log_softmax(z: jax.Array, axes: tuple[str, ...]) -> tuple[jax.Array, jax.Array]:
    """log softmax over the last axis, which is sharded over `axes`, and the index of the maximum; [B, K] -> [B, K],
    [B].

    The index is K, which is on no prototype, on the devices that do not hold the maximum.
    """
    log_sum, top = log_sum_exp(z, axes)  # [B] each
    best = jnp.where(jnp.max(z, axis=-1) == top, jnp.argmax(z, axis=-1), z.shape[-1])
    return z - log_sum[:, None], best


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gather_units(units: jax.Array, rows: tuple[str, ...], precision: Precision) -> jax.Array:
    """All-gathers this device's [B / (data fsdp), ...] over `fsdp` to [B / data, ...], in `compute` precision.

    The gradient, of which each device has the part of its own prototypes, is reduced once, in `wide` precision.
    """
    narrow = units.astype(precision.compute)
    if rows:
        narrow = vary(jax.lax.all_gather(narrow, "fsdp", axis=0, tiled=True), ("tensor",))
    return narrow


def _gather_units_backward(rows, precision, _, cotangent):
    cotangent = cotangent.astype(precision.wide)
    if rows:
        cotangent = jax.lax.psum_scatter(cotangent, "fsdp", scatter_dimension=0, tiled=True)
        cotangent = jax.lax.psum(cotangent, "tensor")
    return (cotangent,)


gather_units.defvjp(lambda units, rows, precision: (gather_units(units, rows, precision), None), _gather_units_backward)


def in_chunks(tree: Any, prototypes: int) -> Any:
    """Splits leaves [N, ...] into [C, n, ...], so that the logits [n, prototypes] of a chunk have at most some `CHUNK`
    values.

    The last rows are padded with zeros.
    """
    number = len(jax.tree.leaves(tree)[0])
    parts = max(1, -(-number * prototypes // CHUNK))
    size = -(-number // parts)
    if parts > 1:
        size = -(-size // 8) * 8  # whole tiles of matrix products
        parts = -(-number // size)

    def split(x):
        padded = jnp.pad(x, ((0, parts * size - number), *((0, 0) for _ in x.shape[1:])))
        return padded.reshape(parts, size, *x.shape[1:])

    return jax.tree.map(split, tree)
