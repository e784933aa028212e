"""MoCo v3: naive computations in float64, and what the numbers of the official program do not pin."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from pera_jax import config as configs
from pera_jax import objectives
from pera_jax.bands import Bands
from pera_jax.common.errors import UserError
from pera_jax.formats import tables
from pera_jax.models.batch_norm_mlp import BatchNormMlp
from pera_jax.models.precision import Precision
from pera_jax.objectives import independent_views
from pera_jax.parallel import sharding
from pera_jax.training import alarms, schedules
from pera_jax.training import step as steps

BANDS = Bands.plain(mean=0.45, std=0.22)
B, T = 8, 0.2  # images, temperature
SCALARS = {"temperature": T, "learning_rate": 1e-2, "weight_decay": 0.1, "one_minus_momentum": 0.1}


def config_of(dtype="float32", **changes):
    """A network of two blocks on crops of 16 px; `changes` are written a__b=value for the field a.b."""
    config = configs.smoke(configs.default("mocov3"))
    config.precision, config.parameter_precision, config.batch_size = dtype, dtype, B
    config.crops.global_size = 16
    config.model.update(dict(width=16, depth=2, heads=2, patch=8, remat="none"))
    config.mocov3.heads.update(dict(hidden=24, outputs=12))
    config.update_from_flattened_dict({field.replace("__", "."): value for field, value in changes.items()})
    return config


def objective_of(config):
    return objectives.from_config(config, BANDS)


def named(tree):
    return {sharding.path_of(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def random_networks(objective, seed=0):
    """Student and teacher of normal numbers, no two leaves alike."""
    rng, shapes = np.random.default_rng(seed), jax.eval_shape(objective.init, jax.random.key(0))
    draw = lambda tree: jax.tree.map(lambda leaf: jnp.asarray(0.4 * rng.normal(size=leaf.shape), leaf.dtype), tree)  # noqa: E731
    return draw(shapes), draw({key: shapes[key] for key in objective.teacher_keys})


def views_of(objective, seed=1):
    shape = (2 * B, objective.encoder.image_size, objective.encoder.image_size, 3)
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), objective.precision.wide)


# ---------------------------------------------------------------- naive computations


def naive_mlp(params, x):
    """A `BatchNormMlp` on the class tokens [B, D] of one view."""
    layers = sum(name.startswith("linear") for name in params)
    for n in range(1, layers + 1):
        x = x @ params[f"linear_{n}"]["kernel"]
        x = (x - x.mean(axis=0)) / jnp.sqrt(x.var(axis=0) + 1e-5)
        if n < layers:
            norm = params[f"norm_{n}"]
            x = jnp.maximum(x * norm["scale"] + norm["bias"], 0)
    return x


def naive_loss(params, teacher, objective, views):
    """-> (loss, [accuracy, mean cosine of own pairs, of other pairs]), one view and one query at a time."""

    def unit(x):
        return x / jnp.linalg.norm(x, axis=1, keepdims=True)

    def outputs(network, view):
        tokens = objective.encoder.apply({"params": network["backbone"]}, views[view::2])["class_token"]
        return naive_mlp(network["projector"], tokens)

    queries = [unit(naive_mlp(params["predictor"], outputs(params, view))) for view in (0, 1)]
    keys = [jax.lax.stop_gradient(unit(outputs(teacher, view))) for view in (0, 1)]
    loss, found, own, others = 0.0, 0.0, 0.0, 0.0
    for q, k in ((queries[0], keys[1]), (queries[1], keys[0])):
        for i in range(B):
            cosines = k @ q[i]  # [B]
            loss += 2 * T * -jnp.log(jnp.exp(cosines[i] / T) / jnp.sum(jnp.exp(cosines / T))) / B
            found += jnp.where(jnp.all(cosines <= cosines[i]), 1, 0) / (2 * B)
            own += cosines[i] / (2 * B)
            others += (jnp.sum(cosines) - cosines[i]) / (2 * B * (B - 1))
    return loss, jnp.stack([found, own, others])


def test_loss_gradients_and_metrics_are_those_of_a_naive_loop():
    with jax.enable_x64(True):
        objective = objective_of(config_of("float64"))
        (params, teacher), views = random_networks(objective), views_of(objective)
        compute = jax.jit(jax.value_and_grad(objective.loss_on_views, (0, 1), has_aux=True))
        (loss, aux), (gradients, to_keys) = compute(params, teacher, views, {"temperature": T})
        naive = jax.jit(jax.value_and_grad(lambda params: naive_loss(params, teacher, objective, views), has_aux=True))
        (expected, metrics), expected_gradients = naive(params)
    np.testing.assert_allclose(loss, expected, rtol=1e-12)
    ours = [aux[f"contrast/{name}"] for name in ("accuracy", "own", "others")]
    np.testing.assert_allclose(ours, metrics, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(aux["loss/view_1"] + aux["loss/view_2"], expected, rtol=1e-12)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(to_keys))
    expected_gradients = named(expected_gradients)
    assert np.abs(expected_gradients["backbone/norm/bias"]).max() < 1e-13  # why ours is dropped
    for name, gradient in named(gradients).items():
        if name == "backbone/norm/bias" or "patch_projection" in name:
            assert not np.any(gradient), name
        else:
            scale = np.abs(expected_gradients[name]).max()
            np.testing.assert_allclose(gradient, expected_gradients[name], rtol=0, atol=1e-11 * scale, err_msg=name)


def test_statistics_are_those_of_all_images_of_one_view_on_any_devices():
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        mlp = BatchNormMlp((10, 10, 6), Precision.from_names("float64", "float64"))
        x = jnp.asarray(rng.normal(size=(B, 2, 4)) + 3 * rng.normal(size=(B, 1, 1)))  # the images of a device differ
        shapes = jax.eval_shape(mlp.init, jax.random.key(0), x)["params"]
        params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), shapes)
        weights = jnp.asarray(rng.normal(size=(B, 2, 6)))

        def both(function):
            return jax.jit(jax.value_and_grad(lambda *a: (jnp.sum(weights * (y := function(*a))), y), (0, 1), True))

        naive = both(lambda params, x: jnp.stack([naive_mlp(params, x[:, view]) for view in (0, 1)], axis=1))
        expected = jax.device_get(naive(params, x))
        mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
        with jax.set_mesh(mesh):
            sharded = jax.device_put(x, jax.sharding.NamedSharding(mesh, sharding.BATCH))
            found = jax.device_get(both(lambda params, x: mlp.apply({"params": params}, x))(params, sharded))
        halves = np.concatenate([naive_mlp(params, x[part, 0]) for part in (slice(0, 4), slice(4, 8))])
    jax.tree.map(lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-11), found, expected)
    assert np.abs(halves - expected[0][1][:, 0]).max() > 0.1  # per device it would be something else


# ---------------------------------------------------------------- the step


@pytest.mark.parametrize("frozen", [True, False])
def test_the_patch_projection_stays_to_the_last_bit_in_both_networks(frozen):
    config = config_of(mocov3__freeze_patch_projection=frozen)
    objective = objective_of(config)
    optimizer = steps.make_optimizer(objective, config.optimizer)
    params, teacher = random_networks(objective)
    views, scalars = views_of(objective), {name: np.float32(value) for name, value in SCALARS.items()}

    @jax.jit
    def step(state):
        gradients = jax.grad(objective.loss_on_views, has_aux=True)(state.params, state.teacher, views, scalars)[0]
        return steps.apply_gradients(state, gradients, objective, {}, scalars, optimizer, config.optimizer)[0]

    state = steps.TrainState(jnp.zeros((), jnp.int32), params, teacher, optimizer.init(params), {})
    for _ in range(2):
        state = step(state)
    for before, after in ((params, state.params), (teacher, state.teacher)):
        after = named(after)
        for name, leaf in named(before).items():
            stays = frozen and re.search(r"patch_projection/(kernel|bias)$", name)
            assert np.array_equal(leaf, after[name]) == bool(stays), name


def test_initial_values():
    """Of one network wide enough for statistics; positions are constants."""
    config = config_of(model__width=48, model__heads=3, mocov3__heads__hidden=80, mocov3__heads__outputs=40)
    params = named(jax.jit(objective_of(config).init)(jax.random.key(3)))
    bounds = {
        "attention/qkv/kernel": (6 / 96) ** 0.5, "attention/projection/kernel": (6 / 96) ** 0.5,
        "mlp/(in|out)/kernel": (6 / (48 + 192)) ** 0.5, "patch_projection/kernel": (6 / (192 + 48)) ** 0.5,
        "projector/linear_1/kernel": 48**-0.5, r"projector/linear_[23]/kernel": 80**-0.5,
        "predictor/linear_1/kernel": 40**-0.5, "predictor/linear_2/kernel": 80**-0.5,
    }  # fmt: skip
    seen = set()
    for name, leaf in params.items():
        values = np.float64(leaf)
        if name.endswith("kernel"):
            ((pattern, bound),) = [item for item in bounds.items() if re.search(f"{item[0]}$", name)]
            seen.add(pattern)
            assert stats.kstest(values.ravel() / bound, stats.uniform(-1, 2).cdf).pvalue > 1e-3, name
            assert 1 - 12 / values.size < np.abs(values).max() / bound <= 1, name
        elif name == "backbone/class_token":
            assert stats.kstest(values / 1e-6, "norm").pvalue > 1e-3
        else:
            np.testing.assert_array_equal(values, 1.0 if name.endswith("scale") else 0.0, err_msg=name)
    assert seen == set(bounds) and not any("position" in name for name in params)


def test_the_views_have_their_own_probabilities():
    objective, number = objective_of(config_of()), 4000
    drawn = independent_views.draw(jax.random.key(0), number, objective.crops, objective.specs)["global"]
    for v, (blur, solarize) in enumerate(((1.0, 0.0), (0.1, 0.2))):
        for happened, expected in (
            (drawn.weights[:, v, 0] < 1, blur), (drawn.solarize[:, v], solarize), (drawn.grayscale[:, v], 0.2),
        ):  # fmt: skip
            deviation = (expected * (1 - expected) / number) ** 0.5
            assert abs(np.mean(happened) - expected) <= 4.5 * deviation
    both = np.mean(drawn.grayscale[:, 0] & drawn.grayscale[:, 1])  # the views are independent
    assert abs(both - 0.04) < 4.5 * (0.04 * 0.96 / number) ** 0.5


# ---------------------------------------------------------------- config, official names, alarms


def test_the_published_recipe():
    config = configs.load("mocov3_vitb16")
    run = schedules.scalars(
        config, objectives.method("mocov3").schedules(), steps_per_epoch=1000, total_steps=300_000
    )
    first, warm, last = (run.at(step) for step in (0, 40_000, 299_999))
    assert first["learning_rate"] == 0 and warm["learning_rate"] == pytest.approx(1.5e-4 * 16)
    assert last["learning_rate"] < 1e-9 and {first["weight_decay"], last["weight_decay"]} == {0.1}
    assert first["one_minus_momentum"] == pytest.approx(0.01) and last["one_minus_momentum"] < 1e-10
    assert first["temperature"] == last["temperature"] == 0.2
    shapes = jax.eval_shape(objective_of(config).init, jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes["backbone"])) == 12 * (12 * 768**2 + 13 * 768) + 772 * 768
    layers = {name: leaf.shape for name, leaf in named(shapes).items() if re.search("(or)/linear", name)}
    assert list(layers.values()) == [(256, 4096), (4096, 256), (768, 4096), (4096, 4096), (4096, 256)]


@pytest.mark.parametrize("changes, sentence", [
    ({"accumulate": 2}, "accumulate=2 must be 1: the batch norm and the negatives of mocov3 need the whole batch"),
    ({"crops__local_number": 2}, "crops.local_number=2 must be 2 and 0: mocov3 compares two global crops"),
    ({"crops__global_number": 3}, "crops.global_number=3 and .* must be 2 and 0"),
    ({"drop_path__rate": 0.1}, "drop_path.rate=0.1 must be 0"),
    ({"batch_size": 1}, "batch_size=1 must be >= 2"),
    ({"mocov3__heads__hidden": 0}, r"mocov3.heads.hidden=0 must be a number in \[1, "),
])  # fmt: skip
def test_what_it_cannot_do_is_refused_in_one_sentence(changes, sentence):
    configs.check(config_of(), 1, 1, 1)
    with pytest.raises(UserError, match=sentence):
        configs.check(config_of(**changes), 1, 1, 1)


def test_official_names_hold_all_parameters_of_both_networks():
    objective = objective_of(config_of())
    params, teacher = random_networks(objective)
    tree, entries = {"params": params, "teacher": teacher}, objective.official.entries(objective)
    named_arrays = tables.to_named(jax.device_get(tree), entries, 2, 8)
    assert named_arrays["predictor.3.weight"].shape == (12, 24)
    assert named_arrays["momentum_encoder.head.6.weight"].shape == (12, 24)
    np.testing.assert_array_equal(named_arrays["base_encoder.head.4.bias"], params["projector"]["norm_2"]["bias"])
    again = tables.from_named(named_arrays, entries, 2, 8)
    assert jax.tree.structure(again) == jax.tree.structure(tree)
    jax.tree.map(np.testing.assert_array_equal, again, jax.device_get(tree))


def test_alarms_tell_collapse_from_health():
    checks = objective_of(config_of()).health_checks(256)
    healthy = {
        "loss": 1.0, "norm/update": 1e-4, "norm/parameters": 1.0, "contrast/accuracy": 0.5,
        "student/feature_variance": 0.4,
    }  # fmt: skip
    for change, name in (({}, None), ({"contrast/accuracy": 1 / 256}, "no contrast"),
                         ({"student/feature_variance": 0.01}, "features collapse")):  # fmt: skip
        watch = alarms.Alarms(checks, 1e-3)
        rates = [1e-4, *[1e-3] * 300]  # alarms of collapse wait for the peak of the learning rate
        begun = [alarm for rate in rates for alarm in watch.update(healthy | change, rate)]
        assert [alarm.name for alarm in begun] == ([name] if name else []), name


def test_equal_outputs_are_no_success():
    """Collapsed networks find no image: the accuracy is that of chance, not 1."""
    objective = objective_of(config_of())
    params, teacher = random_networks(objective)
    views = jnp.broadcast_to(views_of(objective)[:1], (2 * B, 16, 16, 3))
    _, aux = jax.jit(objective.loss_on_views)(params, teacher, views, {"temperature": np.float32(T)})
    assert aux["student/feature_variance"] < 1e-4
    assert aux["contrast/accuracy"] <= 0.5


def test_both_views_are_shown():
    objective = objective_of(config_of())
    batch = {"global": np.random.default_rng(0).integers(0, 256, (3, 2, 16, 16, 3), np.uint8)}
    shown = objective.preview({}, batch, objectives.base.Streams(jax.random.key(0)), (0, 1, 2))
    assert list(shown.columns) == ["crop 1", "view 1", "crop 2", "view 2"]
    np.testing.assert_array_equal(shown.columns["crop 2"], batch["global"][:, 1])
    for v in (1, 2):
        assert shown.columns[f"view {v}"].shape == (3, 16, 16, 3)
        assert np.abs(np.int32(shown.columns[f"view {v}"]) - shown.columns[f"crop {v}"]).mean(axis=(1, 2, 3)).max() > 3
