"""MAE: the forward pass and the loss as plain loops, masks, initial values, recipe, other bands, the picture."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_states
from scipy import special, stats

from pera_jax import config as configs
from pera_jax import objectives
from pera_jax.bands import Bands
from pera_jax.common.errors import UserError
from pera_jax.formats import tables
from pera_jax.losses import pixels
from pera_jax.objectives.base import Streams
from pera_jax.parallel import sharding
from pera_jax.training import alarms
from pera_jax.training import optimizer as optimizers
from pera_jax.training import step as steps

PATCH, SIDE, BANDS = 4, 3, ("red", "infrared")
KEPT = 2  # floor(9 / 4)


def config(**changes):
    """9 patches of two bands; encoder and decoder differ in width, depth and heads."""
    result = configs.default("mae")
    result.precision = result.parameter_precision = "float64"
    result.crops.global_size = SIDE * PATCH
    result.model.update(dict(width=8, depth=3, heads=2, patch=PATCH, remat="none"))
    result.mae.decoder.update(dict(width=12, depth=2, heads=3))
    result.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
    return result


def objective(**changes):
    settings = config(**changes)
    bands = dataclasses.replace(Bands.plain(BANDS), mean=(0.4, 0.5), std=(0.2, 0.3))
    return objectives.from_config(settings, bands)


@pytest.fixture(autouse=True)
def in_float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def params():
    """Random numbers, so that biases and gains count too."""
    with jax.enable_x64(True):
        mae = objective()
        return jax.device_get(toy_states.random_state(mae, steps.make_optimizer(mae, config().optimizer)).params)


@pytest.fixture(scope="module")
def examples():
    """Four crops of noise with a slope, and a permutation of the patches of each."""
    rng, side = np.random.default_rng(3), SIDE * PATCH
    images = rng.integers(0, 120, (4, 1, side, side, 2)) + 10 * np.arange(side)[:, None]
    return {
        "images": images.astype(np.uint8),
        "order": np.stack([rng.permutation(SIDE**2) for _ in range(4)])[:, None].astype(np.int32),
    }


@pytest.fixture(scope="module")
def run():
    mae = objective()
    return jax.jit(lambda params, examples: mae.outputs_on_views(params, *mae.views(examples)))


# ---------------------------------------------------------------- a network of loops


def position(index, width):
    """[sin column, cos column, sin row, cos row]"""
    row, column = divmod(index, SIDE)
    angles = [10000 ** (-i / (width / 4)) for i in range(width // 4)]
    return np.array([f(place * angle) for place in (column, row) for f in (math.sin, math.cos) for angle in angles])


def norm(x, p):
    centered = x - x.mean(axis=-1, keepdims=True)
    return centered / np.sqrt(np.mean(centered**2, axis=-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]


def linear(x, p):
    return x @ p["kernel"] + p["bias"]


def block(x, p):
    attention, y = p["attention"], norm(x, p["norm_1"])
    width, _, heads, size = attention["qkv"]["kernel"].shape
    mixed = np.zeros((len(x), heads, size))
    for head in range(heads):
        q, k, v = (y @ attention["qkv"]["kernel"][:, i, head] + attention["qkv"]["bias"][i, head] for i in range(3))
        scores = np.exp(q @ k.T / np.sqrt(size))
        mixed[:, head] = (scores / scores.sum(axis=1, keepdims=True)) @ v
    kernel = attention["projection"]["kernel"].reshape(width, width)
    x = x + mixed.reshape(len(x), width) @ kernel + attention["projection"]["bias"]
    hidden = linear(norm(x, p["norm_2"]), p["mlp"]["in"])
    return x + linear(hidden * 0.5 * (1 + special.erf(hidden / np.sqrt(2))), p["mlp"]["out"])


def stacked(x, stack):
    for index in range(len(stack["norm_1"]["scale"])):
        x = block(x, jax.tree.map(lambda leaf: leaf[index], stack))  # noqa: B023
    return x


def patch_of(image, index):
    row, column = divmod(index, SIDE)
    return image[row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH].reshape(-1)


def predicted_by_loops(params, image, kept):
    """Prediction of all patches [L, p p C] of a normalized image, in raster order, from the patches `kept`."""
    encoder, decoder = params["backbone"], params["decoder"]
    width, kept = len(encoder["class_token"]), sorted(kept)
    tokens = [linear(patch_of(image, j), encoder["patch_projection"]) + position(j, width) for j in kept]
    x = np.stack([encoder["class_token"], *tokens])
    x = norm(stacked(stacked(x, encoder["lower"]), encoder["upper"]), encoder["norm"])
    x = linear(x, decoder["embedding"])
    places = dict(zip(kept, x[1:], strict=True))
    width = len(decoder["mask_token"])
    whole = [places.get(j, decoder["mask_token"]) + position(j, width) for j in range(SIDE**2)]
    x = norm(stacked(np.stack([x[0], *whole]), decoder["blocks"]), decoder["norm"])
    return linear(x, decoder["prediction"])[1:]


def loss_by_loops(params, examples, normalize):
    total = squares = 0.0
    for image, order in zip(examples["images"][:, 0], examples["order"][:, 0], strict=True):
        image = (image / 255 - np.array([0.4, 0.5])) / np.array([0.2, 0.3])
        predicted = predicted_by_loops(params, image, order[:KEPT])
        removed = order[KEPT:]
        for j in removed:
            target = patch_of(image, j)
            if normalize:
                mean = sum(target) / len(target)
                variance = sum((target - mean) ** 2) / (len(target) - 1)
                target = (target - mean) / math.sqrt(variance + 1e-6)
            total += np.mean((predicted[j] - target) ** 2) / len(removed) / len(examples["images"])
            squares += np.mean(target**2) / len(removed) / len(examples["images"])
    return total, 1 - total / squares


@pytest.mark.parametrize("normalize", [True, False])
def test_the_loss_is_that_of_loops(normalize, params, examples):
    mae = objective(mae__norm_targets=normalize)
    loss, aux = jax.jit(mae.loss)(params, {}, {}, examples, None)
    state, metrics = mae.update({}, aux)
    expected, explained = loss_by_loops(params, examples, normalize)
    np.testing.assert_allclose(loss, expected, rtol=1e-9)
    np.testing.assert_allclose(metrics["explained"], explained, rtol=1e-7)
    assert state == {} and metrics["loss"] == loss


def test_removed_patches_do_not_reach_the_encoder(params, examples, run):
    before = run(params, examples)
    changed = {"removed": examples["images"].copy(), "kept": examples["images"].copy()}
    noise = np.random.default_rng(1).integers(1, 256, (PATCH, PATCH, 2)).astype(np.uint8)
    for b, order in enumerate(examples["order"][:, 0]):
        for name, part in (("kept", order[:KEPT]), ("removed", order[KEPT:])):
            for j in part:
                row, column = PATCH * (j // SIDE), PATCH * (j % SIDE)
                changed[name][b, 0, row : row + PATCH, column : column + PATCH] ^= noise
    hidden = run(params, examples | {"images": changed["removed"]})
    np.testing.assert_array_equal(before[0], hidden[0])  # the predictions, bit for bit
    assert not np.any(np.all(np.equal(before[1], hidden[1]), axis=-1))  # every target
    seen = run(params, examples | {"images": changed["kept"]})
    np.testing.assert_array_equal(before[1], seen[1])
    assert np.all(np.any(before[0] != seen[0], axis=(1, 2)))


def test_the_deviation_of_a_patch_divides_by_one_less():
    values = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 5)))
    mean, deviation = pixels.patch_statistics(values)
    np.testing.assert_allclose(mean[..., 0], values.mean(axis=2))
    np.testing.assert_allclose(deviation[..., 0] ** 2, values.var(axis=2) * 5 / 4 + 1e-6, rtol=1e-12)
    np.testing.assert_allclose(pixels.patch_statistics(jnp.ones((1, 1, 4)))[1], 1e-3)  # a patch of one color


# ---------------------------------------------------------------- masks


@pytest.mark.parametrize("removed, side, kept", [(0.75, 3, 2), (0.75, 4, 4), (0.6, 3, 3), (0.9, 5, 2), (0.5, 5, 12)])
def test_the_number_of_kept_patches_is_rounded_down(removed, side, kept):
    assert objective(mae__removed=removed, crops__global_size=side * PATCH).kept == kept


def test_masks_are_uniform_and_independent():
    mae, images = objective(crops__global_number=2), 3000
    batch = {"global": np.zeros((images, 2, 1, 1, 2), np.uint8)}
    order = np.asarray(mae.prepare(Streams.at(0, "step", 0), batch)["order"])  # [B, V, L]
    np.testing.assert_array_equal(np.sort(order), np.broadcast_to(np.arange(9), order.shape))
    other = np.asarray(mae.prepare(Streams.at(0, "step", 1), batch)["order"])
    again = np.asarray(mae.prepare(Streams.at(0, "step", 0), batch)["order"])
    np.testing.assert_array_equal(order, again)
    member = np.zeros((2, 2 * images, 9))
    for place, drawn in zip(member, (order, other), strict=True):
        np.put_along_axis(place, drawn.reshape(-1, 9)[:, :KEPT], 1, axis=1)
    share, pair, number = KEPT / 9, KEPT * (KEPT - 1) / (9 * 8), 2 * images
    together = member[0].T @ member[0] / number
    assert np.abs(np.diag(together) - share).max() < 5 * np.sqrt(share * (1 - share) / number)
    assert np.abs(together[~np.eye(9, dtype=bool)] - pair).max() < 5 * np.sqrt(pair * (1 - pair) / number)
    # The overlap of crops of one image, of neighboring images and of two steps is hypergeometric.
    variance = KEPT * share * (1 - share) * (9 - KEPT) / 8
    for one, other in ((member[0, ::2], member[0, 1::2]), (member[0, 1:-1:2], member[0, 2::2]), member):
        overlap = np.sum(one * other, axis=1)
        assert abs(overlap.mean() - KEPT * share) < 5 * np.sqrt(variance / len(overlap))


# ---------------------------------------------------------------- initial values, recipe


def uniform(fan_in, fan_out):
    return "uniform", (6 / (fan_in + fan_out)) ** 0.5


def initial(width, pixels, decoder):
    """What each parameter starts as: constants, or a distribution and its scale, by path."""
    found = {
        r"backbone/(class_token)": ("norm", 0.02), r"decoder/mask_token": ("norm", 0.02),
        r"backbone/patch_projection/kernel": uniform(pixels, width),
        r"backbone/patch_projection/bias": ("uniform", pixels**-0.5),
        r"decoder/embedding/kernel": uniform(width, decoder),
        r"decoder/prediction/kernel": uniform(decoder, pixels),
        r"decoder/(embedding|prediction)/bias": 0.0,
    }  # fmt: skip
    for stack, size in ((r"backbone/(lower|upper)/", width), ("decoder/blocks/", decoder)):
        found |= {
            stack + "attention/qkv/kernel": uniform(size, 3 * size),
            stack + "attention/projection/kernel": uniform(size, size),
            stack + "mlp/(in|out)/kernel": uniform(size, 4 * size),
            stack + r"((attention/(qkv|projection)|mlp/(in|out)|norm_\d)/bias)": 0.0,
            stack + r"norm_\d/scale": 1.0,
        }
    return found | {"(backbone|decoder)/norm/scale": 1.0, "(backbone|decoder)/norm/bias": 0.0}


def named(tree):
    return {sharding.path_of(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def test_every_parameter_starts_as_specified():
    settings = dict(model__width=48, model__heads=4, mae__decoder__width=32, mae__decoder__heads=2)
    born = named(jax.jit(objective(**settings).init)(jax.random.key(3)))
    expected = initial(48, PATCH**2 * 2, 32)
    for name, values in born.items():
        (start,) = [start for pattern, start in expected.items() if re.fullmatch(pattern, name)]
        if isinstance(start, float):
            np.testing.assert_array_equal(values, start, err_msg=name)
            continue
        shape, scale = start
        law = stats.norm() if shape == "norm" else stats.uniform(-1, 2)
        for part in values if re.search("lower|upper|blocks", name) else [values]:
            drawn = np.asarray(part).ravel() / scale
            assert stats.kstest(drawn, law.cdf).pvalue > 1e-3, name
            assert shape == "norm" or 1 - 12 / len(drawn) < np.abs(drawn).max() <= 1, name
    assert all(any(re.fullmatch(pattern, name) for name in born) for pattern in expected)
    kernels = [leaf.ravel()[:500] for name, leaf in born.items() if re.search("kernel", name)]
    assert len({part.tobytes() for part in map(np.asarray, kernels)}) == len(kernels)


def test_the_recipe_is_the_published_one(params):
    recipe = configs.default("mae")
    assert recipe.schedules.learning_rate.peak == 1.5e-4 * recipe.batch_size / 256
    assert (recipe.optimizer.beta1, recipe.optimizer.beta2, recipe.optimizer.clip) == (0.9, 0.95, "none")
    found = named(optimizers.decayed(params, recipe.optimizer.decay, steps.decay_rules(objective())))
    assert {name for name, on in found.items() if not on} == {
        name for name in found if re.search(r"bias$|norm(_\d)?/scale$", name)
    }
    assert found["decoder/mask_token"] == found["backbone/class_token"] == 1.0


@pytest.mark.parametrize("field, value, sentence", [
    ("crops.local_number", 2, "crops.local_number=2 must be 0"),
    ("drop_path.rate", 0.1, "drop_path.rate=0.1 must be 0"),
    ("mae.removed", 1.0, r"mae.removed=1.0 must be in \(0, 1\)"),
    ("mae.decoder.width", 510, "mae.decoder.width=510 is not a multiple of mae.decoder.heads=16 and of 4"),
    ("mae.decoder.depth", 0, "mae.decoder.depth=0 must be"),
])  # fmt: skip
def test_what_it_cannot_do_is_refused(field, value, sentence):
    settings = configs.default("mae")
    settings.update_from_flattened_dict({field: value})
    with pytest.raises(UserError, match=sentence):
        configs.check(settings, 1, 1, 1)


def test_a_mask_that_leaves_no_patch_is_refused():
    with pytest.raises(UserError, match="mae.removed=0.9 keeps 0 of 9 patches"):
        objective(mae__removed=0.9)


# ---------------------------------------------------------------- weights, alarms and the picture


def test_the_names_of_the_official_program(params):
    mae = objective()
    entries = mae.official.entries(mae)
    found = tables.to_named({"params": params}, entries, 2, PATCH)
    assert len(found) == 12 * (3 + 2) + 5 + 1 + 6  # blocks, ends of the encoder, mask token, ends of the decoder
    assert found["decoder_blocks.1.attn.qkv.weight"].shape == (36, 12) and found["mask_token"].shape == (1, 1, 12)
    # Query, key, value; heads; the width of a head.
    rows = params["decoder"]["blocks"]["attention"]["qkv"]["kernel"][1]  # [E, 3, heads, E / heads]
    np.testing.assert_array_equal(found["decoder_blocks.1.attn.qkv.weight"][12 + 4 + 1], rows[:, 1, 1, 1])
    back = tables.from_named(found, entries, 2, PATCH)["params"]
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_the_prediction_is_adapted_to_other_bands(params, examples, run):
    mae = objective()
    adapted = mae.adapt(params, params, PATCH, BANDS, BANDS[::-1])
    ours, other = run(params, examples)[0], run(adapted, examples)[0]
    split = lambda x: np.asarray(x).reshape(*x.shape[:2], PATCH**2, 2)  # noqa: E731
    np.testing.assert_allclose(split(other), split(ours)[..., ::-1], rtol=1e-12)
    assert mae.adapt(params, None, PATCH, BANDS, BANDS) is params
    new = {"decoder": {"prediction": "new"}}
    three = mae.adapt(params, new, PATCH, BANDS, ("red", "green", "blue"))
    assert three["decoder"]["prediction"] == "new" and three["decoder"]["blocks"] is params["decoder"]["blocks"]


def test_the_picture_shows_what_was_seen_and_what_was_predicted(params, examples):
    mae, rngs = objective(), Streams.at(0, "step", 0)
    batch = {"global": examples["images"]}
    shown = mae.preview({"student": params}, batch, rngs, (0, 1, 1))
    crop, seen, predicted, both = (np.asarray(column) for column in shown.columns.values())
    np.testing.assert_array_equal(crop, examples["images"][:, 0][..., [0, 1, 1]])
    order = np.asarray(mae.prepare(rngs, batch)["order"])[:, 0]
    for image in range(4):
        normalized = (examples["images"][image, 0] / 255 - [0.4, 0.5]) / [0.2, 0.3]
        expected = predicted_by_loops(params, normalized, order[image, :KEPT])
        for j in range(SIDE**2):
            column = [patch_of(each[image], j) for each in (crop, seen, predicted, both)]
            if j in order[image, :KEPT]:
                for other in (column[1], column[3]):
                    np.testing.assert_array_equal(other, column[0])
                assert set(column[2]) == {225}
                continue
            assert set(column[1]) == {225}
            target = patch_of(normalized, j)
            values = (expected[j] * math.sqrt(target.var(ddof=1) + 1e-6) + target.mean()).reshape(-1, 2)
            values = np.clip(values * [0.2, 0.3] + [0.4, 0.5], 0, 1)[:, [0, 1, 1]].reshape(-1)
            np.testing.assert_allclose(column[3], 255 * values, atol=0.5001)
            np.testing.assert_array_equal(column[2], column[3])
    assert re.search(r"explains -?\d+% of the variance of the pixels within removed patches", shown.caption)


def test_an_alarm_when_nothing_is_predicted():
    watch = alarms.Alarms(objective().health_checks(16), 1e-3)
    line = {"loss": 0.995, "explained": 0.005, "norm/update": 1e-4, "norm/parameters": 1.0}
    begun = [alarm for _ in range(100) for alarm in watch.update(line, 1e-3)]
    assert [alarm.name for alarm in begun] == ["nothing is predicted"] and "only 0.5% of" in begun[0].text
