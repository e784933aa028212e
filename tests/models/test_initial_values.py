"""Initialization: the distribution of every parameter by name, and the published sizes."""

import importlib
import re

import jax
import numpy as np
import pytest
import tiny
from scipy import stats

from pera_jax.bands import Bands
from pera_jax.objectives.pera import objective as pera
from pera_jax.parallel import sharding

DEPTH = 4  # of tiny.config
BLOCKS = r"backbone/(lower|upper)/"
HEADS = r"(prototype|pixel)_head/"
# What each parameter starts as: constants, or a distribution and its scale.
INITIAL = {
    BLOCKS + r"(attention/(qkv|projection)|mlp/(in|out))/kernel": ("norm", 0.02),
    BLOCKS + r"(attention/(qkv|projection)|mlp/(in|out)|norm_\d)/bias": 0.0,
    BLOCKS + r"norm_\d/scale": 1.0,
    r"backbone/norm/scale": 1.0,
    r"backbone/norm/bias": 0.0,
    r"backbone/position_embedding": ("norm", 0.02),
    r"backbone/class_token": ("norm", 1e-6),
    r"mask_token": ("norm", 0.02),
    r"backbone/patch_projection/(kernel|bias)": ("uniform", (8 * 8 * 3) ** -0.5),  # bounds +-scale
    HEADS + r"(hidden_\d|bottleneck)/kernel": ("norm", 0.02),
    HEADS + r"(hidden_\d|bottleneck)/bias": 0.0,
    HEADS + r"direction": ("uniform", 48**-0.5),
    HEADS + r"gain": 1.0,
}


def named(tree):
    return {sharding.path_of(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


@pytest.fixture(scope="module")
def born():
    """Initial values of a network wide enough for statistics, by name."""
    config = tiny.config(
        model__width=96, pera__heads__hidden=80, pera__heads__bottleneck=48, pera__heads__prototypes=512
    )
    params = jax.jit(tiny.objective(config).init)(jax.random.key(5))
    return {name: np.float64(leaf) for name, leaf in named(params).items()}


def parts_of(name, values):
    """The arrays that must each be drawn anew: blocks, and query, key and value in them."""
    blocks = list(values) if re.match(BLOCKS, name) else [values]
    return [part for block in blocks for part in (np.moveaxis(block, 1, 0) if "qkv/kernel" in name else [block])]


def test_every_parameter_starts_as_specified(born):
    for name, values in born.items():
        (start,) = [start for pattern, start in INITIAL.items() if re.fullmatch(pattern, name)]
        if isinstance(start, float):
            np.testing.assert_array_equal(values, start, err_msg=name)
            continue
        shape, scale = start
        for part in parts_of(name, values):
            drawn, count = part.ravel() / scale, part.size
            law = stats.norm() if shape == "norm" else stats.uniform(-1, 2)
            assert stats.kstest(drawn, law.cdf).pvalue > 1e-4, name  # about 150 draws, of one fixed seed
            assert abs(drawn.mean()) < 4.5 * law.std() / np.sqrt(count), name
            # Cut at 2 sigma, a normal's deviation is 12 % less; this sees 2 % in the larger matrices.
            kurtosis = 3.0 if shape == "norm" else 1.8
            assert abs(drawn.std() / law.std() - 1) < 4.5 * np.sqrt((kurtosis - 1) / 4 / count), name
            if shape == "norm" and count > 2000:
                tail = np.mean(np.abs(drawn) > 2)
                assert abs(tail - 0.0455) < 4.5 * np.sqrt(0.0455 / count) and np.abs(drawn).max() > 3, name
            elif shape == "uniform":
                assert 1 - 12 / count < np.abs(drawn).max() <= 1, name
    for pattern in INITIAL:
        assert any(re.fullmatch(pattern, name) for name in born), pattern


def test_no_two_matrices_share_their_draws(born):
    """Blocks of one stack, the two stacks, query, key and value, the two heads: all independent."""
    groups = {}
    for name, values in born.items():
        if re.search("kernel$|direction$", name):
            for number, part in enumerate(parts_of(name, values)):
                groups.setdefault(part.shape, []).append((f"{name} {number}", (part / part.std()).ravel()))
    sizes = sorted(map(len, groups.values()))
    assert sizes[-1] == 3 * DEPTH and sizes[-2] == DEPTH  # query, key and value of all blocks; MLPs of all blocks
    for group in groups.values():
        for number, (name, one) in enumerate(group):
            for other_name, other in group[:number]:
                assert abs(np.mean(one * other)) < 5 / np.sqrt(one.size), (name, other_name)


@pytest.mark.parametrize(
    "name, width, depth, millions", [("pera_vitb16", 768, 12, 86), ("pera_vitg16_1024", 1024, 40, 505)]
)
def test_the_published_networks_have_their_sizes(name, width, depth, millions):
    config = importlib.import_module(f"configs.{name}").get_config()
    objective = pera.PerA.from_config(config, Bands.plain())
    params = jax.eval_shape(objective.init, jax.random.key(0))
    found = sum(leaf.size for leaf in jax.tree.leaves(params["backbone"]))
    block = 12 * width**2 + 13 * width  # 4 D^2 + 4 D of attention, 8 D^2 + 5 D of the MLP, 4 D of norms
    ends = (16 * 16 * 3 + 1) * width + (28 * 28 + 1) * width + width + 2 * width  # patches, positions, class, norm
    assert found == depth * block + ends
    assert abs(found / 1e6 - millions) < 1
    assert params["prototype_head"]["direction"].shape == (131072, 384)
    assert params["pixel_head"]["direction"].shape == (768, 384)
