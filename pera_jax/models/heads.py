"""Projection heads: an MLP to a unit vector, then a weight-normalized linear layer.

The last layer is not applied here: losses take the unit vector `u` and the matrix `W`, because most functions of `z = W
u` are cheaper without materializing `z`.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Float

from pera_jax.models.precision import Precision
from pera_jax.models.vit import fan_in_uniform
from pera_jax.parallel.sharding import constrain_batch

# For every parameter whose path ends in "head/...", see `vit.SHARDING_RULES`.
SHARDING_RULES: tuple[tuple[str, P], ...] = (
    (r"head/(hidden_\d|bottleneck)/kernel$", P("fsdp")),
    (r"head/(hidden_\d|bottleneck)/bias$", P()),
    (r"prototype_head/direction$", P(("tensor", "fsdp"))),
    (r"prototype_head/gain$", P("tensor")),
    (r"head/direction$", P("fsdp")),
    (r"head/gain$", P()),
)
DECAY_RULES: tuple[tuple[str, bool], ...] = ((r"head/(.*kernel|direction)$", True), (r"head/(.*bias|gain)$", False))


def normalize(x: Float[jax.Array | np.ndarray, "*B D"], floor: float) -> Float[jax.Array, "*B D"]:
    """`x / max(||x||, floor)` over the last axis, with a finite gradient at zero."""
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, floor**2))


class Head(nn.Module):
    """Linear, GELU, linear, GELU, linear, L2 normalization; also holds the last layer's `direction` v and `gain` g."""

    hidden: int
    bottleneck: int
    outputs: int
    precision: Precision = Precision()

    @nn.compact
    @jax.named_scope("head")
    def __call__(
        self, x: Float[jax.Array, "*B D"]
    ) -> tuple[Float[jax.Array, "*B {self.bottleneck}"], Float[jax.Array, "{self.outputs} {self.bottleneck}"]]:
        """The unit vectors `u` of tokens `x`, and the last layer's matrix `W`.

        Row k of `W` is `g_k v_k / ||v_k||`. Both are in `wide` precision.
        """
        wide = self.precision.wide
        for name, width in (("hidden_1", self.hidden), ("hidden_2", self.hidden), ("bottleneck", self.bottleneck)):
            x = nn.Dense(
                width,
                dtype=self.precision.compute,
                param_dtype=wide,
                kernel_init=nn.initializers.normal(0.02),
                precision=self.precision.matmul,
                name=name,
            )(x)
            x = constrain_batch(x)  # [..., hidden]; otherwise the compiler may move rows instead of weights
            if name != "bottleneck":
                x = nn.gelu(x, approximate=False)
        shape = (self.outputs, self.bottleneck)
        direction = self.param("direction", fan_in_uniform(self.bottleneck), shape, wide)
        gain = self.param("gain", nn.initializers.ones, (self.outputs,), wide)
        unit = normalize(x.astype(wide), self.precision.norm_floor)
        return unit, gain[:, None] * normalize(direction, 0.0)
