"""PerA: contrastive pre-training on perfectly aligned pairs (Shen et al., arXiv:2505.19447)."""

from pera_jax.objectives.pera.objective import PerA

OBJECTIVE = PerA
