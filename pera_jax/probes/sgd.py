"""SGD with momentum that trains a grid of linear classifiers at once."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def minimize(
    gradients: Callable[[jax.Array, jax.Array, Any], tuple[jax.Array, jax.Array]],
    batches: jax.Array,
    dims: int,
    classes: int,
    rates: jax.Array,
    momentum,
) -> tuple[jax.Array, jax.Array]:
    """Trains G linear classifiers on the same batches, from 0, with cosine decay of the learning rates to 0.

    Args:
      gradients: (W [F, G, C], b [G, C], batch) -> gradients of the loss with respect to W and b; pure.
      batches: [steps, ...], the argument `batch` of each step.
      dims: F.
      classes: C.
      rates: [G], peak learning rate of each classifier.
      momentum: of SGD.

    Returns:
      (W float32 [F, G, C], b float32 [G, C]).
    """
    steps, grid = len(batches), len(rates)

    def step(carry, inputs):
        weights, bias, weights_velocity, bias_velocity = carry
        batch, decay = inputs
        weights_gradient, bias_gradient = gradients(weights, bias, batch)
        weights_velocity = momentum * weights_velocity + weights_gradient
        bias_velocity = momentum * bias_velocity + bias_gradient
        rate = (rates * decay)[:, None]  # [G, 1]
        return (weights - rate * weights_velocity, bias - rate * bias_velocity, weights_velocity, bias_velocity), None

    zeros = lambda: (jnp.zeros((dims, grid, classes)), jnp.zeros((grid, classes)))  # noqa: E731
    decay = (1.0 + jnp.cos(jnp.pi * jnp.arange(steps) / steps)) / 2.0
    (weights, bias, *_), _ = jax.lax.scan(step, zeros() + zeros(), (batches, decay))
    return weights, bias
