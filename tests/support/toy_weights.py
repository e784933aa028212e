"""Small networks with random parameters under other libraries' names, for tests of import and export."""

import functools

import jax
import numpy as np

from pera_jax import config as configs
from pera_jax.bands import Bands
from pera_jax.formats import tables
from pera_jax.models import vit
from pera_jax.objectives.pera import objective as pera
from pera_jax.weights import released


def shape(rng) -> dict:
    """A random `vit.description`, small."""
    heads, depth = int(rng.integers(1, 5)), int(rng.integers(2, 6))
    width = heads * int(rng.integers(3, 9))
    patch, bands = int(rng.choice([2, 4, 7])), int(rng.integers(1, 6))
    return dict(
        width=width, depth=depth, heads=heads, patch=patch, image_size=patch * int(rng.integers(2, 6)), bands=bands,
        split=depth // 2, mlp_ratio=int(rng.integers(1, 5 * width)) / width,
    )  # fmt: skip


def filled(tree, rng):
    """A tree of shapes with random float32 values."""
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), tree)


def backbone(description: dict, rng, scan: bool = True) -> dict:
    model = vit.build(description, scan=scan)
    side = description["image_size"]
    image = jax.ShapeDtypeStruct((1, side, side, description["bands"]), np.float32)
    return filled(jax.eval_shape(model.init, jax.random.key(0), image)["params"], rng)


def dictionary(rng) -> dict[str, np.ndarray]:
    """The released program's, of a network of width 16, 3 blocks, 2 heads, patches of 4 px, 16 px, red, green, blue."""
    config = configs.smoke(configs.default())
    config.model.update(dict(width=16, depth=3, heads=2, patch=4))
    config.crops.update(dict(global_size=16, local_size=8))
    config.pera.heads.update(dict(hidden=12, bottleneck=8, prototypes=32))
    objective = pera.PerA.from_config(config, Bands.plain())
    params = filled(jax.eval_shape(objective.init, jax.random.key(0)), rng)
    teacher = filled({name: params[name] for name in objective.teacher_keys}, rng)
    tree = {"params": params, "teacher": teacher}
    return tables.to_named(tree, released.table(3, objective.encoder.split), heads=2, patch=4)


def assert_same(one, other) -> None:
    """The same tree, bit for bit."""
    jax.tree.map(functools.partial(np.testing.assert_array_equal, strict=True), one, other)
