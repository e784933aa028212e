"""The precision policy.

`wide` (float32): parameters, tokens, the residual stream, LayerNorm, softmaxes and losses.
`compute` (bfloat16 or float32): operands of matrix products and attention, which accumulate in float32.
Prototype logits are returned in `wide`, because they are divided by temperatures as low as 0.02.
float64 for both is meant for equality tests and needs `jax_enable_x64`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Float


@dataclasses.dataclass(frozen=True)
class Precision:
    """The precision policy as two dtypes. Hashable, so that it can be a field of Flax modules."""

    wide: jnp.dtype = jnp.dtype("float32")
    compute: jnp.dtype = jnp.dtype("float32")

    @classmethod
    def from_names(cls, compute: str, wide: str = "float32") -> "Precision":
        """From dtype names: `compute` is `config.precision`, `wide` is `config.parameter_precision`."""
        return cls(jnp.dtype(wide), jnp.dtype(compute))

    @property
    def half(self) -> bool:
        return self.compute.itemsize < 4

    @property
    def matmul(self) -> jax.lax.Precision | None:
        """Full precision for float32 operands, which TPUs and GPUs would otherwise round to bf16 or TF32."""
        return None if self.half else jax.lax.Precision.HIGHEST

    @property
    def norm_floor(self) -> float:
        """The smallest norm by which an L2 normalization divides."""
        return 1e-6 if self.half else 1e-12

    def wide_einsum(self, subscripts: str, *operands: Float[jax.Array, "..."]) -> Float[jax.Array, "..."]:
        """An einsum of `wide` operands in full `wide` precision (Gram matrices, distances)."""
        return jnp.einsum(subscripts, *operands, precision=jax.lax.Precision.HIGHEST)

    def product(
        self, subscripts: str, a: Float[jax.Array, "..."], b: Float[jax.Array, "..."]
    ) -> Float[jax.Array, "..."]:
        """An einsum of two arrays, cast to `compute`, accumulated and returned in `wide`.

        Its cotangent is rounded to `compute`, so that the products of the backward pass do not mix both precisions.
        """
        return _product(subscripts, self, a.astype(self.compute), b.astype(self.compute))

    def logits(self, features: Float[jax.Array, "*B D"], weights: Float[jax.Array, "K D"]) -> Float[jax.Array, "*B K"]:
        """`features` times the rows of `weights`, in `wide`; the operands are cast to `compute`."""
        return self.product("...d,kd->...k", features, weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(subscripts: str, policy: Precision, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(subscripts, a, b, preferred_element_type=policy.wide, precision=policy.matmul)


def _product_backward(subscripts, policy, operands, cotangent):
    a, b = operands
    cotangent = cotangent.astype(policy.compute)
    product = functools.partial(jnp.einsum, subscripts, precision=policy.matmul)
    (to_a,) = jax.linear_transpose(lambda a: product(a, b), a)(cotangent)
    (to_b,) = jax.linear_transpose(lambda b: product(a, b), b)(cotangent)
    return to_a, to_b


_product.defvjp(lambda subscripts, policy, a, b: (_product(subscripts, policy, a, b), (a, b)), _product_backward)
