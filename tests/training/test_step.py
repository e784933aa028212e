"""The step: independent of mesh and compilation options; AdamW, EMA, weight-decay mask, sharded initialization."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
import toy_states

from pera_jax import config as configs
from pera_jax import objectives
from pera_jax.bands import Bands
from pera_jax.cost import hlo
from pera_jax.objectives.base import Context, Streams
from pera_jax.objectives.pera import PerA
from pera_jax.parallel import sharding
from pera_jax.training import optimizer as optimizers
from pera_jax.training import schedules
from pera_jax.training import step as steps

STEPS = 4
DOUBLE = dict(precision="float64", parameter_precision="float64")
FSDP = dict(data=1, fsdp=8)


@functools.cache
def birth(**changes):
    """The state before the first step, on the host: the same for all meshes and ways to compile."""
    config = tiny.config(**changes)
    objective = tiny.objective(config)
    optimizer = steps.make_optimizer(objective, config.optimizer)
    return jax.device_get(toy_states.random_state(objective, optimizer))


@functools.cache
def compiled(mesh, **changes):
    """The jitted step on eight devices ("fsdp") or one, ready to run, and where state and batch lie."""
    config = tiny.config(**changes)
    mesh = sharding.make_mesh(**FSDP) if mesh else sharding.make_mesh(devices=jax.devices()[:1])
    objective = tiny.objective(config)
    optimizer = steps.make_optimizer(objective, config.optimizer)
    abstract = steps.abstract_state(objective, optimizer, mesh)
    where = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    step = steps.jit_step(
        steps.make_step(objective, optimizer, config.seed, config.optimizer, config.accumulate), where, mesh
    )
    # A small rate: Adam divides by the gradient's size, and steps that are large beside it amplify rounding.
    hyper = tiny.HYPER | {"learning_rate": 1e-3}
    hyper = {name: np.asarray(value, config.parameter_precision) for name, value in hyper.items()}
    with jax.set_mesh(mesh):
        step = step.lower(abstract, tiny.batch(config), hyper).compile()
    return step, where, jax.sharding.NamedSharding(mesh, sharding.BATCH), hyper


def run(mesh=None, batches=None, **changes):
    """Some steps from birth: (state at birth, state after, metrics of each step), on the host."""
    config = tiny.config(**changes)
    step, where, cut, hyper = compiled(mesh, **changes)
    born, metrics = birth(**{name: changes[name] for name in DOUBLE.keys() & changes.keys()}), []
    state = jax.device_put(jax.tree.map(np.array, born), where)  # a copy: the step takes its argument's memory
    for crops in batches or [tiny.batch(config, number) for number in range(STEPS)]:
        state, out = step(state, jax.device_put(crops, cut), hyper)
        metrics.append(jax.device_get(out))
    return born, jax.device_get(state), metrics


def assert_same(one, other, bound):
    """Every leaf of state and metrics within `bound`, relative to the leaf's largest change from birth (or value).

    The state has Adam's first moment in it, which is the sum of the steps' gradients with known weights.
    """
    (born, after, metrics), (_, after_other, metrics_other) = one, other
    for (path, start), end, end_other in zip(
        jax.tree_util.tree_flatten_with_path(born)[0], *map(jax.tree.leaves, (after, after_other)), strict=True
    ):
        scale = np.abs(np.float64(end) - start).max()
        assert np.abs(np.float64(end) - end_other).max() <= bound * scale, sharding.path_of(path)
    for values, values_other in zip(metrics, metrics_other, strict=True):
        assert values.keys() == values_other.keys()
        for name in values:
            assert abs(values[name] - values_other[name]) <= bound * max(abs(values[name]), 1e-3), name


@pytest.fixture(scope="module")
def double():
    with jax.enable_x64(True):
        return run(**DOUBLE)


def test_eight_devices_compute_what_one_computes(double):
    """With KoLeo's groups of four over two devices; test_contract has three axes and microbatches."""
    with jax.enable_x64(True):
        assert_same(double, run("fsdp", **DOUBLE), 1e-9)


def test_on_pure_fsdp_only_parameters_gradients_and_class_tokens_move():
    """Every collective is of the size of a parameter, of its share on one device, of a number per prototype or pair, or
    of the class tokens that look for neighbors; none is of patch tokens."""
    config = tiny.config()
    objective = tiny.objective(config)
    allowed = {1, config.pera.heads.prototypes, len(objective.parts) * 2, config.pera.heads.bottleneck**2}
    allowed.add(config.batch_size * config.crops.global_number * config.pera.heads.bottleneck)
    allowed.add((config.crops.local_size // config.model.patch) ** 2 * config.model.width)  # positions, resampled
    for path, leaf in jax.tree_util.tree_flatten_with_path(jax.eval_shape(objective.init, jax.random.key(0)))[0]:
        names = sharding.path_of(path).split("/")
        size = leaf.size // (leaf.shape[0] if {"lower", "upper"} & set(names) else 1)
        allowed |= {size, size // 8}
    with jax.enable_x64(True):  # as it is compiled above
        found = hlo.collectives(compiled("fsdp", **DOUBLE)[0].as_text())
    strange = {(one.kind, shape, one.name) for one in found for shape in one.shapes if np.prod(shape[1]) not in allowed}
    assert found and not strange
    assert not {"all-to-all", "collective-permute"} & {one.kind for one in found}


def test_the_first_moment_is_that_of_the_gradients_of_the_loss():
    """Adam's first moment starts as the share 1 - beta1 of the gradients, clipped."""
    config = configs.smoke(configs.default("toy_mae"))
    config.update_from_flattened_dict(DOUBLE)
    with jax.enable_x64(True):
        objective = objectives.from_config(config, Bands.plain())
        optimizer, batch = steps.make_optimizer(objective, config.optimizer), tiny.batch(config)
        born = toy_states.random_state(objective, optimizer)
        born = born.replace(opt_state=jax.tree.map(jnp.zeros_like, born.opt_state))
        rngs = Streams.at(config.seed, "step", 0)
        examples, context = objective.prepare(rngs, batch), Context(rngs, tiny.HYPER)
        grad = jax.jit(jax.grad(objective.loss, has_aux=True))
        wanted, _ = grad(born.params, born.teacher, born.objective, examples, context)
        step = steps.make_step(objective, optimizer, config.seed, config.optimizer)
        after, metrics = jax.jit(step)(born, batch, tiny.HYPER)
        clipped = min(1.0, config.optimizer.clip_norm / metrics["norm/gradient"])
        found = jax.tree.map(lambda moment: moment / (1 - config.optimizer.beta1) / clipped, after.opt_state[1].mu)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-9 * np.abs(a).max()), wanted, found
    )


def test_the_comparison_sees_one_image_and_the_order_of_images(double):
    """A control: the bounds are not met by a run in which a device's share is another or changed places."""
    batches = [tiny.batch(tiny.config(), number) for number in range(STEPS)]

    def changed(change):
        return [{kind: change(crops) for kind, crops in batch.items()} for batch in batches]

    controls = {
        "another image": changed(lambda crops: np.concatenate([crops[:-1], 255 - crops[-1:]])),
        "another order": changed(lambda crops: np.roll(crops, 2, axis=0)),
    }
    with jax.enable_x64(True):
        assert_same(double, run(batches=batches, **DOUBLE), 0)
        for other in controls.values():
            with pytest.raises(AssertionError):
                assert_same(double, run(batches=other, **DOUBLE), 1e-3)


# ---------------------------------------------------------------- optimizer and moving average


def update(grads, state, hyper, decay="all", clip=1e9):
    config = tiny.config(optimizer__clip_norm=clip, optimizer__decay=decay)
    objective = types.SimpleNamespace(
        teacher_keys=("backbone",), decay_rules=((r"kernel$", True), (r"bias$", False)), frozen=()
    )
    optimizer = steps.make_optimizer(objective, config.optimizer)
    state = state.replace(opt_state=optimizer.init(state.params)) if state.opt_state is None else state
    return steps.apply_gradients(state, grads, objective, state.objective, hyper, optimizer, config.optimizer)


@pytest.fixture
def state():
    rng = np.random.default_rng(0)
    params = {"backbone": {"kernel": jnp.asarray(rng.normal(size=(4, 3)), jnp.float32), "bias": jnp.ones(3)}}
    teacher = jax.tree.map(lambda leaf: leaf + 1, params)
    return steps.TrainState(jnp.int32(0), params, teacher, None, {})


def test_the_update_is_adamw(state):
    rng, hyper = np.random.default_rng(1), {k: np.float32(v) for k, v in tiny.HYPER.items()}
    eps = tiny.config().optimizer.eps
    theirs = optax.adamw(hyper["learning_rate"], 0.9, 0.999, eps, weight_decay=hyper["weight_decay"])
    params, opt_state = state.params, theirs.init(state.params)
    for _ in range(3):
        grads = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 1e-4, jnp.float32), params)
        updates, opt_state = theirs.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        state, metrics = update(grads, state, hyper)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), state.params, params)
    assert state.step == 3
    np.testing.assert_allclose(metrics["norm/gradient"], optax.tree.norm(grads), rtol=1e-6)
    np.testing.assert_allclose(metrics["norm/update"], optax.tree.norm(updates), rtol=1e-4)


def test_gradients_are_clipped_to_their_global_norm(state):
    hyper = {k: np.float32(v) for k, v in tiny.HYPER.items()}
    grads = jax.tree.map(lambda leaf: 10 * jnp.ones_like(leaf), state.params)
    norm = 10 * np.sqrt(15)
    clipped, metrics = update(grads, state, hyper, clip=3.0)
    by_hand, _ = update(jax.tree.map(lambda g: g * 3 / norm, grads), state, hyper)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), clipped.params, by_hand.params)
    np.testing.assert_allclose(metrics["norm/gradient"], norm, rtol=1e-6)  # as it was before


def test_the_teacher_moves_by_one_minus_momentum_with_all_its_digits(state):
    """Near momentum 1 the difference must come from float64: 1 - float32(0.99999) is off by 0.14 %."""
    settings = tiny.config()
    settings.pera.teacher_momentum.update(dict(start=0.99999, end=0.99999))
    at = schedules.scalars(settings, PerA.schedules(), steps_per_epoch=100, total_steps=3000).at(0)
    hyper = {name: np.float32(value) for name, value in (tiny.HYPER | at).items()} | {"learning_rate": np.float32(0)}
    after, _ = update(jax.tree.map(jnp.zeros_like, state.params), state.replace(
        params=jax.tree.map(lambda leaf: leaf + 100, state.teacher)), hyper)  # fmt: skip
    moved = jax.tree.map(lambda new, old: np.float64(new) - np.float64(old), after.teacher, state.teacher)
    for leaf in jax.tree.leaves(moved):
        np.testing.assert_allclose(leaf, 100 * 1e-5, rtol=5e-4)  # the rounding of the teacher itself is 1e-4 of it


def test_decay_spares_what_it_is_told_to():
    config = tiny.config()
    objective = tiny.objective(config)
    params, rules = jax.eval_shape(lambda: objective.init(jax.random.key(0))), steps.decay_rules(objective)
    shares = jax.tree_util.tree_flatten_with_path(optimizers.decayed(params, "matrices", rules))[0]
    decayed = {sharding.path_of(path) for path, on in shares if on}
    stacks = [
        f"backbone/{stack}/{name}/kernel"
        for stack in ("lower", "upper")
        for name in ("attention/qkv", "attention/projection", "mlp/in", "mlp/out")
    ]
    heads = [
        f"{head}/{name}"
        for head in ("prototype_head", "pixel_head")
        for name in ("hidden_1/kernel", "hidden_2/kernel", "bottleneck/kernel", "direction")
    ]
    assert decayed == {*stacks, *heads, "backbone/patch_projection/kernel", "backbone/position_embedding"}
    assert all(on for on in jax.tree.leaves(optimizers.decayed(params, "all", rules)))


def test_a_state_is_born_where_it_will_live():
    config = tiny.config(pera__heads__prototypes=128)
    objective = tiny.objective(config)
    optimizer = steps.make_optimizer(objective, config.optimizer)
    mesh = sharding.make_mesh(**FSDP)
    born = steps.init_sharded(objective, optimizer, mesh, 7)
    plain = jax.jit(lambda: steps.new_state(objective, optimizer, 7))()
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, strict=True), *map(jax.device_get, (born, plain)))
    for path, leaf in jax.tree_util.tree_flatten_with_path(born)[0]:
        part = leaf.addressable_shards[0].data.size
        matrix = any(name in sharding.path_of(path) for name in ("kernel", "direction"))
        assert part == (leaf.size // 8 if matrix else leaf.size), sharding.path_of(path)
    jax.tree.map(
        lambda leaf, other: np.testing.assert_array_equal(leaf, other),
        born.teacher, {key: born.params[key] for key in objective.teacher_keys},
    )  # fmt: skip
