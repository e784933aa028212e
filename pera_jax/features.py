"""Features of images from trained weights, for programs and notebooks.

    from pera_jax import features

    model = features.load("runs/aid")        # or a folder written by `pera-jax export timm`
    tokens = model(images)                   # stored values [B, H, W, C], NumPy or JAX
    tokens.class_token, tokens.patch_map     # [B, D], [B, h, w, D]

See `pera_jax.encoder.model`.
"""

from pera_jax.encoder.model import NETWORKS, SIZES, Model, Tokens, load, load_weights

__all__ = ["NETWORKS", "SIZES", "Model", "Tokens", "load", "load_weights"]
