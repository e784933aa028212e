"""Images on which photometric operations are compared with those of other programs."""

import functools
import os
import pathlib

import numpy as np
import pytest
from PIL import Image

from data_prep import demo_scenes
from data_prep.demo.scene_layouts import LAYOUTS

PHOTOS = pathlib.Path(os.environ.get("PERA_JAX_PHOTOS", pathlib.Path(__file__).parents[3] / "shared/data/aid"))


@functools.cache
def photographs(number=30, size=128):
    """Real photographs [number, size, size, 3] uint8; skips the test if there are none."""
    files = sorted(PHOTOS.rglob("*.jpg"))
    if not files:
        pytest.skip(f"no photographs (*.jpg) in {PHOTOS}; name a folder in PERA_JAX_PHOTOS")
    chosen = files[:: max(len(files) // number, 1)][:number]
    return np.stack([np.asarray(Image.open(f).convert("RGB").resize((size, size))) for f in chosen])


@functools.cache
def drawings(number=12, size=96, seed=0):
    """Smooth random images of moderate color, as photographs have: [N, size, size, 3] uint8."""
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(0, 255, (number, 8, 8, 3))
    coarse = coarse.mean(axis=-1, keepdims=True) * 0.7 + coarse * 0.3
    return np.stack(
        [np.asarray(Image.fromarray(c.astype(np.uint8)).resize((size, size), Image.Resampling.BICUBIC)) for c in coarse]
    )


@functools.cache
def scenes(size=96):
    """A procedural overhead scene of each class, with edges and texture: [12, size, size, 3] uint8."""
    return np.stack([demo_scenes.render(name, size, np.random.default_rng(i)) for i, name in enumerate(LAYOUTS)])
