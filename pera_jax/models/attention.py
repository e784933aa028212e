"""Multi-head attention, by cuDNN's fused kernel where there is one, else by plain products that XLA compiles."""

import functools

import flax.linen as nn
import jax

from pera_jax import sharding
from pera_jax.errors import UserError
from pera_jax.precision import Precision

IMPLEMENTATIONS = ("auto", "cudnn", "xla")
_SCORES = 128 * 2**20  # bytes of scores on one device at a time


def choose(name: str, precision: Precision, head_width: int) -> str:
    """"cudnn" or "xla" for the config's field `model.attention`; "auto" takes cuDNN where it works.

    cuDNN's kernel wants an NVIDIA GPU of compute capability 8.0 or more, bfloat16 products, and heads of at most 128
    values, a multiple of 8.

    Raises:
      UserError: cuDNN is asked for where it cannot work.
    """
    device = jax.local_devices()[0]
    capability = getattr(device, "compute_capability", "0") if device.platform == "gpu" else "0"
    missing = [
        words
        for fits, words in (
            (capability.split(".")[0].isdigit() and int(capability.split(".")[0]) >= 8, "an NVIDIA GPU of 8.0 or more"),
            (precision.half, "precision=bfloat16"),
            (head_width % 8 == 0 and head_width <= 128, "heads of at most 128 values, a multiple of 8"),
        )
        if not fits
    ]
    if name == "auto":
        return "xla" if missing else "cudnn"
    if name == "cudnn" and missing:
        raise UserError(f"model.attention=cudnn needs {', '.join(missing)}; use model.attention=auto")
    return name


def _weights(query: jax.Array, key: jax.Array, precision: Precision) -> jax.Array:
    """softmax(query key^T / sqrt(E)) over the keys: [B, n, H, E] and [B, N, H, E] -> [B, H, n, N], wide."""
    return jax.nn.softmax(precision.product("bqhe,bkhe->bhqk", query, key) * query.shape[-1] ** -0.5)


# Recomputed in the backward pass: the arrays of tokens x tokens would be most of what a block keeps, and their first
# product is a small part of its work.
@functools.partial(jax.checkpoint, static_argnums=3)
def _mix(query: jax.Array, key: jax.Array, value: jax.Array, precision: Precision) -> jax.Array:
    """softmax(query key^T / sqrt(E)) value, each [B, N, H, E]; the result is wide.

    Not `jax.nn.dot_product_attention`: it would round float32 operands to TF32, and its softmax is never float64.
    """
    return precision.product("bhqk,bkhe->bqhe", _weights(query, key, precision), value)


def _mix_in_parts(query: jax.Array, key: jax.Array, value: jax.Array, precision: Precision) -> jax.Array:
    """`_mix` on some crops of each device after the other, where the scores of all would take much memory."""
    crops, tokens, heads, _ = query.shape
    own, rest = divmod(crops, sharding.shards_in_use())
    size = own * heads * tokens**2 * precision.wide.itemsize
    fitting = (part for part in range(1, own + 1) if own % part == 0 and size / part <= _SCORES)
    parts = 1 if rest else next(fitting, own)
    if parts == 1:
        return _mix(query, key, value, precision)
    split = sharding.split_batch((query, key, value), parts)
    return sharding.merge_batch(jax.lax.map(lambda part: _mix(*part, precision), split), parts)


class Attention(nn.Module):
    """Self-attention with a bias in its projections; `implementation` as `choose` returns it."""

    heads: int
    precision: Precision
    implementation: str
    kernel_init: nn.initializers.Initializer

    @nn.compact
    def __call__(self, x, class_weights=False):
        """[B, N, D] -> [B, N, D]; or, with `class_weights`, what the first token takes of each: [B, H, N], wide."""
        policy = dict(
            dtype=self.precision.compute,
            param_dtype=self.precision.wide,
            kernel_init=self.kernel_init,
            precision=self.precision.matmul,
        )
        width = x.shape[-1]
        # Three, heads and head dimension are axes of the kernel, so that heads can be cut over devices.
        qkv = nn.DenseGeneral((3, self.heads, width // self.heads), name="qkv", **policy)(x)  # [B, N, 3, H, D/H]
        query, key, value = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]  # [B, N, H, D/H]
        if class_weights:
            return _weights(query[:, :1], key, self.precision)[:, :, 0]  # [B, H, N]
        if self.implementation == "cudnn":  # its softmax is float32 inside the kernel
            mixed = jax.nn.dot_product_attention(query, key, value, implementation="cudnn")  # [B, N, H, D/H]
        else:
            mixed = _mix_in_parts(query, key, value, self.precision)  # [B, N, H, D/H], wide
        return nn.DenseGeneral(width, axis=(-2, -1), name="projection", **policy)(mixed)  # [B, N, D]
