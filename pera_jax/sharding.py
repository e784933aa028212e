"""The device mesh and where each array lies on it.

Mesh axes: `data` (replicated parameters), `fsdp` (parameters cut over devices that each also see their own images) and
`tensor` (reserved for cutting prototypes and heads of attention). The batch is cut over `data` and `fsdp`.
"""

import re

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

from pera_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
BATCH = P(("data", "fsdp"))

# (path regex, spec): the first match decides; a path that nothing matches is an error, so that a new parameter cannot
# end up replicated by oversight. Optimiser moments and the teacher end in the same paths as the parameters.
# Stacked blocks have a leading axis of depth, which is never cut.
RULES: tuple[tuple[str, P], ...] = (
    (r"(lower|upper)/attention/qkv/kernel$", P(None, "fsdp", None, "tensor")),
    (r"(lower|upper)/attention/qkv/bias$", P(None, None, "tensor")),
    (r"(lower|upper)/attention/projection/kernel$", P(None, "tensor", None, "fsdp")),
    (r"(lower|upper)/mlp/in/kernel$", P(None, "fsdp", "tensor")),
    (r"(lower|upper)/mlp/in/bias$", P(None, "tensor")),
    (r"(lower|upper)/mlp/out/kernel$", P(None, "tensor", "fsdp")),
    (r"(lower|upper)/(.*/bias|norm_\d/scale)$", P()),
    (r"head/(hidden_\d|bottleneck)/kernel$", P("fsdp")),
    (r"head/(hidden_\d|bottleneck)/bias$", P()),
    (r"prototype_head/direction$", P(("tensor", "fsdp"))),
    (r"prototype_head/gain$", P("tensor")),
    (r"pixel_head/direction$", P("fsdp")),
    (r"pixel_head/gain$", P()),
    (r"patch_projection/kernel$", P("fsdp")),
    (r"(class_token|mask_token|position_embedding|patch_projection/bias|norm/(scale|bias))$", P()),
    (r"center$", P("tensor")),
    (r"(^|/)(step|count)$", P()),
)


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices: list | None = None) -> Mesh:
    """A mesh over `devices` (all of them by default). One of the sizes may be -1: what is left.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [data, fsdp, tensor]
    known = int(np.prod([s for s in sizes if s != -1]))
    if sizes.count(-1) > 1 or min(sizes) < -1 or 0 in sizes or len(devices) % known:
        raise UserError(
            f"mesh data={data}, fsdp={fsdp}, tensor={tensor} does not fit {len(devices)} device(s); "
            "the sizes must multiply to that number, and one of them may be -1"
        )
    sizes = [len(devices) // known if s == -1 else s for s in sizes]
    if int(np.prod(sizes)) != len(devices):
        raise UserError(
            f"mesh data={data}, fsdp={fsdp}, tensor={tensor} uses {np.prod(sizes)} of {len(devices)} device(s); "
            "set one of the sizes to -1"
        )
    # Auto axes: the compiler places what the constraints leave open ("pjit"). make_mesh would default to Explicit.
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def batch_shards(mesh: Mesh) -> int:
    """The number of parts that a batch is cut into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def path_of(key_path) -> str:
    """`a/b/c` for a key path of `jax.tree_util`."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in key_path)


def spec_of(path: str, shape: tuple[int, ...], mesh: Mesh) -> P:
    """The spec of the first rule that matches `path`; an axis that does not divide its dimension is left uncut.

    Raises:
      ValueError: no rule matches.
    """
    for pattern, spec in RULES:
        if re.search(pattern, path):
            kept = []
            for size, axes in zip(shape, spec):
                names = (axes,) if isinstance(axes, str) else tuple(axes or ())
                parts = int(np.prod([mesh.shape[name] for name in names]))
                kept.append(axes if size % parts == 0 else None)
            return P(*kept)
    raise ValueError(f"no sharding rule in pera_jax/sharding.py matches the leaf {path!r} of shape {shape}")


def tree_shardings(tree, mesh: Mesh):
    """A tree of `NamedSharding` for a tree of arrays or `ShapeDtypeStruct`, by `RULES`."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, spec_of(path_of(path), leaf.shape, mesh)), tree
    )


def constrain_batch(x: jax.Array) -> jax.Array:
    """Pins axis 0 of `x` to the batch axes of the mesh in use (`jax.set_mesh`); nothing where there is none."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or x.shape[0] % (mesh.shape["data"] * mesh.shape["fsdp"]):
        return x
    return jax.lax.with_sharding_constraint(x, BATCH)
