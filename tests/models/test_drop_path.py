"""Stochastic depth: how many crops are kept, how they are scaled, and where the subsets come from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import NamedSharding

from pera_jax.models import drop_path
from pera_jax.objectives.pera import masks as masking
from pera_jax.objectives.pera.views import Views
from pera_jax.parallel import sharding


def residual(branch, x, key, rate, group):
    """`drop_path.residual` on a whole batch `x`."""
    depth = drop_path.DropPath(key, jnp.arange(len(x) // group), rate, group)
    return drop_path.residual(branch, x, depth)


def ones_kept(key, groups, group, rate=0.3):
    """Bool [groups, group]: the crops on which the branch ran, and what it added."""
    x = jnp.zeros((groups * group, 1, 1))
    added = residual(jnp.ones_like, x, key, rate, group).reshape(groups, group)
    return added > 0, added


def test_kept_is_exact_for_every_group_size():
    for group in range(1, 400):
        assert drop_path.kept_of(group, 0.3) == max(7 * group // 10, 1)  # whole numbers: no rounding to trust
    assert drop_path.kept_of(10, 0.9) == 1
    assert drop_path.kept_of(7, 0.0) == 7


@pytest.mark.parametrize("group, kept", [(1, 1), (2, 1), (3, 2), (10, 7), (16, 11)])
def test_each_group_keeps_its_number_and_scales_it(group, kept):
    ran_on = []

    def branch(y):
        ran_on.append(y.shape)
        return jnp.ones_like(y)

    x = jnp.arange(5.0 * group).reshape(5 * group, 1, 1)
    out = residual(branch, x, jax.random.key(3), 0.3, group)
    added = np.asarray(out - x).reshape(5, group)
    assert ran_on == [(5 * kept, 1, 1)]  # the skipped crops cost nothing
    np.testing.assert_array_equal((added > 0).sum(axis=1), kept)
    np.testing.assert_allclose(added[added > 0], group / kept, rtol=1e-5)


def test_expectation_is_the_branch():
    keys = jax.random.split(jax.random.key(0), 3000)
    added = jax.vmap(lambda key: ones_kept(key, 4, 5)[1])(keys)  # [keys, 4, 5]: 3 of 5 kept, scaled by 5 / 3
    deviation = np.sqrt((5 / 3) ** 2 * 0.6 * 0.4 / len(keys))
    assert np.abs(added.mean(axis=0) - 1).max() < 5 * deviation


def test_groups_draw_their_own_subsets():
    kept, _ = ones_kept(jax.random.key(0), 64, 10)
    assert len({tuple(row) for row in np.asarray(kept)}) > 30  # of 120
    # No correlation between neighboring groups' crops beyond chance.
    same = np.mean(np.asarray(kept[1:]) == np.asarray(kept[:-1]))
    assert abs(same - (0.7**2 + 0.3**2)) < 5 * np.sqrt(0.25 / kept[1:].size)


def test_value_and_gradients_equal_the_masked_formula():
    groups, group = 3, 4
    key, (kx, kw, kg) = jax.random.key(7), jax.random.split(jax.random.key(8), 3)
    x = jax.random.normal(kx, (groups * group, 5, 6))
    w = jax.random.normal(kw, (6, 6)) / 3
    seed = jax.random.normal(kg, x.shape)
    scale = ones_kept(key, groups, group)[1].reshape(-1, 1, 1)

    def branch(w, y):
        return jnp.tanh(y @ w)

    def ours(x, w):
        return jnp.sum(seed * residual(lambda y: branch(w, y), x, key, 0.3, group))

    def naive(x, w):
        return jnp.sum(seed * (x + scale * branch(w, x)))

    value, gradients = jax.value_and_grad(ours, (0, 1))(x, w)
    expected, expected_gradients = jax.value_and_grad(naive, (0, 1))(x, w)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for gradient, other in zip(gradients, expected_gradients):
        np.testing.assert_allclose(gradient, other, rtol=1e-5, atol=1e-5)


def test_off_without_depth_or_rate():
    x = jnp.arange(6.0).reshape(6, 1, 1)
    for out in (drop_path.residual(jnp.cos, x, None), residual(jnp.cos, x, jax.random.key(0), 0.0, 3)):
        np.testing.assert_array_equal(out, x + jnp.cos(x))


def test_parts_of_a_batch_draw_what_the_whole_does():
    x, key = jax.random.normal(jax.random.key(0), (12, 3, 4)), jax.random.key(1)
    whole = residual(jnp.sin, x, key, 0.3, 3)
    places = jnp.array([2, 0])
    part = x.reshape(4, 3, 3, 4)[places].reshape(6, 3, 4)
    out = drop_path.residual(jnp.sin, part, drop_path.DropPath(key, places, 0.3, 3))
    np.testing.assert_array_equal(out, whole.reshape(4, 3, 3, 4)[places].reshape(6, 3, 4))


def test_groups_stay_on_their_devices():
    """With whole groups on each device nothing crosses between devices, forward or backward; the result is the same."""
    mesh = sharding.make_mesh()
    where = NamedSharding(mesh, sharding.BATCH)
    x = jax.random.normal(jax.random.key(0), (32, 3, 4))

    def gradient(x):
        return jax.grad(lambda x: jnp.sum(residual(jnp.sin, x, jax.random.key(1), 0.3, 4) ** 2))(x)

    compiled = jax.jit(gradient, in_shardings=where, out_shardings=where).lower(x).compile()
    for collective in ("all-gather", "all-to-all", "all-reduce", "collective-permute", "reduce-scatter"):
        assert collective not in compiled.as_text()
    np.testing.assert_allclose(compiled(jax.device_put(x, where)), gradient(x), rtol=1e-6)


@pytest.mark.parametrize("scan", [True, False])
def test_every_block_branch_and_kind_has_a_key_of_its_own(monkeypatch, scan):
    calls = []

    def spy(branch, x, depth):
        if depth is None:
            return x + branch(x)  # the teacher
        rate, group = depth.rate, depth.group
        jax.debug.callback(
            lambda data: calls.append((tuple(data.ravel().tolist()), rate, group)), jax.random.key_data(depth.key)
        )
        return x + branch(x)

    monkeypatch.setattr(drop_path, "residual", spy)
    settings = tiny.config(crops__local_number=3, drop_path__group=2, model__scan=scan)
    objective = tiny.objective(settings)
    params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(objective.init, jax.random.key(0)))

    @jax.jit
    def run(params, key):
        views = {}
        for kind, (crops, size, _) in objective.crops.items():
            masks = masking.sample(key, 4 * crops, objective.parts[kind])
            views[kind] = Views(*[jnp.zeros((4 * crops, size, size, 3))] * 2, masks)
        depths = objective.drop_paths(key, jnp.arange(4))
        return objective.outputs(params, {k: params[k] for k in objective.teacher_keys}, views, depths)[0].units

    jax.block_until_ready(run(params, jax.random.key(0)))
    jax.effects_barrier()
    depth = settings.model.depth
    assert len(calls) == 2 * depth * 2
    assert len({key for key, _, _ in calls}) == len(calls)
    # A group of 2 images is 2 x 2 global and 2 x 3 local crops.
    assert sorted((rate, group) for _, rate, group in calls) == [(0.3, 4)] * 2 * depth + [(0.3, 6)] * 2 * depth


# ---------------------------------------------------------------- a rate that grows over the blocks


def factors_of(depth, rate, crops, key=0):
    """What each branch of each block is multiplied by, and the rates: [depth, 2, crops], [depth]."""
    growing = drop_path.GrowingDropPath(jax.random.key(key), crops, rate, depth)
    stacks = [growing.of_blocks(stream, first, number) for stream, first, number in ((0, 0, 2), (1, 2, depth - 2))]
    keys, rates = (jnp.concatenate(parts) for parts in zip(*stacks))
    branches = [growing.of_branches((keys[i], rates[i])) for i in range(depth)]
    return np.array([[branch.factors() for branch in both] for both in branches]), np.asarray(rates)


def test_a_growing_rate_drops_each_crop_by_itself_and_keeps_the_expectation():
    number = 20000
    factors, rates = factors_of(5, 0.4, jnp.arange(number))
    np.testing.assert_allclose(rates, [0.0, 0.1, 0.2, 0.3, 0.4], rtol=1e-6)
    assert np.all(factors[0] == 1)  # the first block runs always
    for i, rate in enumerate(rates):
        for values in factors[i]:
            np.testing.assert_allclose(values[values > 0], 1 / (1 - rate), rtol=1e-6)
            deviation = np.sqrt(rate * (1 - rate) / number)
            assert abs(np.mean(values == 0) - rate) <= 5 * deviation
            assert abs(values.mean() - 1) <= 5 * deviation / (1 - rate) + 1e-6
    dropped = (factors[1:] == 0).reshape(8, number)  # independent between blocks, branches and crops
    assert np.abs(np.corrcoef(dropped) - np.eye(8)).max() < 5 / np.sqrt(number)
    assert all(abs(np.corrcoef(row[1:], row[:-1])[0, 1]) < 5 / np.sqrt(number) for row in dropped)
    part = jnp.array([11, 3, 19000])
    np.testing.assert_array_equal(factors_of(5, 0.4, part)[0], factors[:, :, part])  # as microbatches draw


@pytest.mark.parametrize("remat, scan", [("none", True), ("block", True), ("dots", False)])
def test_a_growing_rate_in_a_network(remat, scan):
    """Of two blocks the first runs always; in the second, each branch of a crop counts as often as its factor says."""
    config = tiny.config(model__depth=2, model__remat=remat, model__scan=scan)
    encoder = tiny.objective(config).encoder
    params = jax.jit(encoder.init)(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
    params = jax.tree.map(lambda leaf: leaf + 0.1 * jnp.cos(jnp.arange(leaf.size).reshape(leaf.shape)), params)
    images = jax.random.normal(jax.random.key(1), (24, 16, 16, 3))
    growing = drop_path.GrowingDropPath(jax.random.key(2), jnp.arange(24), 0.5, 2)

    @jax.jit
    def run(params):
        def total(params, growing):
            found = encoder.apply(params, images, drop_path=growing, blocks=2)
            return jnp.sum(found["class_token"] ** 2), found["blocks"]

        return jax.value_and_grad(total, has_aux=True)(params, growing), total(params, None)[1]

    ((_, (first, second)), gradients), (whole_first, whole_second) = run(params)
    np.testing.assert_allclose(first, whole_first, atol=1e-5)
    factors = np.array([branch.factors() for branch in growing.of_branches(
        jax.tree.map(lambda leaf: leaf[0], growing.of_blocks(1, 1, 1)))])  # fmt: skip
    assert {tuple(pair) for pair in factors.T} == {(a, b) for a in (0, 2) for b in (0, 2)}
    skipped = np.flatnonzero((factors == 0).all(axis=0))
    np.testing.assert_allclose(second[skipped], first[skipped], atol=1e-5)
    changed = np.flatnonzero((factors != 0).any(axis=0))
    assert np.all(np.abs(second - first)[changed].max(axis=(1, 2)) > 1e-3)
    assert np.all(np.abs(second - whole_second)[changed].max(axis=(1, 2)) > 1e-3)
    upper = gradients["params"]["upper"]
    assert all(np.isfinite(leaf).all() and np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(upper["mlp"]))
