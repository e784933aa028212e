"""Features of images by weights that are there, for programs and notebooks.

    from pera_jax import features

    model = features.load("runs/aid")        # or a folder that `python -m pera_jax.export timm` has written
    found = model(images)                    # stored values [B, H, W, C], of NumPy or JAX
    found.class_token, found.patch_map       # [B, D], [B, h, w, D]

See `pera_jax.encoder.model`.
"""

from pera_jax.encoder.model import NETWORKS, SIZES, Model, Tokens, load, load_weights

__all__ = ["NETWORKS", "SIZES", "Model", "Tokens", "load", "load_weights"]
