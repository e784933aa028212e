"""States of random numbers, where what a network is at birth takes seconds to compile and is not asked."""

import jax
import numpy as np

from pera_jax.parallel import sharding
from pera_jax.training import step as steps


def random_state(objective, optimizer, mesh=None, seed: int = 0) -> steps.TrainState:
    """Shapes, dtypes and shardings of a new state, by default on one device, with normal numbers, no two leaves alike;
    the optimizer's are small beside gradients."""
    mesh = mesh or sharding.make_mesh(devices=jax.devices()[:1])
    rng = np.random.default_rng(seed)

    def numbers(path, like):
        integers = np.issubdtype(like.dtype, np.integer)
        values = np.zeros(like.shape) if integers else 0.2 * rng.normal(size=like.shape)
        if sharding.path_of(path).startswith("opt_state"):
            values = 1e-6 * np.square(values)  # Adam's second moment is never negative
        return jax.device_put(values.astype(like.dtype), like.sharding)

    return jax.tree_util.tree_map_with_path(numbers, steps.abstract_state(objective, optimizer, mesh))
