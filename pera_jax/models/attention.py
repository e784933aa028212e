"""Multi-head attention, with cuDNN's fused kernel if available, else with plain matrix products compiled by XLA."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Float

from pera_jax.common.errors import UserError
from pera_jax.common.text import first_line
from pera_jax.models.precision import Precision
from pera_jax.parallel import sharding

IMPLEMENTATIONS = ("auto", "cudnn", "xla")
_SCORES = 128 * 2**20  # maximum bytes of attention scores on one device at a time
# minimum tokens; on shorter sequences plain products are up to three times as fast (H200: docs/cost.md)
_FUSED_FROM = 64


def choose(name: str, precision: Precision, head_width: int, device: jax.Device | None = None) -> str:
    """"cudnn" or "xla" for the config field `model.attention`; "auto" chooses cuDNN if `cudnn_refusal` returns "".

    Args:
      device: one of the devices that the program is compiled for, which may be absent; None: this process's first
        device.

    Raises:
      UserError: cuDNN is requested but not supported.
    """
    if name not in ("auto", "cudnn"):
        return name
    refusal = cudnn_refusal(precision, head_width, jax.local_devices()[0] if device is None else device)
    if name == "cudnn" and refusal:
        raise UserError(f"model.attention=cudnn is not supported here: {refusal}; use model.attention=auto")
    return "xla" if refusal else "cudnn"


def cudnn_refusal(precision: Precision, head_width: int, device: jax.Device) -> str:
    """The reason why cuDNN's kernel cannot be used for training on a device, or "" if it can.

    The kernel needs an NVIDIA GPU with compute capability 8.0 or more, bfloat16 products, and a head width of at most
    128 that is a multiple of 8. JAX's other requirements (cuDNN itself, its version) are checked by tracing `_fused`,
    forward and backward.
    """
    if device.platform not in ("gpu", "cuda"):
        return f"expected an NVIDIA GPU, got a {device.platform.upper()}"
    capability = str(getattr(device, "compute_capability", "0"))
    if not capability.split(".")[0].isdigit() or int(capability.split(".")[0]) < 8:
        return f"expected compute capability 8.0 or more, got {capability} ({device.device_kind})"
    if not precision.half:
        return f"expected precision=bfloat16, got {precision.compute.name}"
    if head_width % 8 or head_width > 128:
        return f"expected a head width that is a multiple of 8 up to 128, got {head_width}"
    like = jax.ShapeDtypeStruct((1, padded_length(3), 1, head_width), precision.compute)
    try:
        jax.eval_shape(jax.grad(lambda x: jnp.sum(_fused(x, x, x, 3), dtype=jnp.float32)), like)
    except (NotImplementedError, RuntimeError, ValueError) as error:
        return "JAX says: " + first_line(error)
    return ""


def _weights(query: jax.Array, key: jax.Array, precision: Precision) -> jax.Array:
    """softmax(query key^T / sqrt(E)) over the keys: [B, n, H, E] and [B, N, H, E] -> [B, H, n, N], in `wide`."""
    return jax.nn.softmax(precision.product("bqhe,bkhe->bhqk", query, key) * query.shape[-1] ** -0.5)


# Recomputed in the backward pass: the arrays of tokens x tokens would be most of a block's stored activations, and
# computing them is a small part of its FLOPs.
@functools.partial(jax.checkpoint, static_argnums=3)
def _mix(query: jax.Array, key: jax.Array, value: jax.Array, precision: Precision) -> jax.Array:
    """softmax(query key^T / sqrt(E)) value, each [B, N, H, E]; the result is in `wide`.

    Not `jax.nn.dot_product_attention`, which rounds float32 operands to TF32 and never computes the softmax in float64.
    """
    return precision.product("bhqk,bkhe->bqhe", _weights(query, key, precision), value)


def _mix_in_parts(query: jax.Array, key: jax.Array, value: jax.Array, precision: Precision) -> jax.Array:
    """`_mix` on a part of each device's crops at a time, if the scores of all would need too much memory."""
    crops, tokens, heads, _ = query.shape
    own, rest = divmod(crops, sharding.shards_in_use())
    size = own * heads * tokens**2 * precision.wide.itemsize
    fitting = (part for part in range(1, own + 1) if own % part == 0 and size / part <= _SCORES)
    parts = 1 if rest else next(fitting, own)
    if parts == 1:
        return _mix(query, key, value, precision)
    split = sharding.split_batch((query, key, value), parts)
    return sharding.merge_batch(jax.lax.map(lambda part: _mix(*part, precision), split), parts)


def padded_length(tokens: int) -> int:
    """The padded sequence length for cuDNN's kernel, which JAX can only differentiate for even lengths."""
    return tokens + tokens % 2


def _fused(query: jax.Array, key: jax.Array, value: jax.Array, tokens: int) -> jax.Array:
    """cuDNN's softmax(query key^T / sqrt(E)) value, [B, M, H, E] each, with keys beyond the first `tokens` masked.

    Rows of the result beyond `tokens` are undefined; they do not affect gradients as long as their cotangents are 0.
    """
    lengths = None if tokens == key.shape[1] else jnp.full(len(key), tokens, jnp.int32)  # [B]
    return jax.nn.dot_product_attention(query, key, value, key_value_seq_lengths=lengths, implementation="cudnn")


def _fused_by_device(query: jax.Array, key: jax.Array, value: jax.Array, tokens: int) -> jax.Array:
    """`_fused` on each device's own crops and heads, because the partitioner does not know the kernel."""
    fused = functools.partial(_fused, tokens=tokens)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.axis_names != sharding.AXES or mesh.size == 1:
        return fused(query, key, value)
    crops = None if len(query) % sharding.shards_in_use() else ("data", "fsdp")
    heads = None if query.shape[2] % mesh.shape["tensor"] else "tensor"
    spec = P(crops, None, heads)
    return jax.shard_map(fused, in_specs=spec, out_specs=spec, check_vma=False)(query, key, value)


class Attention(nn.Module):
    """Multi-head self-attention with biases in its projections.

    Attributes:
      implementation: the result of `choose`; "cudnn" uses cuDNN's kernel on sequences of 64 tokens or more.
    """

    heads: int
    precision: Precision
    implementation: str
    qkv_init: nn.initializers.Initializer
    projection_init: nn.initializers.Initializer

    @nn.compact
    def __call__(
        self, x: Float[jax.Array, "B N D"], class_weights: bool = False
    ) -> Float[jax.Array, "B N D"] | Float[jax.Array, "B {self.heads} N"]:
        """The mixed tokens; or, with `class_weights`, the first token's attention weights by head, in `wide`."""
        policy = dict(
            dtype=self.precision.compute,
            param_dtype=self.precision.wide,
            precision=self.precision.matmul,
        )
        tokens, width = x.shape[1:]
        fused = self.implementation == "cudnn" and tokens >= _FUSED_FROM and not class_weights
        if fused:
            # Before the projections, where padding fuses with the norm and needs no pass of its own.
            x = jnp.pad(x, [(0, 0), (0, padded_length(tokens) - tokens), (0, 0)])  # [B, M, D], M = N or N + 1
        # The kernel has axes for q/k/v, heads and head width, so that heads can be sharded.
        features = (3, self.heads, width // self.heads)
        qkv = nn.DenseGeneral(features, name="qkv", kernel_init=self.qkv_init, **policy)(x)  # [B, N, 3, H, D/H]
        query, key, value = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]  # [B, N, H, D/H]
        if class_weights:
            return _weights(query[:, :1], key, self.precision)[:, :, 0]  # [B, H, N]
        if fused:  # the kernel computes its softmax in float32
            mixed = _fused_by_device(query, key, value, tokens)  # [B, M, H, D/H]
        else:
            mixed = _mix_in_parts(query, key, value, self.precision)  # [B, N, H, D/H], wide
        project = nn.DenseGeneral(
            width, axis=(-2, -1), name="projection", kernel_init=self.projection_init, **policy
        )
        return project(mixed)[:, :tokens]  # [B, N, D]
