"""DINOv2 (Oquab et al., arXiv:2304.07193), with the patch term of iBOT (Zhou et al., arXiv:2111.07832)."""

from pera_jax.objectives.dinov2.objective import DINOv2

OBJECTIVE = DINOv2
