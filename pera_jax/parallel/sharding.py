"""The device mesh and where each array lies on it.

Mesh axes: `data` (replicated parameters), `fsdp` (parameters cut over devices that each also see their own images) and
`tensor` (prototypes, heads of attention and hidden units are cut over it). The batch is cut over `data` and `fsdp`.

Inside the jitted step the functions of the second half ask the mesh in use (`jax.set_mesh`); without one they do nothing.
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

# (path regex, spec): the first match decides; a path that nothing matches is an error, so that a new parameter cannot end up
# replicated by oversight. Networks and objectives bring the rules of their leaves; these are of the training state itself.
# Optimizer moments and the teacher end in the same paths as the parameters.
Rules = tuple[tuple[str, P], ...]
STATE_RULES: Rules = ((r"(^|/)(step|count)$", P()),)


def mesh_sizes(data: int, fsdp: int, tensor: int, devices: int) -> tuple[int, int, int]:
    """The sizes of a mesh over so many devices; one of them may be -1: what is left.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    sizes = [data, fsdp, tensor]
    known = int(np.prod([s for s in sizes if s != -1]))
    if sizes.count(-1) > 1 or min(sizes) < -1 or 0 in sizes or devices % known:
        raise UserError(
            f"mesh data={data}, fsdp={fsdp}, tensor={tensor} does not fit {devices} device(s); "
            "the sizes must multiply to that number, and one of them may be -1"
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
    # Auto axes: the compiler places what the constraints leave open ("pjit"). make_mesh would default to Explicit.
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def batch_shards(mesh: Mesh) -> int:
    """The number of parts that a batch is cut into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def weight_shards(mesh: Mesh) -> int:
    """The number of parts that the prototypes are cut into."""
    return mesh.shape["fsdp"] * mesh.shape["tensor"]


def path_of(key_path) -> str:
    """`a/b/c` for a key path of `jax.tree_util`."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in key_path)


def first_match(path: str, rules: tuple[tuple[str, Any], ...], what: str) -> Any:
    """The value of the first rule whose regex is found in `path`. Raises ValueError where none is."""
    for pattern, value in rules:
        if re.search(pattern, path):
            return value
    raise ValueError(f"no {what} rule matches the leaf {path!r}; add one where its network or objective is defined")


def spec_of(path: str, shape: tuple[int, ...], mesh: Mesh, rules: Rules) -> P:
    """The spec of the first rule that matches `path`; an axis that does not divide its dimension is left uncut.

    Raises:
      ValueError: no rule matches.
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
    """The number of parts that a batch is cut into by the mesh in use; 1 without one, or with one of other axes."""
    mesh = jax.sharding.get_abstract_mesh()
    return batch_shards(mesh) if mesh.axis_names == AXES else 1


def axes_in_use() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The axes of the mesh in use that rows of a batch and prototypes are cut over; both empty on a single device."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return (), ()
    return ("data", "fsdp"), ("tensor", "fsdp")


def constrain_batch(x: jax.Array) -> jax.Array:
    """Pins axis 0 of `x` to the batch axes of the mesh in use; nothing where they do not divide it."""
    shards = shards_in_use()
    return x if shards == 1 or x.shape[0] % shards else jax.lax.with_sharding_constraint(x, BATCH)


def constrain_whole(x: jax.Array) -> jax.Array:
    """Pins `x` to lie whole on every device of the mesh in use, so that what it meets need not move."""
    mesh = jax.sharding.get_abstract_mesh()
    return x if mesh.empty or mesh.size == 1 else jax.lax.with_sharding_constraint(x, P())


def constrain_tree(tree, rules: Rules):
    """Pins each leaf of a tree that has the paths of parameters to where `rules` say that it lives."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return tree
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: jax.lax.with_sharding_constraint(leaf, spec_of(path_of(path), leaf.shape, mesh, rules)), tree
    )


def gathered(params, prefix: str, dtype, rules: Rules):
    """The parameters of one block, a slice of the stack at `prefix`, whole over `fsdp` and ready for use.

    What is cut over `fsdp` are the kernels of products: they travel in the products' `dtype`, and their gradients, in the
    parameters' own, are cut again where they arise, so that no device holds them whole for more than one block.
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
    """`function` of trees of arrays whose axis 0 is the batch's, on each device's own rows: nothing crosses devices.

    `function` must work on each row by itself.
    """
    shards = shards_in_use()
    if shards == 1 or jax.tree.leaves(arrays)[0].shape[0] % shards:
        return function(*arrays)
    return jax.shard_map(function, in_specs=BATCH, out_specs=BATCH, check_vma=False)(*arrays)


def split_batch(tree, parts: int):
    """Leaves [B, ...] -> [parts, B / parts, ...], to be worked on one after the other.

    Each part takes an equal run of every device's rows, so that no row changes its device.
    """
    shards = shards_in_use()

    def split(x):
        x = x.reshape(shards, parts, -1, *x.shape[1:]).swapaxes(0, 1)  # [parts, shards, rows, ...]
        return _constrain_axis(x.reshape(parts, -1, *x.shape[3:]), 1)

    return jax.tree.map(split, tree)


def merge_batch(tree, parts: int):
    """Leaves [parts, B / parts, ...] -> [B, ...], what `split_batch` undoes."""
    shards = shards_in_use()

    def merge(x):
        x = x.reshape(parts, shards, -1, *x.shape[2:]).swapaxes(0, 1)  # [shards, parts, rows, ...]
        return _constrain_axis(x.reshape(-1, *x.shape[3:]), 0)

    return jax.tree.map(merge, tree)


def _constrain_axis(x: jax.Array, axis: int) -> jax.Array:
    """Pins one axis of `x` to the batch axes of the mesh in use and says nothing about those after it."""
    if shards_in_use() == 1:
        return x
    rest = (P.UNCONSTRAINED,) * (x.ndim - axis - 1)
    return jax.lax.with_sharding_constraint(x, P(*(None,) * axis, ("data", "fsdp"), *rest))
