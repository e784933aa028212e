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


@jax.named_scope("pixel_term")
def mean_pixel_term(
    predicted: Float[jax.Array, "N T ppC"], target: Float[jax.Array, "N T ppC"]
) -> Float[jax.Array, ""]:
    """Squared error, averaged over the values of a patch, patches and samples (He et al., arXiv:2111.06377,
    section 3); arguments as in `pixel_term`."""
    return jnp.mean(jnp.square(predicted - target))


def patch_statistics(
    patches: Float[jax.Array, "N T ppC"],
) -> tuple[Float[jax.Array, "N T 1"], Float[jax.Array, "N T 1"]]:
    """Mean and standard deviation of the values of each patch, all bands together: `sqrt(variance + 1e-6)`, with the
    variance divided by the number of values minus 1."""
    variance = jnp.var(patches, axis=-1, keepdims=True, ddof=1)
    return jnp.mean(patches, axis=-1, keepdims=True), jnp.sqrt(variance + 1e-6)
