"""The decoder of a masked autoencoder (He et al., arXiv:2111.06377, section 3): a narrow transformer over all patches
of a crop, which predicts the pixels of those that the encoder did not see.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Float, Int

from pera_jax.models import positions
from pera_jax.models.blocks import NORMAL, layer_norm, stack
from pera_jax.models.precision import Precision
from pera_jax.parallel.sharding import constrain_batch, constrain_replicated

# For the parameters whose path starts with "decoder/"; its blocks and norms have the rules of `vit.SHARDING_RULES`.
SHARDING_RULES: tuple[tuple[str, P], ...] = (
    (r"decoder/(embedding|prediction)/kernel$", P("fsdp")),
    (r"decoder/((embedding|prediction)/bias|mask_token)$", P()),
)
DECAY_RULES: tuple[tuple[str, bool], ...] = (
    (r"decoder/(embedding|prediction)/kernel$", True),
    (r"decoder/((embedding|prediction)/bias|mask_token)$", False),
)


class _Linear(nn.Module):
    """A linear layer whose product is in `compute` and whose result is in `wide`."""

    features: int
    precision: Precision

    @nn.compact
    def __call__(self, x: Float[jax.Array, "B N D"]) -> Float[jax.Array, "B N {self.features}"]:
        wide = self.precision.wide
        kernel = self.param("kernel", nn.initializers.xavier_uniform(), (x.shape[-1], self.features), wide)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), wide)
        kernel = constrain_replicated(kernel.astype(self.precision.compute))
        return constrain_batch(self.precision.product("bnd,de->bne", x, kernel)) + bias


class Decoder(nn.Module):
    """Predicts the pixels of removed patches from the encoder's tokens.

    Attributes:
      side: patches per side of a crop, for the fixed positions in the order "sincos_xy".
      outputs: values per patch, ordered by row, column, channel.
      scan, remat, attention: as in `ViT`.
    """

    width: int
    depth: int
    heads: int
    side: int
    outputs: int
    mlp_ratio: float = 4.0
    initial: str = "mae"
    layer_scale: float = 0.0
    scan: bool = True
    remat: str = "none"
    attention: str = "xla"
    precision: Precision = Precision()

    @nn.compact
    @jax.named_scope("decoder")
    def __call__(
        self, class_token: Float[jax.Array | np.ndarray, "B D"], patch_tokens: Float[jax.Array | np.ndarray, "B n D"],
        kept: Int[jax.Array | np.ndarray, "B n"], removed: Int[jax.Array | np.ndarray, "B m"],
    ) -> Float[jax.Array, "B m {self.outputs}"]:  # fmt: skip
        """The predicted values of the patches `removed`, in `wide` precision.

        Blocks do not depend on the order of tokens, so these stay in the order class, kept, removed, and nothing is
        put back in raster order.

        Args:
          class_token, patch_tokens: the encoder's, after its final norm.
          kept: the patch index of each of `patch_tokens`. removed: the other patches, in any order.
        """
        wide = self.precision.wide
        position = jnp.asarray(positions.sincos("sincos_xy", self.side, self.width), wide)[1:]  # [L, E]
        mask_token = self.param("mask_token", NORMAL, (self.width,), wide)
        tokens = jnp.concatenate([class_token[:, None], patch_tokens], axis=1)  # [B, 1 + n, D]
        tokens = _Linear(self.width, self.precision, name="embedding")(tokens)  # [B, 1 + n, E]
        # The class token's position is zero.
        x = jnp.concatenate(
            [
                tokens[:, :1],
                tokens[:, 1:] + jnp.take(position, kept, axis=0),
                mask_token + jnp.take(position, removed, axis=0),
            ],
            axis=1,
        )  # [B, 1 + n + m, E]
        x, _ = stack(self, "blocks", self.depth, constrain_batch(x))
        x = layer_norm(self.precision, "norm")(x[:, tokens.shape[1] :])  # [B, m, E]
        return _Linear(self.outputs, self.precision, name="prediction")(x)  # [B, m, p p C]
