"""DINOv2 compared with plain loops in float64, what its masks hide, and its rules for each parameter."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy_states

from pera_jax import config as configs
from pera_jax import objectives
from pera_jax.bands import Bands
from pera_jax.common.errors import UserError
from pera_jax.encoder import fit
from pera_jax.formats import tables
from pera_jax.objectives import batches, ibot_masks
from pera_jax.parallel import sharding
from pera_jax.training import optimizer as optimizers
from pera_jax.training import schedules
from pera_jax.training import step as steps

B, GROUP = 8, 2
SCALARS = {"student_temperature": 0.1, "teacher_temperature": 0.06}


def small(**changes):
    config = configs.smoke(configs.default("dinov2"))
    config.update(dict(precision="float64", parameter_precision="float64", batch_size=B))
    config.crops.update(dict(global_size=32, local_size=16, local_number=2))
    config.model.update(dict(width=16, depth=4, heads=2, patch=8, remat="none"))
    config.dinov2.heads.update(dict(hidden=12, bottleneck=8, prototypes=16, patch_prototypes=24))
    config.dinov2.loss.koleo_group = 4
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
    return config


def objective_of(config):
    return objectives.from_config(config, Bands.plain())


@dataclasses.dataclass
class Case:
    """An objective with random numbers for all that `loss_on_views` takes."""

    objective: object
    params: dict
    teacher: dict
    state: dict
    views: dict
    masks: np.ndarray

    @classmethod
    def of(cls, config):
        objective, rng = objective_of(config), np.random.default_rng(1)
        state = toy_states.random_state(objective, steps.make_optimizer(objective, config.optimizer))
        views = {name: rng.normal(size=(B * spec.number, spec.size, spec.size, 3))
                 for name, spec in objective.crops.items()}  # fmt: skip
        masks = batches.draws(objective, B, rng)["masks"]
        return cls(objective, *jax.device_get((state.params, state.teacher, state.objective)), views, masks)

    @property
    def arguments(self):
        return self.params, self.teacher, self.state, self.views, self.masks, None, SCALARS


@pytest.fixture(autouse=True)
def in_float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def sinkhorn():
    with jax.enable_x64(True):
        return Case.of(small())


@pytest.fixture(scope="module")
def centering():
    with jax.enable_x64(True):
        return Case.of(small(dinov2__targets="centering", dinov2__separate_heads=False))


@pytest.fixture(scope="module")
def of_sinkhorn(sinkhorn):
    with jax.enable_x64(True):
        compiled = jax.jit(jax.value_and_grad(sinkhorn.objective.loss_on_views, has_aux=True))
        return jax.device_get(compiled(*sinkhorn.arguments))


# ---------------------------------------------------------------- the loss, one crop after the other


def head(tree, x):
    """The outputs z of one token."""
    for name in ("hidden_1", "hidden_2", "bottleneck"):
        x = x @ tree[name]["kernel"] + tree[name]["bias"]
        if name != "bottleneck":
            x = np.array([0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in x])
    rows = tree["direction"] / np.linalg.norm(tree["direction"], axis=1, keepdims=True)
    return (tree["gain"][:, None] * rows) @ (x / np.linalg.norm(x))


def softmax(z):
    e = np.exp(z - z.max())
    return e / e.sum()


def targets(case, z, name):
    """The teacher's probabilities [rows, K] of its outputs z of all rows."""
    temperature = SCALARS["teacher_temperature"]
    if case.objective.targets == "centering":
        return np.array([softmax((row - case.state[name]) / temperature) for row in z])
    q = np.exp(z / temperature)
    for _ in range(3):
        q /= q.shape[1] * q.sum(axis=0)
        q /= len(q) * q.sum(axis=1, keepdims=True)
    return q * len(q)


def loop(case):
    """-> class term, patch term, KoLeo, the teacher's outputs at class tokens and at masked patches."""
    objective = case.objective
    encode = jax.jit(lambda tree, images, **masked: objective.encoder.apply({"params": tree}, images, **masked))
    replaced = dict(replaced=case.masks.reshape(2 * B, -1) != 0, mask_token=case.params["mask_token"])
    student = jax.device_get(encode(case.params["backbone"], case.views["global"], **replaced))
    teacher = jax.device_get(encode(case.teacher["backbone"], case.views["global"]))
    local = np.asarray(encode(case.params["backbone"], case.views["local"])["class_token"])
    patch_key = "patch_prototype_head" if "patch_prototype_head" in case.params else "prototype_head"

    z_t = np.array([head(case.teacher["prototype_head"], token) for token in teacher["class_token"]])  # [2 B, K]
    p_t, terms = targets(case, z_t, "center"), []
    for b in range(B):
        tokens = [*student["class_token"][2 * b : 2 * b + 2], *local[2 * b : 2 * b + 2]]
        for v, token in enumerate(tokens):
            log_p = np.log(softmax(head(case.params["prototype_head"], token) / SCALARS["student_temperature"]))
            terms += [-p_t[2 * b + i] @ log_p for i in (0, 1) if i != v]
    assert len(terms) == B * 2 * 3

    places = [(n, patch) for n in range(2 * B) for patch in np.flatnonzero(case.masks.reshape(2 * B, -1)[n])]
    y_t = np.array([head(case.teacher[patch_key], teacher["patch_tokens"][place]) for place in places])
    patch = 0.0
    for (n, l), p in zip(places, targets(case, y_t, "patch_center"), strict=True):
        z = head(case.params[patch_key], student["patch_tokens"][n, l]) / SCALARS["student_temperature"]
        patch -= p @ np.log(softmax(z)) / np.count_nonzero(case.masks.reshape(2 * B, -1)[n])

    spread = 0.0
    x = student["class_token"] / np.linalg.norm(student["class_token"], axis=1, keepdims=True)
    for v in (0, 1):
        of_crop = x[v::2]
        for i in range(B):
            others = [j for j in range(B) if j != i and j // objective.koleo_group == i // objective.koleo_group]
            nearest = max(others, key=lambda j: of_crop[i] @ of_crop[j])
            spread -= np.log(np.linalg.norm(of_crop[i] - of_crop[nearest] + 1e-8) + 1e-8) / B
    return np.mean(terms), patch / (2 * B), spread, z_t, y_t


def compare(case, loss, aux, expected):
    class_term, patch, spread, *_ = expected
    np.testing.assert_allclose(np.mean(aux["per_crop"]), class_term, rtol=1e-9)
    np.testing.assert_allclose(aux["patch"], patch, rtol=1e-9)
    np.testing.assert_allclose(aux["koleo"], spread, rtol=1e-9)
    np.testing.assert_allclose(loss, class_term + patch + 0.1 * spread, rtol=1e-9)


def test_the_loss_is_its_loop(sinkhorn, of_sinkhorn):
    """With Sinkhorn-Knopp over all crops and all masked patches, and crops without a mask among the 2 B."""
    counts = sinkhorn.masks.sum(axis=-1)
    assert (counts == 0).sum() == B and 0 < counts.sum() < sinkhorn.objective.masks.bound * B / GROUP
    compare(sinkhorn, *of_sinkhorn[0], loop(sinkhorn))


def test_centering_with_a_shared_head_on_eight_devices_is_its_loop(centering):
    """Also the centers, which move after their use by the means over all crops and all masked patches."""
    case, mesh = centering, sharding.make_mesh(data=2, fsdp=2, tensor=2)
    assert set(case.params) == {"backbone", "mask_token", "prototype_head"} and set(case.params) == set(case.teacher)
    case.objective = dataclasses.replace(case.objective, koleo_group=2)
    expected = loop(case)

    def step(*arguments):
        loss, aux = case.objective.loss_on_views(*arguments)
        return loss, aux, *case.objective.update(case.state, aux)

    with jax.set_mesh(mesh):
        batch = jax.sharding.NamedSharding(mesh, sharding.BATCH)
        views, masks = jax.device_put((case.views, case.masks), batch)
        networks = jax.device_put((case.params, case.teacher), sharding.tree_shardings(
            (case.params, case.teacher), mesh, steps.sharding_rules(case.objective)))  # fmt: skip
        loss, aux, state, metrics = jax.device_get(jax.jit(step)(*networks, case.state, views, masks, None, SCALARS))
    compare(case, loss, aux, expected)
    for name, z in zip(("center", "patch_center"), expected[3:], strict=True):
        np.testing.assert_allclose(state[name], 0.9 * case.state[name] + 0.1 * z.mean(axis=0), rtol=1e-9)
    assert 0 < metrics["loss/patch_lowest"] < metrics["loss/patch"]
    np.testing.assert_allclose(metrics["loss/class_global"] + metrics["loss/class_local"], metrics["loss/class"])


def test_microbatches_with_centering_add_up(centering):
    """Loss, centers and metrics of two halves, also where they have different numbers of masked patches."""
    case = dataclasses.replace(centering, objective=dataclasses.replace(centering.objective, koleo_group=2))
    of = jax.jit(case.objective.loss_on_views)
    whole = of(*case.arguments)[1]
    half = [slice(0, B // 2), slice(B // 2, B)]
    assert case.masks[half[0]].sum() != case.masks[half[1]].sum()
    parts = []
    for rows in half:
        views = {name: x.reshape(B, -1, *x.shape[1:])[rows].reshape(-1, *x.shape[1:]) for name, x in case.views.items()}
        parts.append(of(case.params, case.teacher, case.state, views, case.masks[rows], None, SCALARS)[1])
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *parts)
    (state, metrics), (expected, all_metrics) = (case.objective.update(case.state, aux) for aux in (mean, whole))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), (state, metrics), (expected, all_metrics))


def test_padding_of_the_buffer_has_no_effect(sinkhorn, of_sinkhorn):
    """Neither on the loss nor on any gradient."""
    wider = dataclasses.replace(sinkhorn.objective.masks, ratio=(0.5, 0.9))
    assert wider.bound > sinkhorn.objective.masks.bound + 5
    objective = dataclasses.replace(sinkhorn.objective, masks=wider)
    (loss, _), gradient = jax.jit(jax.value_and_grad(objective.loss_on_views, has_aux=True))(*sinkhorn.arguments)
    (expected, _), expected_gradient = of_sinkhorn
    np.testing.assert_allclose(loss, expected, rtol=1e-12)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-12), gradient, expected_gradient)
    assert np.abs(gradient["mask_token"]).max() > 1e-6


def test_the_student_does_not_see_masked_patches(sinkhorn):
    case, rng = sinkhorn, np.random.default_rng(2)
    run = jax.jit(lambda views, masks: case.objective.outputs(case.params, case.teacher, views, masks, None))
    noise = rng.normal(size=case.views["global"].shape)
    pixels = np.kron(case.masks.reshape(2 * B, 4, 4), np.ones((8, 8)))[..., None]  # [2 B, 32, 32, 1]
    before, hidden, shown = (
        jax.device_get(run(case.views | {"global": case.views["global"] + change}, case.masks))
        for change in (0, noise * pixels, noise * (1 - pixels))
    )
    held = before.row_weights > 0
    for name in ("student", "patch_student"):
        np.testing.assert_array_equal(getattr(hidden, name).units, getattr(before, name).units)
    assert np.all(np.any(shown.student.units[:, :2] != before.student.units[:, :2], axis=-1))
    assert np.all(np.any(shown.patch_student.units != before.patch_student.units, axis=-1)[held])
    moved = np.any(hidden.patch_teacher.units != before.patch_teacher.units, axis=-1)
    assert np.all(moved[held])
    masked = case.masks.any(axis=-1)
    np.testing.assert_array_equal(np.any(hidden.teacher.units != before.teacher.units, axis=-1), masked)


def test_masked_tokens_and_their_gradient_move_nothing_between_devices():
    rng, mesh = np.random.default_rng(0), sharding.make_mesh(data=4, fsdp=2)
    drawn = ibot_masks.BlockMasks(4, 2)
    masks = jnp.asarray(np.concatenate([drawn.draw(rng)["masks"] for _ in range(8)]))  # [16, 2, L]
    tokens, weights = rng.normal(size=(32, 16, 5)), rng.normal(size=(8, drawn.bound, 5))
    indices, rows = ibot_masks.index_buffer(masks, 2, drawn.bound)
    weights *= np.asarray(rows > 0)[:, :, None]  # padding has no gradient

    def both(tokens, masks, indices, weights):
        taken, back = jax.vjp(lambda tokens: ibot_masks.masked_tokens(tokens, masks, indices), tokens)
        return taken, back(weights)[0]

    with jax.set_mesh(mesh):
        batch = jax.sharding.NamedSharding(mesh, sharding.BATCH)
        arguments = jax.device_put((tokens, masks, indices, weights), batch)
        compiled = jax.jit(both, out_shardings=(batch, batch)).lower(*arguments).compile()
        taken, gradient = compiled(*arguments)
    assert not re.findall(r"all-gather|all-reduce|all-to-all|collective-permute", compiled.as_text())
    grouped = tokens.reshape(8, -1, 5)
    np.testing.assert_array_equal(taken, np.take_along_axis(grouped, np.asarray(indices)[:, :, None], axis=1))
    expected = np.zeros_like(grouped)
    for g in range(8):
        np.add.at(expected[g], np.asarray(indices[g]), weights[g])
    np.testing.assert_array_equal(gradient, expected.reshape(tokens.shape))


# ---------------------------------------------------------------- rules for each parameter


def official_factor(name: str, depth: int) -> float:
    """The learning-rate factor of a parameter of the official program, by its name."""
    layer = depth + 1
    if ".backbone." in name:
        if re.search(r"pos_embed|patch_embed|mask_token|cls_token", name):
            layer = 0
        elif found := re.search(r"\.blocks\.(\d+)\.", name):
            layer = int(found[1]) + 1
    return 0.9 ** (depth + 1 - layer) * (0.2 if "patch_embed" in name else 1.0)


def test_rates_and_decay_of_every_parameter_are_the_official_ones():
    config = small()
    objective = objective_of(config)
    params = jax.eval_shape(lambda: objective.init(jax.random.key(0)))
    entries = objective.official.entries(objective)

    def named(tree):
        full = jax.tree.map(lambda factor, leaf: np.broadcast_to(factor, leaf.shape), tree, params)
        return tables.to_named({"params": full}, entries, objective.encoder.heads, objective.encoder.patch)

    settings = config.optimizer
    assert (settings.layer_decay, settings.decay) == (0.9, "no_bias_or_norm")
    factors = named(optimizers.rate_factors(params, settings.rate_factors, settings.layer_decay))
    decayed = named(optimizers.decayed(params, settings.decay, steps.decay_rules(objective)))
    assert len(factors) == len(decayed) == 9 + 4 * 14 - 2 + 2 * 8
    for name, factor in factors.items():
        np.testing.assert_allclose(factor, official_factor(name, 4), rtol=1e-12, err_msg=name)
        exempt = name.endswith(".bias") or "norm" in name or "gamma" in name
        np.testing.assert_array_equal(decayed[name], 0.0 if exempt else 1.0, err_msg=name)


def test_last_layers_wait_while_their_moments_collect_and_each_network_is_clipped_by_itself():
    config = small(optimizer__clip_norm=0.5)
    objective, rng = objective_of(config), np.random.default_rng(3)
    optimizer = steps.make_optimizer(objective, config.optimizer)
    state = toy_states.random_state(objective, optimizer)
    state = state.replace(opt_state=jax.tree.map(jnp.zeros_like, state.opt_state))
    scale = {"backbone": 1.0, "mask_token": 1.0, "prototype_head": 1e-3, "patch_prototype_head": 3.0}
    gradients = {key: jax.tree.map(lambda leaf: scale[key] * rng.normal(size=leaf.shape), tree)  # noqa: B023
                 for key, tree in state.params.items()}  # fmt: skip

    @jax.jit
    def step(state, last_layer):
        scalars = {"learning_rate": 0.1, "weight_decay": 0.1, "one_minus_momentum": 0.1, "last_layer": last_layer}
        scalars = jax.tree.map(jnp.float64, scalars)
        own, settings = state.objective, config.optimizer
        return steps.apply_gradients(state, gradients, objective, own, scalars, optimizer, settings)[0]

    frozen = step(state, 0.0)
    thawed = step(frozen, 1.0)
    last = {(head, leaf) for head in ("prototype_head", "patch_prototype_head") for leaf in ("direction", "gain")}
    for path, before in jax.tree_util.tree_leaves_with_path(state.params):
        name = tuple(sharding.path_of(path).split("/"))
        after, later = (_leaf(each.params, name) for each in (frozen, thawed))
        assert np.array_equal(after, before) == (name in last)
        assert np.all(later != after)
        np.testing.assert_allclose(
            _leaf(frozen.teacher, name), 0.9 * _leaf(state.teacher, name) + 0.1 * np.asarray(after), rtol=1e-12
        )
    moments = optax.tree.get(frozen.opt_state, "mu")
    norms = {}
    for group in (("backbone", "mask_token"), ("prototype_head",), ("patch_prototype_head",)):
        norm = optax.tree.norm({key: gradients[key] for key in group})
        factor = min(0.5 / (norm + 1e-6), 1.0)
        norms[group] = factor
        for key in group:
            jax.tree.map(
                lambda m, g: np.testing.assert_allclose(m, 0.1 * factor * g, rtol=1e-9),  # noqa: B023
                moments[key], gradients[key],
            )  # fmt: skip
    assert norms["prototype_head",] == 1.0 and norms["backbone", "mask_token"] != norms["patch_prototype_head",] < 1.0


def _leaf(tree, name):
    for key in name:
        tree = tree[key]
    return np.asarray(tree)


def test_initial_values_and_schedules():
    config = configs.default("dinov2")
    objective = objective_of(small(precision="float32", parameter_precision="float32"))
    params = jax.jit(lambda: objective.init(jax.random.key(0)))()
    assert not np.any(params["mask_token"]) and params["mask_token"].shape == (16,)
    for stack in ("lower", "upper"):
        for leaf in ("layer_scale_1", "layer_scale_2"):
            np.testing.assert_array_equal(params["backbone"][stack][leaf], np.full((2, 16), 1e-5, np.float32))
    assert 0 < np.abs(params["backbone"]["class_token"]).max() < 1e-5
    kernels = [params[head]["hidden_1"]["kernel"] for head in ("prototype_head", "patch_prototype_head")]
    assert np.any(kernels[0] != kernels[1])

    run = schedules.scalars(config, objective.schedules(), steps_per_epoch=10, total_steps=1000)
    assert [run.at(n)["last_layer"] for n in (0, 9, 10, 999)] == [0.0, 0.0, 1.0, 1.0]
    np.testing.assert_allclose([run.at(n)["teacher_temperature"] for n in (0, 299, 999)], [0.04, 0.07, 0.07])
    np.testing.assert_allclose([run.at(n)["learning_rate"] for n in (0, 99, 1000)], [0.0, 4e-3, 1e-6])
    np.testing.assert_allclose([run.at(n)["weight_decay"] for n in (0, 1000)], [0.04, 0.4])
    np.testing.assert_allclose([run.at(n)["one_minus_momentum"] for n in (0, 1000)], [0.008, 0.0], atol=1e-12)


def test_weights_keep_their_features_with_and_without_layer_scale(sinkhorn):
    """As a run of this method starts from one without LayerScale, and the reverse."""
    scaled, image = sinkhorn.objective.encoder, sinkhorn.views["global"][:2]
    plain, without = scaled.clone(layer_scale=0.0), fit.rescaled(sinkhorn.params["backbone"], False)
    again = fit.rescaled(without, True)
    assert "layer_scale_1" not in without["lower"]
    expected, *found = (
        jax.jit(network.apply)({"params": tree}, image)["class_token"]
        for network, tree in ((scaled, sinkhorn.params["backbone"]), (plain, without), (scaled, again))
    )
    for each in found:
        np.testing.assert_allclose(each, expected, rtol=1e-9)
    same = fit.rescaled(sinkhorn.params["backbone"], True)
    jax.tree.map(np.testing.assert_array_equal, same, sinkhorn.params["backbone"])


@pytest.mark.parametrize("changes, sentence", [
    (dict(accumulate=2), "accumulate=2 would compute Sinkhorn-Knopp targets within each microbatch"),
    (dict(accumulate=2, dinov2__targets="centering", dinov2__loss__koleo_group=0),
     "accumulate=2 would change the groups of dinov2.loss.koleo_group=0, which must lie in the 2 images"),
    (dict(crops__global_number=1), "crops.global_number=1 must be 2"),
    (dict(dinov2__targets="center"), "dinov2.targets='center' is invalid; expected one of sinkhorn, centering"),
    (dict(dinov2__mask_group=8), "dinov2.mask_group=8 does not divide the 4 images per device"),
    (dict(dinov2__heads__patch_prototypes=21), "dinov2.heads.patch_prototypes=21 is not divisible by the 2 shards"),
    (dict(dinov2__loss__koleo_group=3), "batch_size=8 is not divisible by dinov2.loss.koleo_group=3"),
])  # fmt: skip
def test_what_it_cannot_do_is_refused(changes, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)):
        configs.check(small(precision="float32", parameter_precision="float32", **changes), 2, 2, 1)
