"""The device mesh and the sharding of each array on it.

Mesh axes: `data` (replicates parameters), `fsdp` (shards parameters over devices that each process their own images)
and `tensor` (shards prototypes, attention heads and hidden units). The batch is sharded over `data` and `fsdp`.

Inside the jitted step, the functions of the second half use the current mesh (`jax.set_mesh`); without one they do
nothing.
"""

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pera_jax.common.errors import UserError

AXES = ("data", "fsdp", "tensor")
BATCH = P(("data", "fsdp"))

# (path regex, spec): the first match counts; a path without a match is an error, so that no new parameter is replicated
# by accident. Networks and objectives define the rules of their own leaves; these are for the training state itself.
# The paths of optimizer moments and of the teacher end like those of the parameters.
Rules = tuple[tuple[str, P], ...]
STATE_RULES: Rules = ((r"(^|/)(step|count)$", P()),)


def mesh_sizes(data: int, fsdp: int, tensor: int, devices: int) -> tuple[int, int, int]:
    """The mesh sizes for a number of `devices`; one of the three may be -1 and is then inferred.

    Raises:
      UserError: the product of the sizes is not the number of devices.
    """
    sizes = [data, fsdp, tensor]
    known = int(np.prod([s for s in sizes if s != -1]))
    if sizes.count(-1) > 1 or min(sizes) < -1 or 0 in sizes or devices % known:
        raise UserError(
            f"mesh data={data}, fsdp={fsdp}, tensor={tensor} does not fit {devices} device(s); "
            "their product must be that number, and one of them may be -1"
        )
    sizes = [devices // known if s == -1 else s for s in sizes]
    if int(np.prod(sizes)) != devices:
        raise UserError(
            f"mesh data={data}, fsdp={fsdp}, tensor={tensor} uses {np.prod(sizes)} of {devices} device(s); "
            "set one of the sizes to -1"
        )
    return tuple(sizes)


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices: list | None = None) -> Mesh:
    """A mesh over `devices` (all of them by default), of `mesh_sizes`."""
    devices = jax.devices() if devices is None else devices
    sizes = mesh_sizes(data, fsdp, tensor, len(devices))
    # Auto axes: the compiler chooses the shardings that constraints leave open. make_mesh would default to Explicit.
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def batch_shards(mesh: Mesh) -> int:
    """The number of shards of a batch."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def weight_shards(mesh: Mesh) -> int:
    """The number of shards of the prototypes."""
    return mesh.shape["fsdp"] * mesh.shape["tensor"]


def path_of(key_path) -> str:
    """`a/b/c` for a key path of `jax.tree_util`."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in key_path)


def first_match(path: str, rules: tuple[tuple[str, Any], ...], what: str) -> Any:
    """The value of the first rule whose regex is found in `path`. Raises UserError if there is none."""
    for pattern, value in rules:
        if re.search(pattern, path):
            return value
    raise UserError(f"no {what} rule matches the leaf {path!r}; add one where its network or objective is defined")


def spec_of(path: str, shape: tuple[int, ...], mesh: Mesh, rules: Rules) -> P:
    """The spec of the first rule that matches `path`; a dimension that is not divisible by its mesh axes is not
    sharded.

    Raises:
      UserError: no rule matches.
    """
    kept = []
    for size, axes in zip(shape, first_match(path, rules, "sharding")):
        names = (axes,) if isinstance(axes, str) else tuple(axes or ())
        shards = int(np.prod([mesh.shape[name] for name in names]))
        kept.append(axes if size % shards == 0 else None)
    return P(*kept)


def tree_shardings(tree, mesh: Mesh, rules: Rules):
    """A tree of `NamedSharding` for a tree of arrays or `ShapeDtypeStruct`, by `rules`."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, spec_of(path_of(path), leaf.shape, mesh, rules)), tree
    )


def shards_in_use() -> int:
    """The number of shards of a batch on the current mesh; 1 without a mesh, or with other axes."""
    mesh = jax.sharding.get_abstract_mesh()
    return batch_shards(mesh) if mesh.axis_names == AXES else 1


def axes_in_use() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The axes of the current mesh over which batch rows and prototypes are sharded; both empty on a single device."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return (), ()
    return ("data", "fsdp"), ("tensor", "fsdp")


def constrain_batch(x: jax.Array) -> jax.Array:
    """Constrains axis 0 of `x` to the batch axes of the current mesh; returns `x` if its size is not divisible by
    them."""
    shards = shards_in_use()
    return x if shards == 1 or x.shape[0] % shards else jax.lax.with_sharding_constraint(x, BATCH)


def constrain_replicated(x: jax.Array) -> jax.Array:
    """Constrains `x` to be replicated on the current mesh, so that the other operand of a product need not move."""
    mesh = jax.sharding.get_abstract_mesh()
    return x if mesh.empty or mesh.size == 1 else jax.lax.with_sharding_constraint(x, P())


def constrain_tree(tree, rules: Rules):
    """Constrains each leaf of a tree with the paths of parameters to its sharding by `rules`."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return tree
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: jax.lax.with_sharding_constraint(leaf, spec_of(path_of(path), leaf.shape, mesh, rules)), tree
    )


def gathered(params, prefix: str, dtype, rules: Rules):
    """The parameters of one block, a slice of the stack at `prefix`, all-gathered over `fsdp`.

    Only kernels of matrix products are sharded over `fsdp`. They are communicated in the products' `dtype`; their
    gradients, in the parameters' dtype, are reduce-scattered where they arise, so that no device holds more than one
    unsharded block.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.shape.get("fsdp", 1) == 1:
        return params

    def gather(path, leaf):
        cut = P(*spec_of(f"{prefix}/{path_of(path)}", (1, *leaf.shape), mesh, rules)[1:])
        return _gather(leaf, cut, jnp.dtype(dtype)) if "fsdp" in cut else leaf

    return jax.tree_util.tree_map_with_path(gather, params)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(x: jax.Array, cut: P, dtype) -> jax.Array:
    whole = P(*(None if axis == "fsdp" else axis for axis in cut))
    narrow = jax.lax.with_sharding_constraint(x.astype(dtype), cut)
    return jax.lax.with_sharding_constraint(narrow, whole)


_gather.defvjp(
    lambda x, cut, dtype: (_gather(x, cut, dtype), jnp.zeros((), x.dtype)),
    lambda cut, dtype, like, g: (jax.lax.with_sharding_constraint(g.astype(like.dtype), cut),),
)


def per_shard(function: Callable, *arrays):
    """Applies `function` to each device's own rows of trees of arrays [B, ...], without communication.

    `function` must treat every row independently.
    """
    shards = shards_in_use()
    if shards == 1 or jax.tree.leaves(arrays)[0].shape[0] % shards:
        return function(*arrays)
    return jax.shard_map(function, in_specs=BATCH, out_specs=BATCH, check_vma=False)(*arrays)


def split_batch(tree, parts: int):
    """Splits leaves [B, ...] into [parts, B / parts, ...], to be processed one part after the other.

    Each part takes an equal number of contiguous rows from every device, so that no row moves to another device.
    """
    shards = shards_in_use()

    def split(x):
        x = x.reshape(shards, parts, -1, *x.shape[1:]).swapaxes(0, 1)  # [parts, shards, rows, ...]
        return _constrain_axis(x.reshape(parts, -1, *x.shape[3:]), 1)

    return jax.tree.map(split, tree)


def merge_batch(tree, parts: int):
    """Merges leaves [parts, B / parts, ...] into [B, ...]; the inverse of `split_batch`."""
    shards = shards_in_use()

    def merge(x):
        x = x.reshape(parts, shards, -1, *x.shape[2:]).swapaxes(0, 1)  # [shards, parts, rows, ...]
        return _constrain_axis(x.reshape(-1, *x.shape[3:]), 0)

    return jax.tree.map(merge, tree)


def _constrain_axis(x: jax.Array, axis: int) -> jax.Array:
    """Constrains one axis of `x` to the batch axes of the current mesh and leaves the later axes unconstrained."""
    if shards_in_use() == 1:
        return x
    rest = (P.UNCONSTRAINED,) * (x.ndim - axis - 1)
    return jax.lax.with_sharding_constraint(x, P(*(None,) * axis, ("data", "fsdp"), *rest))
