"""The networks: position embeddings at other resolutions, and dependencies between tokens."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pera_jax.cost import hlo
from pera_jax.models import attention, drop_path, heads, positions, vit
from pera_jax.models.precision import Precision
from pera_jax.parallel import sharding

F64 = Precision.from_names("float64", "float64")
DEPTH, SPLIT, PATCH, SIDE = 4, 2, 4, 4  # SIDE in patches


# ---------------------------------------------------------------- positions at other resolutions


def keys_kernel(x, a=-0.75):
    x = abs(x)
    if x < 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def bicubic_loop(grid, height, width):
    """Each output from its 4 x 4 neighbors, none of it separated."""
    old_h, old_w, channels = grid.shape
    result = np.zeros((height, width, channels))
    for i in range(height):
        for j in range(width):
            y = (i + 0.5) / ((height + 0.1) / old_h) - 0.5
            x = (j + 0.5) / ((width + 0.1) / old_w) - 0.5
            for row in range(int(np.floor(y)) - 1, int(np.floor(y)) + 3):
                for column in range(int(np.floor(x)) - 1, int(np.floor(x)) + 3):
                    tap = grid[np.clip(row, 0, old_h - 1), np.clip(column, 0, old_w - 1)]
                    result[i, j] += keys_kernel(y - row) * keys_kernel(x - column) * tap
    return result


@pytest.mark.parametrize("old, new", [
    ((4, 4), (9, 9)), ((9, 9), (4, 4)), ((28, 28), (6, 6)), ((5, 8), (7, 3)), ((6, 6), (6, 7)), ((3, 3), (1, 20)),
])  # fmt: skip
def test_positions_are_resampled_as_the_plain_loop_does(old, new):
    grid = np.random.default_rng(0).normal(size=(*old, 5))
    for dtype, bound in (("float64", 1e-12), ("float32", 5e-6)):
        resampled = positions.resample(jnp.asarray(grid, dtype), *new)
        assert resampled.dtype == dtype
        np.testing.assert_allclose(resampled, bicubic_loop(grid, *new), atol=bound)


@given(st.integers(1, 40), st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_the_map_of_an_axis_is_the_loop_and_keeps_constants(old, new):
    matrix = positions.axis_map(old, new)
    loop = bicubic_loop(np.eye(old)[:, None], new, 1)  # the other axis has one row: its weights sum to 1
    np.testing.assert_allclose(matrix, loop[:, 0], atol=1e-12)
    np.testing.assert_allclose(matrix.sum(axis=1), 1, atol=1e-12)


# ---------------------------------------------------------------- who influences whom


def network(**changes):
    shape = dict(width=16, depth=DEPTH, heads=2, patch=PATCH, image_size=SIDE * PATCH, bands=3, split=SPLIT)
    return vit.ViT(**(shape | changes), precision=F64)


@pytest.fixture(scope="module")
def params():
    """Values that no part can hide behind: zeros and ones of the start are moved too."""
    with jax.enable_x64(True):
        start = jax.eval_shape(network().init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"]
        rng = np.random.default_rng(0)
        return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.3), start)


@pytest.fixture(autouse=True)
def in_float64():
    with jax.enable_x64(True):
        yield


APPLY = jax.jit(
    lambda model, params, *inputs, blocks=0: model.apply({"params": params}, *inputs, blocks=blocks),
    static_argnums=0, static_argnames="blocks",
)  # fmt: skip


def inputs(seed, batch=3):
    """(images, visible, learnable, mask token): 5 patches seen, 4 learnable, 7 neither, drawn per image."""
    rng = np.random.default_rng(seed)
    order = np.stack([rng.permutation(SIDE * SIDE) for _ in range(batch)])
    images = rng.normal(size=(batch, SIDE * PATCH, SIDE * PATCH, 3))
    return images, order[:, :5], order[:, 5:9], rng.normal(size=16)


def only(patches, new, old):
    """`new` at the given patches of each image, `old` elsewhere."""
    chosen = np.zeros((len(patches), SIDE * SIDE), bool)
    np.put_along_axis(chosen, patches, True, axis=1)
    pixels = chosen.reshape(-1, SIDE, SIDE).repeat(PATCH, axis=1).repeat(PATCH, axis=2)[..., None]
    return np.where(pixels, new, old)


def differs(one, other):
    return {name for name in one if not np.array_equal(one[name], other[name])}


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=15, deadline=None)
def test_patches_that_are_not_seen_have_no_influence_at_all(params, seed):
    with jax.enable_x64(True):  # hypothesis runs the examples outside the fixture's context
        images, visible, learnable, token = inputs(seed)
        out = APPLY(network(), params, images, visible, learnable, token)
        other = 100 * np.random.default_rng(seed + 1).normal(size=images.shape)
        hidden = APPLY(network(), params, only(visible, images, other), visible, learnable, token)
        assert not differs(out, hidden)  # bit for bit, although the learnable patches' pixels changed too
        seen = APPLY(network(), params, only(visible[:, :1], other, images), visible, learnable, token)
        assert differs(out, seen) == set(out)


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=15, deadline=None)
def test_the_order_of_patches_does_not_matter(params, seed):
    with jax.enable_x64(True):
        images, visible, learnable, token = inputs(seed)
        rng = np.random.default_rng(seed + 1)
        one, two = rng.permutation(visible.shape[1]), rng.permutation(learnable.shape[1])
        out = APPLY(network(), params, images, visible, learnable, token)
        moved = APPLY(network(), params, images, visible[:, one], learnable[:, two], token)
        np.testing.assert_allclose(moved["class_token"], out["class_token"], atol=1e-12)
        np.testing.assert_allclose(moved["patch_tokens"], out["patch_tokens"][:, one], atol=1e-12)
        np.testing.assert_allclose(moved["learnable_tokens"], out["learnable_tokens"][:, two], atol=1e-12)


def test_all_patches_in_raster_order_are_the_whole_image(params):
    images, _, _, _ = inputs(0)
    every = np.broadcast_to(np.arange(SIDE * SIDE), (len(images), SIDE * SIDE))
    whole, chosen = APPLY(network(), params, images), APPLY(network(), params, images, every)
    for name in whole:
        np.testing.assert_allclose(whole[name], chosen[name], atol=1e-12)


def silent(params, stack):
    """The same with blocks that add nothing in one of the two stacks."""
    quiet = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf * 0 if re.search("attention/projection|mlp/out", sharding.path_of(path)) else leaf,
        params[stack],
    )
    return params | {stack: quiet}


def test_learnable_tokens_join_between_the_stacks(params):
    images, visible, learnable, token = inputs(1)
    moved = (learnable + 3) % (SIDE * SIDE)

    # With a silent upper stack they meet no block: nobody feels them, and they come out as they joined.
    quiet = silent(params, "upper")
    out = APPLY(network(), quiet, images, visible, learnable, token)
    alone = APPLY(network(), quiet, images, visible)
    for name in alone:
        np.testing.assert_allclose(out[name], alone[name], atol=1e-12)
    joined = token + np.asarray(params["position_embedding"])[1:][learnable]
    centered = joined - joined.mean(axis=-1, keepdims=True)
    scaled = centered / np.sqrt((centered**2).mean(axis=-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(
        out["learnable_tokens"], scaled * params["norm"]["scale"] + params["norm"]["bias"], atol=1e-12
    )
    assert differs(out, APPLY(network(), quiet, images, visible, moved, token)) == {"learnable_tokens"}
    assert differs(out, APPLY(network(), quiet, images, visible, learnable, -token)) == {"learnable_tokens"}

    # With a silent lower stack every token feels them: they went through all of the upper one.
    quiet = silent(params, "lower")
    out = APPLY(network(), quiet, images, visible, learnable, token)
    assert differs(out, APPLY(network(), quiet, images, visible, moved, token)) == set(out)
    assert differs(out, APPLY(network(), quiet, images, visible, learnable, -token)) == set(out)


def test_outputs_of_the_last_blocks_are_those_of_the_cut_trunk(params):
    images, visible, _, _ = inputs(2)
    blocks = jax.tree.map(lambda *stacks: jnp.concatenate(stacks), params["lower"], params["upper"])
    found = APPLY(network(), params, images, visible, blocks=DEPTH)["blocks"]
    assert len(found) == DEPTH
    for depth, output in enumerate(found[1:], start=2):  # with a split of its own, which then cannot matter
        cut = params | {
            "lower": jax.tree.map(lambda leaf: leaf[: depth - 1], blocks),
            "upper": jax.tree.map(lambda leaf: leaf[depth - 1 : depth], blocks),
        }
        out = APPLY(network(depth=depth, split=depth - 1), cut, images, visible)
        np.testing.assert_allclose(output[:, 0], out["class_token"], atol=1e-12)
        np.testing.assert_allclose(output[:, 1:], out["patch_tokens"], atol=1e-12)
    last = APPLY(network(), params, images, visible, blocks=3)["blocks"]  # from both stacks
    assert len(last) == 3
    np.testing.assert_allclose(np.stack(last), np.stack(found[-3:]), atol=1e-12)


def test_positions_are_kept_at_the_training_grid_and_the_class_part_everywhere(params):
    model = network().bind({"params": params})
    np.testing.assert_array_equal(model.positions(SIDE, SIDE), params["position_embedding"])
    other = model.positions(3, 6)
    np.testing.assert_array_equal(other[0], params["position_embedding"][0])
    grid = np.asarray(params["position_embedding"])[1:].reshape(SIDE, SIDE, -1)
    np.testing.assert_allclose(other[1:], bicubic_loop(grid, 3, 6).reshape(18, -1), atol=1e-12)


def test_a_head_gives_unit_vectors_and_normalized_rows():
    head = heads.Head(12, 8, 20, F64)
    x = np.random.default_rng(0).normal(size=(5, 6))
    params = jax.jit(head.init)(jax.random.key(0), x)["params"] | {"gain": jnp.arange(1.0, 21.0)}
    apply = jax.jit(lambda params, x: head.apply({"params": params}, x))
    unit, matrix = apply(params, x)
    np.testing.assert_allclose(np.linalg.norm(unit, axis=-1), 1, atol=1e-12)
    np.testing.assert_allclose(np.linalg.norm(matrix, axis=-1), params["gain"], rtol=1e-12)
    longer = params | {"direction": 7 * params["direction"]}
    np.testing.assert_allclose(apply(longer, x)[1], matrix, rtol=1e-12)
    # At a zero vector (no bias, no input) the outputs and every gradient stay finite.
    grads = jax.grad(lambda params: jnp.sum(apply(params, 0 * x)[0] ** 2))(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_attention_in_parts_is_attention_and_moves_nothing(monkeypatch):
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(("data", "fsdp"), None, "tensor"))
    rng = np.random.default_rng(0)
    query, key, value, weight = (rng.normal(size=(24, 5, 4, 3)).astype(np.float32) for _ in range(4))

    def loss(inputs):
        return jnp.sum(weight * attention._mix_in_parts(*inputs, Precision()))

    run = jax.value_and_grad(loss)
    whole = jax.jit(run)((query, key, value))
    monkeypatch.setattr(attention, "_SCORES", 2 * 4 * 5 * 5 * 4)  # two crops at a time
    with jax.set_mesh(mesh):
        inputs = jax.device_put((query, key, value), where)
        parted = jax.jit(run).lower(inputs).compile()
    assert "while(" in parted.as_text()
    assert {one.kind for one in hlo.collectives(parted.as_text())} == {"all-reduce"}  # the sum of the loss
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), parted(inputs), whole)


def test_scan_and_remat_change_neither_values_nor_gradients(params):
    """With drop path, whose subsets every block draws for itself."""
    images, visible, learnable, mask_token = inputs(0, batch=6)
    rng = np.random.default_rng(1)
    weights = [rng.normal(size=shape) for shape in ((6, 16), (6, 5, 16), (6, 4, 16))]
    dropped = drop_path.DropPath(jax.random.key(2), jnp.arange(3), 0.5, 2)
    found = []
    for change in (dict(), dict(remat="dots"), dict(scan=False, remat="block")):
        model = dataclasses.replace(network(), **change)

        def loss(params, mask_token):
            out = model.apply({"params": params}, images, visible, learnable, mask_token, dropped)  # noqa: B023
            return sum(jnp.sum(weight * value) for weight, value in zip(weights, out.values(), strict=True))

        found.append(jax.jit(jax.value_and_grad(loss, (0, 1)))(params, mask_token))
    for other in found[1:]:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(b, a, rtol=0, atol=1e-11 * np.abs(a).max()), found[0], other
        )
