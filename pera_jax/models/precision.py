"""The one place that says which numbers are kept in which precision.

`wide` (float32): parameters, tokens, the residual stream, LayerNorm, softmaxes and losses.
`compute` (bfloat16, or float32): the operands of matrix products and attention, which accumulate in float32.
Prototype logits are divided by temperatures down to 0.02, so they leave their product in `wide`.
float64 for both exists for tests of equality and wants `jax_enable_x64`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Precision:
    """The precision policy as two dtypes. Hashable, so Flax modules take it as a field."""

    wide: jnp.dtype = jnp.dtype("float32")
    compute: jnp.dtype = jnp.dtype("float32")

    @classmethod
    def of(cls, compute: str, wide: str = "float32") -> "Precision":
        """`compute` is the config's field `precision`: "bfloat16", "float32" (or "float64" with `wide` too)."""
        return cls(jnp.dtype(wide), jnp.dtype(compute))

    @property
    def half(self) -> bool:
        return self.compute.itemsize < 4

    @property
    def matmul(self) -> jax.lax.Precision | None:
        """Full products for wide operands: TPUs and GPUs would otherwise round float32 operands to bf16 or TF32."""
        return None if self.half else jax.lax.Precision.HIGHEST

    @property
    def norm_floor(self) -> float:
        """The least norm that an L2 normalisation divides by."""
        return 1e-6 if self.half else 1e-12

    def wide_einsum(self, subscripts: str, *operands: jax.Array) -> jax.Array:
        """An einsum over `wide` operands that stays in full `wide` precision (Gram matrices, distances)."""
        return jnp.einsum(subscripts, *operands, precision=jax.lax.Precision.HIGHEST)

    def product(self, subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
        """The einsum of two arrays from `compute` operands, accumulated and returned in `wide`.

        Its cotangent is rounded to `compute` first: else the products of the backward pass would mix both precisions.
        """
        return _product(subscripts, self, a.astype(self.compute), b.astype(self.compute))

    def logits(self, features: jax.Array, weights: jax.Array) -> jax.Array:
        """`features` [..., D] times `weights` [K, D] -> [..., K] in `wide`, from `compute` operands."""
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
