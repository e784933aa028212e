"""Fixed position embeddings against their formula, at the training size and others; LayerScale."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pera_jax.encoder import fit
from pera_jax.models import positions, vit
from pera_jax.models.precision import Precision

F64 = Precision.from_names("float64", "float64")
SIDE, WIDTH, PATCH = 4, 12, 8


@pytest.fixture(autouse=True)
def in_float64():
    with jax.enable_x64(True):
        yield


def network(**changes):
    shape = dict(width=WIDTH, depth=3, heads=2, patch=PATCH, image_size=SIDE * PATCH, bands=3, split=1)
    return vit.ViT(**(shape | changes), precision=F64)


def random_params(model, seed=0):
    size = (1, model.image_size, model.image_size, 3)
    start = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(size))["params"]
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape)), start)


def formula(order, row, column, width):
    """One patch, number by number: sine and cosine of one coordinate, then of the other."""
    first, second = (column, row) if order == "sincos_xy" else (row, column)
    quarter, result = width // 4, []
    for coordinate in (first, second):
        for function in (math.sin, math.cos):
            result += [function(coordinate / 10000 ** (i / quarter)) for i in range(quarter)]
    return result


@pytest.mark.parametrize("order", ["sincos_xy", "sincos_yx"])
def test_a_fixed_embedding_is_its_formula_and_no_parameter(order):
    model = network(position=order)
    params = random_params(model)
    assert "position_embedding" not in params
    found = model.apply({"params": params}, SIDE, SIDE, method=model.positions)
    assert not np.any(found[0])  # the class token's
    expected = [formula(order, row, column, WIDTH) for row in range(SIDE) for column in range(SIDE)]
    np.testing.assert_allclose(found[1:], expected, rtol=0, atol=1e-12)


def test_the_two_orders_are_those_of_transposed_images():
    one, other = (positions.sincos(order, SIDE, WIDTH)[1:] for order in positions.ORDERS)
    np.testing.assert_array_equal(one.reshape(SIDE, SIDE, -1).transpose(1, 0, 2), other.reshape(SIDE, SIDE, -1))
    assert np.abs(one - other).max() > 0.5


def cubic(distance):
    """The kernel of PyTorch's bicubic interpolation, by its two polynomials with A = -0.75."""
    d, a = abs(distance), -0.75
    if d < 1:
        return (a + 2) * d**3 - (a + 3) * d**2 + 1
    return a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a if d < 2 else 0.0


@pytest.mark.parametrize("rows, columns", [(6, 6), (3, 7)])
def test_at_other_sizes_it_is_resampled_to_the_exact_size(rows, columns):
    model = network(position="sincos_xy")
    found = model.apply({"params": random_params(model)}, rows, columns, method=model.positions)
    table = positions.sincos("sincos_xy", SIDE, WIDTH)[1:].reshape(SIDE, SIDE, WIDTH)
    expected = np.zeros((rows, columns, WIDTH))
    for row in range(rows):
        for column in range(columns):
            y, x = (row + 0.5) * SIDE / rows - 0.5, (column + 0.5) * SIDE / columns - 0.5  # no + 0.1
            for i in range(math.floor(y) - 1, math.floor(y) + 3):
                for j in range(math.floor(x) - 1, math.floor(x) + 3):
                    nearest = table[min(max(i, 0), SIDE - 1), min(max(j, 0), SIDE - 1)]
                    expected[row, column] += cubic(y - i) * cubic(x - j) * nearest
    np.testing.assert_allclose(found[1:], expected.reshape(-1, WIDTH), atol=1e-12)
    assert not np.any(found[0])


def test_fixed_positions_reach_the_tokens():
    """The network is the one that learned these positions."""
    model, learned = network(position="sincos_yx"), network()
    params = random_params(model)
    images = np.random.default_rng(1).normal(size=(2, SIDE * PATCH, SIDE * PATCH, 3))
    table = jnp.asarray(positions.sincos("sincos_yx", SIDE, WIDTH))
    ours = model.apply({"params": params}, images)
    other = learned.apply({"params": params | {"position_embedding": table}}, images)
    jax.tree.map(np.testing.assert_array_equal, ours, other)


def test_layer_scale_multiplies_each_branch():
    """A gain of each channel after the last linear layer of a branch is the same as that layer with scaled outputs."""
    scaled, plain = network(layer_scale=1e-5), network()
    params = random_params(scaled)
    born = scaled.init(jax.random.key(0), jnp.zeros((1, PATCH, PATCH, 3)))["params"]
    for stack in ("lower", "upper"):
        for gain in ("layer_scale_1", "layer_scale_2"):
            assert born[stack][gain].shape == (1 if stack == "lower" else 2, WIDTH)
            np.testing.assert_allclose(born[stack][gain], 1e-5, rtol=1e-12)
    folded = dict(params)
    for stack in ("lower", "upper"):
        blocks = {name: leaf for name, leaf in params[stack].items() if not name.startswith("layer_scale")}
        for branch, part, layer in (("1", "attention", "projection"), ("2", "mlp", "out")):
            gain = params[stack][f"layer_scale_{branch}"]  # [depth, D]
            kernel, bias = params[stack][part][layer]["kernel"], params[stack][part][layer]["bias"]
            wide = gain.reshape(len(gain), *[1] * (kernel.ndim - 2), WIDTH)
            blocks[part] = blocks[part] | {layer: {"kernel": kernel * wide, "bias": bias * gain}}
        folded[stack] = blocks
    images = np.random.default_rng(2).normal(size=(2, SIDE * PATCH, SIDE * PATCH, 3))
    for ours, other in zip(*(jax.tree.leaves(model.apply({"params": tree}, images))
                             for model, tree in ((scaled, params), (plain, folded))), strict=True):
        np.testing.assert_allclose(ours, other, rtol=1e-9, atol=1e-11)


def test_weights_are_carried_between_networks_with_other_positions():
    """At another grid, a learned embedding that starts from a fixed one makes the same features."""
    model, finer = network(position="sincos_xy"), network(image_size=6 * PATCH)
    params = random_params(model)
    images = np.random.default_rng(3).normal(size=(2, 6 * PATCH, 6 * PATCH, 3))
    learned = fit.repositioned(params, vit.description(model), "learned", 6, 6)
    ours, other = finer.apply({"params": learned}, images), model.apply({"params": params}, images)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), ours, other)  # positions in float32
    back = fit.repositioned(learned, vit.description(finer), "sincos_xy", SIDE, SIDE)
    jax.tree.map(np.testing.assert_array_equal, back, params)
