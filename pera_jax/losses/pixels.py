"""Losses on the pixels of patches."""

import jax
import jax.numpy as jnp
from jaxtyping import Float


@jax.named_scope("pixel_term")
def pixel_term(predicted: Float[jax.Array, "N T ppC"], target: Float[jax.Array, "N T ppC"]) -> Float[jax.Array, ""]:
    """Squared error, summed over the values of a patch and averaged over patches and samples.

        for n in range(N):
            for t in range(T):
                loss += sum((predicted[n, t] - target[n, t]) ** 2) / (N * T)

    Args:
      predicted, target: pixel values ordered by row, column, channel.
    """
    return jnp.mean(jnp.sum(jnp.square(predicted - target), axis=-1))
