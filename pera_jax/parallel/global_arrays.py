"""Global arrays from the rows that each host holds."""

from typing import Any

import jax
import numpy as np


def local_rows(sharding: jax.sharding.Sharding, batch: int, devices: list | None = None) -> np.ndarray:
    """Row indices of a global batch that are stored on `devices` (default: those of this process), ascending and
    unique.

    The device order of the mesh can differ from the process order, and several processes can hold the same rows, when
    the `tensor` axis spans hosts.
    """
    devices = sharding.addressable_devices if devices is None else devices
    indices = sharding.devices_indices_map((batch,))
    return np.unique(np.concatenate([np.arange(batch)[indices[device]] for device in devices]))


def assemble(tree: Any, sharding: jax.sharding.Sharding, rows: np.ndarray, batch: int) -> Any:
    """Builds global arrays [batch, ...] with the given sharding from leaves [len(rows), ...], this host's `rows`."""

    def global_array(local):
        def shard(index):
            start, stop, _ = index[0].indices(batch)
            first = int(np.searchsorted(rows, start))  # a device's rows are contiguous, in the batch and in `rows`
            return local[first : first + stop - start]

        return jax.make_array_from_callback((batch, *local.shape[1:]), sharding, shard)

    return jax.tree.map(global_array, tree)


def replicated(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    """Replicates NumPy leaves, which must be equal on every host, over all devices of the mesh."""
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return jax.tree.map(lambda leaf: jax.make_array_from_callback(leaf.shape, sharding, lambda _: leaf), tree)
