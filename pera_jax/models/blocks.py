"""Pre-norm transformer blocks, and stacks of them: scanned or unrolled, rematerialized, sharded.

Parameters of a stack have a leading depth axis, whether it is scanned or unrolled.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Float

from pera_jax.models import drop_path as drop
from pera_jax.models.attention import Attention
from pera_jax.models.drop_path import DropPath, GrowingDropPath
from pera_jax.models.precision import Precision
from pera_jax.parallel.sharding import constrain_batch, gathered

# The sharding of each parameter of a stack, and whether it is one of the "matrices" to which weight decay can be
# limited; the first match by path counts. The leading depth axis is never sharded.
STACK = r"(lower|upper|blocks)/"
SHARDING_RULES: tuple[tuple[str, P], ...] = (
    (STACK + r"attention/qkv/kernel$", P(None, "fsdp", None, "tensor")),
    (STACK + r"attention/qkv/bias$", P(None, None, "tensor")),
    (STACK + r"attention/projection/kernel$", P(None, "tensor", None, "fsdp")),
    (STACK + r"mlp/in/kernel$", P(None, "fsdp", "tensor")),
    (STACK + r"mlp/in/bias$", P(None, "tensor")),
    (STACK + r"mlp/out/kernel$", P(None, "tensor", "fsdp")),
    (STACK + r"(.*/bias|norm_\d/scale|layer_scale_\d)$", P()),
)
DECAY_RULES: tuple[tuple[str, bool], ...] = (
    (STACK + r"(.*/)?kernel$", True),
    (STACK + r"(.*/bias|norm_\d/scale|layer_scale_\d)$", False),
)

NORMAL = nn.initializers.normal(0.02)
_XAVIER = nn.initializers.xavier_uniform()  # of qkv: as one matrix of fan-out 3 D


def _square_qkv(key, shape, dtype):
    """Xavier uniform for each of query, key and value as a square matrix; `shape` is [D, 3 D]."""
    bound = (6 / (2 * shape[0])) ** 0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)


# Initial kernels of qkv and of the other linear layers of a block, by the name of an initialization.
KERNELS = {
    "vit": (NORMAL, NORMAL),
    "dino": (NORMAL, NORMAL),
    "mae": (_XAVIER, _XAVIER),
    "mocov3": (_square_qkv, _XAVIER),
}


class Mlp(nn.Module):
    ratio: float
    precision: Precision
    kernel_init: nn.initializers.Initializer

    @nn.compact
    def __call__(self, x: Float[jax.Array, "B N D"]) -> Float[jax.Array, "B N D"]:
        policy = dict(
            dtype=self.precision.compute,
            param_dtype=self.precision.wide,
            kernel_init=self.kernel_init,
            precision=self.precision.matmul,
        )
        hidden = nn.Dense(int(x.shape[-1] * self.ratio), name="in", **policy)(x)  # [B, N, 4 D]
        return nn.Dense(x.shape[-1], name="out", **policy)(nn.gelu(hidden, approximate=False))  # [B, N, D]


def layer_norm(precision: Precision, name: str | None = None) -> nn.LayerNorm:
    return nn.LayerNorm(
        epsilon=1e-6, dtype=precision.wide, param_dtype=precision.wide, use_fast_variance=False, name=name
    )


class Block(nn.Module):
    heads: int
    mlp_ratio: float
    precision: Precision
    attention: str
    initial: str = "vit"
    layer_scale: float = 0.0
    keep: tuple[str, ...] = ()

    @nn.compact
    def __call__(
        self, x: Float[jax.Array, "B N D"], draws: Any, drop_path: DropPath | GrowingDropPath | None
    ) -> tuple[Float[jax.Array, "B N D"], dict[str, Float[jax.Array, "B ..."]]]:
        """Runs the block on tokens `x`; returns also a dict of the intermediate results named in `keep`.

        `keep` may contain "output" [B, N, D] and "class_attention" [B, H, N], see `Attention`. `draws` is this
        block's entry of `drop_path.of_blocks`, or None.
        """
        norm_1, norm_2 = (layer_norm(self.precision, name) for name in ("norm_1", "norm_2"))
        qkv_init, kernel_init = KERNELS[self.initial]
        attention = Attention(self.heads, self.precision, self.attention, qkv_init, kernel_init, name="attention")
        mlp = Mlp(self.mlp_ratio, self.precision, kernel_init, name="mlp")
        first, second = (None, None) if drop_path is None else drop_path.of_branches(draws)
        kept = {"class_attention": attention(norm_1(x), class_weights=True)} if "class_attention" in self.keep else {}
        x = drop.residual(lambda y: self._scaled(1, attention(norm_1(y))), x, first)
        x = drop.residual(lambda y: self._scaled(2, mlp(norm_2(y))), x, second)
        x = constrain_batch(x)
        return x, kept | ({"output": x} if "output" in self.keep else {})

    def _scaled(self, branch: int, y: Float[jax.Array, "B N D"]) -> Float[jax.Array, "B N D"]:
        """The output of a branch times its LayerScale, if the network has any."""
        if not self.layer_scale:
            return y
        initial = nn.initializers.constant(self.layer_scale)
        return y * self.param(f"layer_scale_{branch}", initial, y.shape[-1:], self.precision.wide)


def _keep_input_only(apply: Callable, dtype) -> Callable:
    """Rematerializes `apply(params, x, draws, drop_path)`: only `x`, cast to `dtype`, is stored for the backward pass.

    The residual stream is `wide`, so casting halves the stored activations. The forward pass does not change; the
    gradient is taken at the rounded input, which the matrix products round anyway.
    """

    @jax.custom_vjp
    def block(params, x, draws, drop_path):
        return apply(params, x, draws, drop_path)

    def forward(params, x, draws, drop_path):
        return apply(params, x, draws, drop_path), (params, x.astype(dtype), jnp.zeros((), x.dtype), draws, drop_path)

    def backward(kept, gradient):
        params, x, like, draws, drop_path = kept
        # Otherwise the compiler could reuse values of the forward pass and store them.
        params, x, gradient = jax.lax.optimization_barrier((params, x, gradient))
        _, pull = jax.vjp(lambda params, x: apply(params, x, draws, drop_path), params, x.astype(like.dtype))
        return (*pull(gradient), None, None)

    block.defvjp(forward, backward)
    return block


def stack(
    module: nn.Module, name: str, length: int, x: Float[jax.Array, "B N D"],
    drop_path: DropPath | GrowingDropPath | None = None, stream: int = 0, keep: tuple[str, ...] = (), first: int = 0,
) -> tuple[Float[jax.Array, "B N D"], dict[str, Float[jax.Array, "{length} B ..."]]]:  # fmt: skip
    """Runs the blocks `name` of `module` on the tokens `x`; returns also what the blocks keep, see `Block`.

    Args:
      module: has the attributes `heads`, `mlp_ratio`, `precision`, `attention`, `initial`, `layer_scale`, `scan` and
        `remat` of a `ViT`.
      length: number of blocks.
      stream: number of the stack among those that draw from the same `drop_path`.
      first: number of blocks in those before it.
    """
    sizes = (
        module.heads, module.mlp_ratio, module.precision, module.attention, module.initial, module.layer_scale, keep
    )  # fmt: skip
    draws = None if drop_path is None else drop_path.of_blocks(stream, first, length)
    if module.is_initializing():
        initial = nn.scan(
            Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),
            length=length,
        )
        return initial(*sizes, name=name)(x, draws, drop_path)

    def apply(params, x, draws, drop_path):
        params = gathered(params, name, module.precision.compute, SHARDING_RULES)
        return Block(*sizes, parent=None).apply({"params": params}, x, draws, drop_path)

    if module.remat == "dots":  # gathered parameters are not stored, neither here nor below
        policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        apply = jax.checkpoint(apply, prevent_cse=not module.scan, policy=policy)
    elif module.remat == "block":
        apply = _keep_input_only(apply, module.precision.compute)
    # Pure functions from here on: Flax's lifted scan could not cast the stored inputs.
    stacked = (module.variables["params"][name], draws)
    body = lambda x, part: apply(part[0], x, part[1], drop_path)  # noqa: E731
    return jax.lax.scan(body, x, stacked, length, unroll=1 if module.scan else length)
