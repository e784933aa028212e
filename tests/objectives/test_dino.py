"""DINO: what the official program's numbers do not pin, and naive computations of what they do."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from pera_jax import config as configs
from pera_jax import objectives
from pera_jax.bands import Bands
from pera_jax.common.errors import UserError
from pera_jax.objectives import dino
from pera_jax.parallel import sharding
from pera_jax.training import schedules
from pera_jax.training import step as steps

BANDS = Bands.plain(mean=0.45, std=0.22)


def config_of(**changes):
    """A network of two blocks on crops of 16 and 8 px, three of these; `changes` are written a__b=value."""
    config = configs.smoke(configs.default("dino"))
    config.precision = "float32"
    config.crops.update(dict(global_size=16, local_size=8, local_number=3))
    config.model.update(dict(width=16, depth=3, heads=2, patch=8, remat="none"))
    config.dino.heads.update(dict(hidden=12, bottleneck=8, prototypes=24))
    config.update_from_flattened_dict({field.replace("__", "."): value for field, value in changes.items()})
    return config


def objective_of(config):
    return objectives.from_config(config, BANDS)


def named(tree):
    return {sharding.path_of(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def random_like(tree, rng, scale=0.3):
    return jax.tree.map(lambda leaf: scale * rng.normal(size=leaf.shape), tree)


# ---------------------------------------------------------------- the optimizer


def naive_steps(start, teacher, gradients, scalars, settings, norm_last_layer):
    """The official program's rules in NumPy: a parameter is a block's slice of a stack; returns both networks."""

    def parts(tree):
        return {
            (name, i): np.array(part) for name, leaf in tree.items()
            for i, part in (enumerate(leaf) if "/lower/" in name or "/upper/" in name else [(None, leaf)])
        }  # fmt: skip

    student, ema, moments = parts(start), parts(teacher), {}
    b1, b2 = settings.beta1, settings.beta2
    for given, values in zip(gradients, scalars, strict=True):
        for key, gradient in parts(given).items():
            name = key[0]
            if norm_last_layer and name.endswith("gain"):
                continue
            norm = np.sqrt(np.sum(gradient**2))
            gradient = gradient * min(settings.clip_norm / (norm + 1e-6), 1.0)
            if name.startswith("prototype_head/") and name.endswith(("gain", "direction")):
                if not values[dino.TRAINED]:
                    continue
            first, second, count = moments.get(key, (0.0, 0.0, 0))
            first, second, count = b1 * first + (1 - b1) * gradient, b2 * second + (1 - b2) * gradient**2, count + 1
            moments[key] = first, second, count
            exempt = name.endswith("bias") or "norm" in name
            decay = 0.0 if exempt else values["weight_decay"]
            direction = first / (1 - b1**count) / (np.sqrt(second / (1 - b2**count)) + settings.eps)
            student[key] = student[key] - values["learning_rate"] * (direction + decay * student[key])
        for key, own in ema.items():
            if not (norm_last_layer and key[0].endswith("gain")):
                momentum = 1 - values["one_minus_momentum"]
                ema[key] = momentum * own + (1 - momentum) * student[key]
    return student, ema


@pytest.mark.parametrize("norm_last_layer", [True, False])
def test_steps_are_those_of_a_naive_adamw_with_freezing_clipping_and_decay(norm_last_layer):
    config = config_of(dino__norm_last_layer=norm_last_layer, optimizer__clip_norm=0.7, parameter_precision="float64")
    with jax.enable_x64(True):
        objective = objective_of(config)
        optimizer = steps.make_optimizer(objective, config.optimizer)
        rng = np.random.default_rng(0)
        shapes = jax.eval_shape(objective.init, jax.random.key(0))
        params = random_like(shapes, rng)
        teacher = random_like(shapes, rng)
        # norms on both sides of the limit, also among the blocks of a stack
        gradients = [
            jax.tree.map(lambda leaf: leaf * np.exp(rng.normal(size=leaf.shape[:1] + (1,) * (leaf.ndim - 1))), g)  # noqa: B023
            for g in (random_like(shapes, rng, 0.2) for _ in range(5))
        ]
        scalars = [
            {"learning_rate": 0.01 * (n + 1), "weight_decay": 0.1 + 0.1 * n, "one_minus_momentum": 0.3 - 0.05 * n,
             dino.TRAINED: float(n >= 2)}
            for n in range(5)
        ]  # fmt: skip
        state = steps.TrainState(jnp.int32(0), params, teacher, optimizer.init(params), {})

        @jax.jit
        def update(state, gradients, scalars):
            return steps.apply_gradients(state, gradients, objective, {}, scalars, optimizer, config.optimizer)[0]

        frozen = []
        for given, values in zip(gradients, scalars, strict=True):
            state = update(state, given, values)
            frozen.append(jax.device_get(state.params["prototype_head"]["direction"]))
        state = jax.device_get(state)

    student, ema = naive_steps(
        named(params), named(teacher), map(named, gradients), scalars, config.optimizer, norm_last_layer
    )
    for tree, expected in ((state.params, student), (state.teacher, ema)):
        found = named(tree)
        for (name, i), values in expected.items():
            np.testing.assert_allclose(found[name] if i is None else found[name][i], values, rtol=0, atol=1e-11)
    np.testing.assert_array_equal(frozen[1], params["prototype_head"]["direction"])
    assert np.all(frozen[2] != frozen[1])
    for tree, before in ((state.params, params), (state.teacher, teacher)):
        stayed = np.array_equal(tree["prototype_head"]["gain"], before["prototype_head"]["gain"])
        assert stayed == norm_last_layer


def test_the_last_layer_is_frozen_for_the_first_epoch():
    config = config_of(dino__freeze_last_layer="1 epochs")
    run = schedules.scalars(config, dino.Dino.schedules(), steps_per_epoch=7, total_steps=70)
    assert [run.at(n)[dino.TRAINED] for n in (0, 6, 7, 69)] == [0, 0, 1, 1]
    config.dino.freeze_last_layer = "0 epochs"
    run = schedules.scalars(config, dino.Dino.schedules(), steps_per_epoch=7, total_steps=70)
    assert run.at(0)[dino.TRAINED] == 1


# ---------------------------------------------------------------- loss and state


@pytest.fixture(scope="module")
def looked_at():
    """One loss in float64: config, state, scalars, and (loss, update, outputs z, estimated center)."""
    config = config_of(precision="float64", parameter_precision="float64", drop_path__rate=0.0)
    with jax.enable_x64(True):
        objective, rng = objective_of(config), np.random.default_rng(1)
        shapes = jax.eval_shape(objective.init, jax.random.key(0))
        params, teacher = random_like(shapes, rng), random_like(shapes, rng)
        state = {"center": 0.2 * rng.normal(size=24)}
        scalars = {"teacher_temperature": 0.06, "student_temperature": 0.1}
        views = {
            kind: rng.normal(size=(4 * crop.number, crop.size, crop.size, 3)) for kind, crop in objective.crops.items()
        }

        @jax.jit
        def look(params, teacher, state, views):
            loss, aux = objective.loss_on_views(params, teacher, state, views, None, scalars)
            student, teacher_out, _ = objective.outputs(params, teacher, views, None)
            z = [objective.precision.logits(out.units, out.weights) for out in (student, teacher_out)]
            seen = type("Seen", (dino.Dino,), {"make_views": lambda _, examples: examples})
            found = seen(**{field.name: getattr(objective, field.name) for field in dataclasses.fields(objective)})
            return loss, objective.update(state, aux), z, found.estimate(teacher, views)

        return config, state, scalars, jax.device_get(look(params, teacher, state, views))


def test_loss_is_the_naive_loop_without_terms_of_the_same_view(looked_at):
    _, state, scalars, (loss, (_, metrics), (student, teacher), _) = looked_at

    def log_softmax(z):
        return z - np.log(np.exp(z - z.max()).sum()) - z.max()

    terms, parts = [], {"global": 0.0, "local": 0.0}
    assert student.shape == (4, 5, 24) and teacher.shape == (4, 2, 24)
    for b in range(4):
        for i in range(2):
            p = np.exp(log_softmax((teacher[b, i] - state["center"]) / scalars["teacher_temperature"]))
            for v in range(5):
                if v != i:
                    term = -np.sum(p * log_softmax(student[b, v] / scalars["student_temperature"]))
                    terms.append(term)
                    parts["global" if v < 2 else "local"] += term / (4 * 2 * 4)
    assert len(terms) == 4 * 8  # 2 x (1 + 3) per image
    np.testing.assert_allclose(loss, np.mean(terms), rtol=1e-10)
    np.testing.assert_allclose(metrics["loss/class_global"], parts["global"], rtol=1e-10)
    np.testing.assert_allclose(metrics["loss/class_local"], parts["local"], rtol=1e-10)


def test_the_center_moves_after_its_use(looked_at):
    config, before, _, (_, (after, _), (_, teacher), estimate) = looked_at
    np.testing.assert_allclose(after["center"], 0.9 * before["center"] + 0.1 * teacher.mean(axis=(0, 1)), rtol=1e-10)
    np.testing.assert_allclose(estimate, teacher.mean(axis=(0, 1)), rtol=1e-10)
    assert config.dino.center_momentum == 0.9


# ---------------------------------------------------------------- recipe


def test_the_recipe_is_the_official_one():
    config = configs.default("dino")
    optimizer, own = config.optimizer, config.dino
    assert (optimizer.eps, optimizer.clip, optimizer.clip_norm) == (1e-8, "parameter", 3.0)
    assert (optimizer.beta1, optimizer.beta2, optimizer.decay) == (0.9, 0.999, "no_bias_or_norm")
    assert config.schedules.learning_rate.peak == 5e-4 * config.batch_size / 256
    assert (own.heads.hidden, own.heads.bottleneck, own.heads.prototypes) == (2048, 256, 65536)
    assert (config.crops.global_area, config.crops.local_area) == ((0.4, 1.0), (0.05, 0.4))
    views = objective_of(config_of()).specs
    found = [(v.jitter, v.grayscale, v.blur, v.solarize) for kind in ("global", "local") for v in views[kind]]
    assert found == [(0.8, 0.2, 1.0, 0.0), (0.8, 0.2, 0.1, 0.2), (0.8, 0.2, 0.5, 0.0)]
    run = schedules.scalars(config, dino.Dino.schedules(), steps_per_epoch=10, total_steps=1000)
    first, last = run.at(0), run.at(999)
    assert first["learning_rate"] == 0.0 and run.at(99)["learning_rate"] == config.schedules.learning_rate.peak
    np.testing.assert_allclose([1 - first["one_minus_momentum"], first["weight_decay"]], [0.996, 0.04], rtol=1e-12)
    np.testing.assert_allclose([1 - last["one_minus_momentum"], last["weight_decay"]], [1.0, 0.4], rtol=1e-5)
    assert {run.at(n)["teacher_temperature"] for n in (0, 299, 999)} == {0.04}


def test_initial_values():
    config = config_of(model__width=96, dino__heads__hidden=80, dino__heads__bottleneck=48)
    config.dino.heads.prototypes = 256
    params = named(jax.device_get(jax.jit(objective_of(config).init)(jax.random.key(3))))
    uniform = {"patch_projection": (8 * 8 * 3) ** -0.5, "direction": 48**-0.5}
    for name, values in params.items():
        bound = next((bound for part, bound in uniform.items() if part in name), None)
        if bound:
            assert stats.kstest(values.ravel(), stats.uniform(-bound, 2 * bound).cdf).pvalue > 1e-4, name
        elif name.endswith(("kernel", "class_token", "position_embedding")):
            assert stats.kstest(values.ravel(), stats.norm(0, 0.02).cdf).pvalue > 1e-4, name
        else:
            assert np.all(values == (1.0 if name.endswith(("scale", "gain")) else 0.0)), name


def test_drop_path_grows_or_keeps_a_number():
    growing = objective_of(config_of(drop_path__rate=0.2)).drop_paths(jax.random.key(0), jnp.arange(2, 4))
    assert growing["local"].depth == 3 and growing["global"].rate == 0.2
    np.testing.assert_array_equal(growing["local"].places, np.arange(6, 12))
    assert not np.array_equal(*(jax.random.key_data(each.key) for each in growing.values()))
    uniform = objective_of(config_of(dino__growing_drop_path=False, drop_path__rate=0.5, drop_path__group=2))
    groups = uniform.drop_paths(jax.random.key(0), jnp.arange(4))
    assert (groups["local"].group, groups["global"].group) == (6, 4)
    counted, without = (
        each.flops_per_image() for each in (uniform, dataclasses.replace(uniform, growing_drop_path=True))
    )
    assert counted["student local"] < 0.6 * without["student local"]


@pytest.mark.parametrize("change, sentence", [
    (dict(crops__global_number=3), "crops.global_number=3 must be 2 for DINO"),
    (dict(drop_path__group=2), "drop_path.group=2 must be 1 with dino.growing_drop_path"),
    (dict(dino__heads__prototypes=30), "dino.heads.prototypes=30 is not divisible by the 4 shards"),
    (dict(dino__center_momentum=1.5), "dino.center_momentum=1.5 must lie in"),
])  # fmt: skip
def test_configs_that_do_not_fit_are_refused(change, sentence):
    with pytest.raises(UserError, match=sentence):
        configs.check(config_of(**change), 1, 4, 1)
