"""PerA pre-training in JAX: perfectly aligned sample pairs for remote sensing (Shen et al., arXiv:2505.19447)."""

from pera_jax.common import interrupts

interrupts.guard_imports()
