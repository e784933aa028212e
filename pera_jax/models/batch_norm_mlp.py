"""MLPs with batch norm: the projector and the predictor of MoCo v3 (Chen et al., arXiv:2104.02057, section 4).

Batch norm always uses the statistics of the batch, in every network and whatever it is used for, so there are no
running averages and the only collection is `params`. Statistics are over axis 0, the images of the whole batch: under
jit, also those of other devices. Further axes, such as one of views, have statistics of their own.
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

# For every parameter whose path ends in "projector/..." or "predictor/...", see `vit.SHARDING_RULES`.
SHARDING_RULES: tuple[tuple[str, P], ...] = (
    (r"(projector|predictor)/linear_\d/kernel$", P("fsdp")),
    (r"(projector|predictor)/norm_\d/(scale|bias)$", P()),
)
DECAY_RULES: tuple[tuple[str, bool], ...] = (
    (r"(projector|predictor)/linear_\d/kernel$", True),
    (r"(projector|predictor)/norm_\d/(scale|bias)$", False),
)

EPSILON = 1e-5


class Linear(nn.Module):
    """A linear layer without bias, of operands in `compute` and a result in `wide` precision."""

    outputs: int
    precision: Precision

    @nn.compact
    def __call__(self, x: Float[jax.Array, "*B D"]) -> Float[jax.Array, "*B {self.outputs}"]:
        inputs = x.shape[-1]
        kernel = self.param("kernel", fan_in_uniform(inputs), (inputs, self.outputs), self.precision.wide)
        return self.precision.product("...d,de->...e", x, kernel)


class BatchNorm(nn.Module):
    """Batch norm over axis 0, with biased variance, in the dtype of `x`.

    Attributes:
      affine: whether it has a gain and a bias.
    """

    affine: bool

    @nn.compact
    def __call__(self, x: Float[jax.Array, "B *V D"]) -> Float[jax.Array, "B *V D"]:
        centered = x - jnp.mean(x, axis=0)
        y = centered * jax.lax.rsqrt(jnp.mean(jnp.square(centered), axis=0) + EPSILON)
        if not self.affine:
            return y
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:], x.dtype)
        return y * scale + self.param("bias", nn.initializers.zeros, x.shape[-1:], x.dtype)


class BatchNormMlp(nn.Module):
    """Linear layers without bias, each followed by batch norm and, but for the last one, ReLU; the last batch norm has
    neither gain nor bias.

    Attributes:
      widths: outputs of each layer.
    """

    widths: tuple[int, ...]
    precision: Precision = Precision()

    @nn.compact
    @jax.named_scope("batch_norm_mlp")
    def __call__(self, x: Float[jax.Array | np.ndarray, "B *V D"]) -> Float[jax.Array, "B *V {self.widths[-1]}"]:
        """The outputs for `x`, whose axis 0 is the whole batch, in `wide` precision."""
        last = len(self.widths)
        for number, width in enumerate(self.widths, 1):
            x = Linear(width, self.precision, name=f"linear_{number}")(x)
            x = constrain_batch(x)  # [B, ..., width]; otherwise the compiler may move rows instead of weights
            x = BatchNorm(affine=number < last, name=f"norm_{number}")(x)
            if number < last:
                x = nn.relu(x)
        return x
