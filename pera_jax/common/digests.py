"""Digests that verify stored data: of arrays on their devices, of JSON values, of files.

An array on devices has two checksums. Each 32-bit word of its content is mixed with its index, and the mixed words are
added modulo 2^32. Addition is independent of order, so the checksums are the same on one device, on any mesh and on
many hosts, and each leaf is read once, in place, without a copy. The mixing is a bijection of the word, so a single
changed word always changes both checksums; any other change goes unnoticed with probability of about 2^-64.
"""

import functools
import hashlib
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_PART = 2**16  # words of the host that are mixed at once
_WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}  # by bytes per value; eight bytes are two words


def leaf_digests(tree: Any) -> dict[str, str]:
    """The digest of each leaf of a pytree by path ("a/b/c"): dtype, shape and both checksums, `float32[2,3] 0123...`.

    Compiles once per shape, dtype and sharding, except for leaves in host memory; blocks until the values are ready.
    With several hosts all must call it, and all get the same result.

    Args:
      tree: jax.Arrays with any sharding and NumPy arrays, with values of 1, 2, 4 or 8 bytes.
    """
    paths, leaves = _flat(tree)
    sums = jax.device_get([
        _sums_on_host(np.asarray(leaf)) if _in_host_memory(leaf) else _compiled(_sums_of, _everywhere(leaf))(leaf)
        for leaf in leaves
    ])  # [2] each
    return {
        path: f"{spec(leaf)} {first:08x}{second:08x}"
        for path, leaf, (first, second) in zip(paths, leaves, map(np.ndarray.tolist, sums), strict=True)
    }


def spec(leaf: Any) -> str:
    """dtype and shape of an array or ShapeDtypeStruct: `float32[2,3]`."""
    return f"{np.dtype(leaf.dtype).name}[{','.join(map(str, leaf.shape))}]"


def not_finite(tree: Any) -> list[str]:
    """The paths of leaves with a NaN or an infinity; called like `leaf_digests`."""
    paths, leaves = _flat(tree)
    kept = [(path, leaf) for path, leaf in zip(paths, leaves) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    finite = jax.device_get([_compiled(_all_finite, _everywhere(leaf))(leaf) for _, leaf in kept])
    return [path for (path, _), good in zip(kept, finite, strict=True) if not good]


def json_digest(value: Any) -> str:
    """Hexadecimal SHA-256 of a JSON value; independent of key order, tuples count as lists."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode("ascii")).hexdigest()


def arrays_digest(arrays: dict[str, np.ndarray]) -> str:
    """Hexadecimal SHA-256 over names, dtypes, shapes and values of NumPy arrays."""
    found = hashlib.sha256()
    for name in sorted(arrays):
        values = np.ascontiguousarray(arrays[name])
        found.update(f"{json.dumps(name)} {spec(arrays[name])}\n".encode("ascii"))
        found.update(values.reshape(-1).view(np.uint8))
    return found.hexdigest()


def file_digest(path: pathlib.Path) -> str:
    """Hexadecimal SHA-256 of a file. Raises OSError."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------- on the devices


def _flat(tree: Any) -> tuple[list[str], list[Any]]:
    found = jax.tree_util.tree_flatten_with_path(tree)[0]
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in found], [leaf for _, leaf in found]


def _everywhere(leaf: Any) -> jax.sharding.Sharding | None:
    """The sharding that replicates a result to every host; None for a leaf on one device or on the host."""
    where = getattr(leaf, "sharding", None)
    is_spread = isinstance(where, jax.sharding.NamedSharding)
    return jax.sharding.NamedSharding(where.mesh, jax.sharding.PartitionSpec()) if is_spread else None


def _in_host_memory(leaf: Any) -> bool:
    """Whether `np.asarray(leaf)` copies nothing: a NumPy array, or an array on one CPU device."""
    if not isinstance(leaf, jax.Array):
        return True
    device, *others = leaf.devices()
    return not others and device.platform == "cpu" and leaf.is_fully_addressable


@functools.lru_cache(maxsize=16)
def _compiled(function: Callable[[jax.Array], jax.Array], where: jax.sharding.Sharding | None):
    return jax.jit(function, out_shardings=where)


def _all_finite(leaf: jax.Array) -> jax.Array:
    return jnp.isfinite(leaf).all()


def _sums_of(leaf: jax.Array) -> jax.Array:
    """uint32 [2]."""
    if leaf.dtype == jnp.bool_:
        leaf = leaf.astype(jnp.uint8)
    words = jax.lax.bitcast_convert_type(leaf, _WORDS[leaf.dtype.itemsize]).astype(jnp.uint32)
    place, stride = jnp.zeros((), jnp.uint32), 1
    for axis in reversed(range(words.ndim)):  # the index in row-major order, modulo 2^32
        place = place + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * np.uint32(stride % 2**32)
        stride *= words.shape[axis]
    first, second = _mixed(words, place)
    return jnp.stack([jnp.sum(first, dtype=jnp.uint32), jnp.sum(second, dtype=jnp.uint32)])


def _sums_on_host(leaf: np.ndarray) -> np.ndarray:
    """`_sums_of` without compiling, a part at a time."""
    size = leaf.dtype.itemsize
    words = np.ascontiguousarray(leaf).reshape(-1).view(np.dtype(f"u{min(size, 4)}"))
    sums = np.zeros(2, np.uint32)
    for first in range(0, len(words), _PART):
        part = words[first : first + _PART].astype(np.uint32)
        place = np.arange(first, first + len(part)).astype(np.uint32)  # modulo 2^32
        sums += np.array([mixed.sum(dtype=np.uint32) for mixed in _mixed(part, place)])
    return sums


def _mixed(words: Any, place: Any) -> tuple[Any, Any]:
    """Both mixtures of words uint32 [...] with their indices modulo 2^32, NumPy or JAX arrays."""
    first = words ^ (place * np.uint32(0x9E3779B1) + np.uint32(0x7F4A7C15))
    first = (first ^ (first >> 16)) * np.uint32(0x85EBCA6B)
    first = (first ^ (first >> 13)) * np.uint32(0xC2B2AE35)
    first = first ^ (first >> 16)
    second = (first + place) * np.uint32(0x27D4EB2F)
    second = (second ^ (second >> 15)) * np.uint32(0x165667B1)
    return first, second ^ (second >> 13)
