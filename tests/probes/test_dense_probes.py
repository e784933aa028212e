"""Segmentation and change detection: scores compared with scikit-learn, maps of whole scenes, heads, folds."""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.linear_model
import sklearn.metrics

from pera_jax.common.errors import UserError
from pera_jax.data.labelled import scenes
from pera_jax.models import vit
from pera_jax.probes.dense import change, dense, overlap, pixel_head, pixel_probe, segmentation
from pera_jax.probes.dense.overlap import IGNORE

# ---------------------------------------------------------------- scores of pixels


def masks(kind, rng):
    """(predicted, truth) uint8 [9, 31] with five classes."""
    truth = rng.integers(0, 5, (9, 31))
    predicted = np.where(rng.random(truth.shape) < 0.5, truth, rng.integers(0, 5, truth.shape))
    if kind == "missing":  # 1 in neither, 3 only predicted, 4 only true
        truth, predicted = np.choose(truth, [0, 0, 2, 2, 4]), np.choose(predicted, [0, 0, 2, 3, 3])
    if kind == "one":
        truth, predicted = truth * 0 + 2, predicted * 0 + 2
    if kind == "wrong":
        predicted = (truth + 1) % 5
    return predicted.astype(np.uint8), np.where(rng.random(truth.shape) < 0.3, IGNORE, truth).astype(np.uint8)


@pytest.mark.parametrize("kind", ["random", "missing", "one", "wrong"])
def test_scores_are_those_of_scikit_learn(kind):
    for seed in range(5):
        predicted, truth = masks(kind, np.random.default_rng(seed))
        p, t = predicted[truth != IGNORE], truth[truth != IGNORE]
        matrix = overlap.confusion(predicted, truth, 5)
        np.testing.assert_array_equal(matrix, sklearn.metrics.confusion_matrix(t, p, labels=range(5)))
        present = sorted({*p.tolist(), *t.tolist()})
        for ours, theirs in ((overlap.iou, sklearn.metrics.jaccard_score), (overlap.f1, sklearn.metrics.f1_score)):
            np.testing.assert_allclose(ours(matrix)[present], theirs(t, p, labels=present, average=None), rtol=1e-12)
            assert np.isnan(np.delete(ours(matrix), present)).all()
        mean = {"average": "macro", "labels": present}
        assert overlap.mean_iou(matrix) == pytest.approx(sklearn.metrics.jaccard_score(t, p, **mean), rel=1e-12)
        assert overlap.macro_f1(matrix) == pytest.approx(sklearn.metrics.f1_score(t, p, **mean), rel=1e-12)
        assert overlap.accuracy(matrix) == pytest.approx(sklearn.metrics.accuracy_score(t, p), rel=1e-12)
        units = np.arange(truth.size).reshape(truth.shape) % 4
        parts = overlap.confusions(predicted, truth, units, 4, 5)
        for unit in range(4):
            alone = np.where(units == unit, truth, np.uint8(IGNORE))
            np.testing.assert_array_equal(parts[unit], overlap.confusion(predicted, alone, 5))


@pytest.mark.parametrize("true_share", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("predicted_share", [0.0, 0.3, 1.0])
def test_scores_of_change_are_those_of_scikit_learn(true_share, predicted_share):
    rng = np.random.default_rng(3)
    truth, predicted = rng.random(200) < true_share, rng.random(200) < predicted_share
    matrix = overlap.confusion(predicted.astype(np.uint8), truth.astype(np.uint8), 2)
    nothing = float(not truth.any() and not predicted.any())  # to be found, and found: 1; scikit-learn lets choose
    for name, theirs in (("f1", "f1"), ("iou", "jaccard"), ("precision", "precision"), ("recall", "recall")):
        expected = getattr(sklearn.metrics, f"{theirs}_score")(truth, predicted, zero_division=nothing)
        assert change.SCORES[name](matrix) == pytest.approx(expected, rel=1e-12), name


def test_without_labels_scores_are_not_a_number():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        matrix = overlap.confusion(np.zeros((4, 4), np.uint8), np.full((4, 4), IGNORE, np.uint8), 3)
        assert not matrix.any()
        assert all(np.isnan(statistic(matrix)) for statistic in segmentation.SCORES.values())


def test_the_interval_resamples_units_and_pools_their_pixels():
    rng = np.random.default_rng(0)
    matrices = rng.integers(0, 50, (2, 7, 3, 3))
    matrices[1] = matrices[0].transpose(0, 1, 2)[:, :, ::-1]  # the same truth, other predictions
    matrices[:, 3] = 0  # a unit without labels counts for nothing
    score = overlap.score(matrices, overlap.mean_iou, seed=5, resamples=300)
    with_labels = np.delete(matrices, 3, axis=1)
    assert score.seeds == tuple(overlap.mean_iou(of_seed.sum(axis=0)) for of_seed in matrices)
    assert score.value == pytest.approx(np.mean(score.seeds))
    drawn = np.random.default_rng(5).multinomial(6, np.full(6, 1 / 6), 300)
    values = []
    for counts in drawn:  # each resampled test set, unit by unit
        units = np.repeat(np.arange(6), counts)
        values.append(np.mean([overlap.mean_iou(of_seed[units].sum(axis=0)) for of_seed in with_labels]))
    assert (score.low, score.high) == pytest.approx(tuple(np.quantile(values, [0.025, 0.975])))
    assert score.low < score.value < score.high
    alone = overlap.score(with_labels[:, :1], overlap.mean_iou, seed=5)
    assert (alone.low, alone.high) == (None, None) and len(alone.seeds) == 2
    assert alone.value == pytest.approx(np.mean(overlap.mean_iou(with_labels[:, 0])))


# ---------------------------------------------------------------- tokens of a whole scene


def means(batch):
    """The mean of each 4 px patch: [B, 1, h, w, C]."""
    number, height, width, bands = batch.shape
    return np.float32(batch.reshape(number, height // 4, 4, width // 4, 4, bands).mean(axis=(2, 4)))[:, None]


@pytest.fixture(scope="module")
def network():
    """A ViT of random weights on windows of any size: maps of its last two blocks."""
    model = vit.ViT(width=16, depth=3, heads=2, patch=4, image_size=16, bands=3, split=1)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"]
    apply = jax.jit(lambda images: model.apply({"params": params}, images / 255.0, blocks=2)["blocks"])

    def maps(batch):
        tokens = jnp.stack(apply(batch.astype(np.float32)), axis=1)[:, :, 1:]  # [B, 2, L, D]
        return np.asarray(tokens.reshape(len(batch), 2, batch.shape[1] // 4, batch.shape[2] // 4, 16))

    return maps


def picture(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def test_one_window_is_the_network_itself(network):
    image = picture(24, 24)
    np.testing.assert_array_equal(dense.encode(network, image, 4, 24, 12, windows=1), network(image[None])[0])


def test_tokens_do_not_depend_on_the_batches_of_windows(network):
    image = picture(39, 58)
    maps = [dense.encode(network, image, 4, 16, 8, windows=windows) for windows in (1, 5, 64)]
    assert maps[0].shape == (2, 10, 15, 16) and maps[0].dtype == np.float32
    for other in maps[1:]:
        np.testing.assert_allclose(other, maps[0], rtol=0, atol=1e-5)


def test_a_network_gets_whole_batches_of_windows(monkeypatch):
    """Not fewer than the devices work on anyway, not more than memory allows."""
    for window, devices, sizes in ((8, 1, [256, 256, 113]), (8, 16, [512, 113]), (128, 1, [64, 1]), (256, 1, [32, 1])):
        monkeypatch.setattr(jax, "local_device_count", lambda: devices)  # noqa: B023
        number, seen = sum(sizes), []

        def maps(batch):
            seen.append(len(batch))  # noqa: B023
            return means(batch)

        image = picture(window, number * window)
        np.testing.assert_array_equal(dense.encode(maps, image, 4, window, window)[None], means(image[None]))
        assert seen == sizes


def test_overlapping_tokens_are_averaged(network):
    image = picture(16, 24)
    left, right = (network(image[None, :, start : start + 16])[0] for start in (0, 8))  # [2, 4, 4, 16]
    found = dense.encode(network, image, 4, 16, 12)  # the second window would end beyond the border and is put flush
    np.testing.assert_allclose(found[:, :, :2], left[:, :, :2], atol=1e-5)
    np.testing.assert_allclose(found[:, :, 2:4], (left[:, :, 2:] + right[:, :, :2]) / 2, atol=1e-5)
    np.testing.assert_allclose(found[:, :, 4:], right[:, :, 2:], atol=1e-5)


@pytest.mark.parametrize("size", [(3, 5), (16, 16), (17, 30), (61, 40)])
def test_every_token_is_of_its_patch(size):
    """Of an encoder without context, windows must not matter; beyond the border the scene is mirrored."""
    image = picture(*size)
    height, width = (-(-side // 4) * 4 for side in size)
    mirrored = np.pad(image, ((0, height - size[0]), (0, width - size[1]), (0, 0)), "symmetric")
    for window, stride in ((16, 8), (16, 16), (12, 4)):
        np.testing.assert_allclose(dense.encode(means, image, 4, window, stride), means(mirrored[None])[0], atol=1e-4)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_enlarged_images_are_half_pixel_bilinear(dtype):
    image = (picture(7, 10) / 255.0 * (1.0 if dtype == np.float32 else 200)).astype(dtype)
    found = dense.enlarge(image, 3)
    expected = jax.image.resize(image.astype(np.float32), (21, 30, 3), "bilinear")
    assert found.dtype == dtype
    np.testing.assert_allclose(found, expected, atol=1e-6 if dtype == np.float32 else 0.501)


# ---------------------------------------------------------------- heads


@pytest.mark.parametrize("px", [1, 2, 3, 8])
def test_a_pixel_is_labeled_by_its_bilinear_logits(monkeypatch, px):
    monkeypatch.setattr(pixel_head, "_LOGITS", 5 * px * px * 8)  # in parts of five cells
    monkeypatch.setattr(pixel_head, "_VALUES", 5 * 7)  # and of seven tokens
    rng, (height, width, dims) = np.random.default_rng(px), (4, 6, 5)
    tokens = rng.normal(size=(height, width, dims)).astype(np.float32)
    weights, bias = rng.normal(size=(2, dims, 4)).astype(np.float32), rng.normal(size=(2, 4)).astype(np.float32)
    shape = (height * px - px // 2, width * px - px // 3)
    found = pixel_head.predict(
        tokens.reshape(-1, dims), pixel_head.corners(height, width), weights.transpose(1, 0, 2), bias,
        np.zeros((1, 4), np.float32), px,
    )  # fmt: skip
    for head in range(2):
        logits = jax.image.resize(tokens @ weights[head] + bias[head], (height * px, width * px, 4), "bilinear")
        expected = np.argmax(logits, axis=-1)[: shape[0], : shape[1]]
        np.testing.assert_array_equal(pixel_head.picture(found[:, :, head, 0], shape, width, px), expected)


def test_cells_hold_each_pixel_once():
    mask = np.arange(7 * 11, dtype=np.uint8).reshape(7, 11)
    for px in (1, 2, 3, 4):
        height, width = -(-7 // px), -(-11 // px)
        cut = pixel_head.cells(mask, height, width, px)
        assert len(cut) == len(pixel_head.corners(height, width))
        assert sorted(cut[cut != IGNORE].tolist()) == mask.ravel().tolist()
        np.testing.assert_array_equal(pixel_head.picture(cut, mask.shape, width, px), mask)


def test_equal_logits_give_the_lowest_class():
    tokens, corners = np.ones((6, 3), np.float32), pixel_head.corners(2, 3)
    bias = np.float32([[1.0, 2.0, 2.0, 2.0]])
    found = pixel_head.predict(tokens, corners, np.zeros((3, 1, 4), np.float32), bias, np.zeros((2, 4), np.float32), 2)
    assert np.all(found == 1)


def test_heads_reach_the_loss_of_a_converged_fit():
    """Far enough trained, the head's mean cross-entropy is that of scikit-learn on the same interpolated tokens."""
    rng, (height, width, px) = np.random.default_rng(1), (6, 7, 2)
    tokens = (rng.normal(size=(height * width, 4)) * [1.0, 30.0, 0.1, 1.0] + [0.0, 50.0, 1.0, -1.0]).astype(np.float32)
    pixels = jax.image.resize(tokens.reshape(height, width, 4), (height * px, width * px, 4), "bilinear")
    pixels = np.asarray(pixels, np.float64).reshape(-1, 4)
    standard = (pixels - pixels.mean(axis=0)) / pixels.std(axis=0)
    truth = np.argmax(standard @ rng.normal(size=(4, 3)) + rng.gumbel(size=(len(pixels), 3)), axis=1).astype(np.uint8)
    labels = pixel_head.cells(truth.reshape(height * px, width * px), height, width, px)
    kept = np.array([[True, True], [True, True], [True, False], [True, False]])
    weights, bias = pixel_head.fit(
        tokens, pixel_head.corners(height, width), labels, 3, np.array([0.3, 0.3]), kept, 1500, 224, 0
    )
    for head, dims in ((0, 4), (1, 2)):
        assert not weights[dims:, head].any()
        logits = pixels @ weights[:, head].astype(np.float64) + bias[head]
        reference = sklearn.linear_model.LogisticRegression(C=np.inf, max_iter=1000).fit(standard[:, :dims], truth)
        expected = sklearn.metrics.log_loss(truth, reference.predict_proba(standard[:, :dims]))
        exponents = np.exp(logits - logits.max(axis=1, keepdims=True))
        found = sklearn.metrics.log_loss(truth, exponents / exponents.sum(axis=1, keepdims=True))
        assert found == pytest.approx(expected, abs=1e-4)


def test_heads_depend_on_no_other_token_and_on_no_part(monkeypatch):
    rng, (height, width, px) = np.random.default_rng(2), (9, 8, 2)
    tokens = rng.normal(3.0, 2.0, (height * width, 5)).astype(np.float32)
    labels = pixel_head.cells(rng.integers(0, 3, (18, 16), dtype=np.uint8), height, width, px)
    corners, rest = pixel_head.corners(height, width), (3, np.array([0.1, 0.5]), np.ones((5, 2), bool), 7, 16, 1)
    assert 7 * 16 // px**2 < len(corners)  # not all cells are drawn
    expected = pixel_head.fit(tokens, corners, labels, *rest)
    among = np.full((200, 5), np.nan, np.float32)
    places = rng.permutation(200)[: height * width]
    among[places] = tokens
    monkeypatch.setattr(pixel_head, "_VALUES", 5 * 11)
    for found, wanted in zip(pixel_head.fit(among, places[corners], labels, *rest), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    mean, deviation = pixel_head._statistics(tokens, np.arange(20, 60))
    np.testing.assert_allclose(mean, tokens[20:60].mean(axis=0, dtype=np.float64), rtol=1e-12)
    np.testing.assert_allclose(deviation, tokens[20:60].std(axis=0, dtype=np.float64), rtol=1e-12)


# ---------------------------------------------------------------- what is held out


def test_hold_out_takes_scenes_and_leaves_every_class():
    rng = np.random.default_rng(0)
    masks = [rng.integers(0, 3, (8, 8), dtype=np.uint8) for _ in range(10)]
    masks[4][0, 0] = 3  # the only pixel of its class
    masks[7][:] = IGNORE
    for seed in range(20):
        fitted, held = dense.hold_out(masks, 0.2, 4, seed)
        scenes_held = [index for index, mask in enumerate(held) if np.any(mask != IGNORE)]
        assert len(scenes_held) == 2 and 4 not in scenes_held and 7 not in scenes_held
        for mask, one, other in zip(masks, fitted, held, strict=True):
            np.testing.assert_array_equal(np.minimum(one, other), mask)  # each label in one of the two
            assert np.all((one == IGNORE) | (other == IGNORE))


def test_hold_out_takes_tiles_where_no_scene_can_go():
    mask = np.repeat(np.repeat(np.random.default_rng(0).integers(0, 2, (5, 5), dtype=np.uint8), 8, 0), 8, 1)
    for masks in ([mask], [mask, mask + 2]):  # a single scene; two scenes without a class in common
        fitted, held = dense.hold_out(masks, 0.2, 8, seed=1)
        assert set(np.concatenate(fitted).ravel()) - {IGNORE} == set(np.concatenate(masks).ravel())
        tiles = np.concatenate([part.reshape(5, 8, 5, 8).transpose(0, 2, 1, 3).reshape(25, 64) for part in held])
        assert np.sum(np.all(tiles != IGNORE, axis=1)) == np.sum(np.any(tiles != IGNORE, axis=1)) == 5 * len(masks)
    with pytest.raises(UserError, match="cannot hold out tiles of 64 px .* keeping every class in training"):
        dense.hold_out([mask], 0.2, 64, seed=1)


def test_two_classes_are_held_out():
    """Few scenes, and few tiles, hold the second class: those are looked for, in scenes before tiles."""
    empty, changed = np.zeros((16, 16), np.uint8), np.zeros((16, 16), np.uint8)
    changed[:4, :4] = changed[12:, 12:] = 1
    for changes, whole in ((2, True), (1, False)):  # a single one must not go: it would take the class along
        masks = [changed] * changes + [empty] * (12 - changes)
        for seed in range(20):
            fitted, held = dense.hold_out(masks, 0.1, 8, seed)
            for part in (fitted, held):
                assert set(np.unique(part)) - {IGNORE} == {0, 1}
            parts = [np.all(mask != IGNORE) for mask in held if np.any(mask != IGNORE)]
            assert all(parts) == whole and (len(parts) <= 2 or not whole)
    changed[12:, 12:] = 0
    with pytest.raises(UserError, match="cannot hold out tiles of 8 px .* use a smaller tile"):
        dense.hold_out([changed, empty], 0.2, 8, seed=0)
    _, held = dense.hold_out([changed, empty], 0.2, 2, seed=0)
    assert set(np.unique(held)) == {0, 1, IGNORE}


# ---------------------------------------------------------------- the tasks

QUICK = {"window": 16, "stride": 16, "steps": 40, "batch": 1024, "tile": 16, "learning_rates": (0.1, 0.3),
         "seeds": (0,)}  # fmt: skip
COLORS = np.array([[200, 40, 40], [40, 200, 40], [40, 40, 200]])


def toy_scenes(number, shuffled=False, dates=1):
    """Fields of 8 px of three colors, told apart by the mean of a patch; with `shuffled` masks of other fields."""
    result = []
    for seed in range(number):
        rng = np.random.default_rng(seed)
        fields = [rng.integers(0, 3, (6, 7)) for _ in range(2)]
        images = tuple(
            (COLORS[field.repeat(8, 0).repeat(8, 1)] + rng.integers(-20, 20, (48, 56, 3))).astype(np.uint8)
            for field in fields[:dates]
        )
        truth = fields[0] if dates == 1 else (fields[0] != fields[1])
        if shuffled:
            truth = rng.permutation(truth.ravel()).reshape(truth.shape)
        result.append(scenes.Scene(f"scene{seed}", images, truth.repeat(8, 0).repeat(8, 1).astype(np.uint8)))
    return tuple(result)


def toy(number=3, folds=None, **changes):
    folds = folds or tuple((tuple(i for i in range(number) if i != test), (test,)) for test in range(number))
    names = ("red", "green", "blue") if changes.get("dates", 1) == 1 else scenes.CHANGE_CLASSES
    tokens = lambda image, window, stride: dense.encode(means, image, 4, window, stride)  # noqa: E731
    return scenes.Dense(toy_scenes(number, **changes), folds, names, 4, tokens)


def results(task, data, **changes):
    return dict(task.run(data, task.SETTINGS | QUICK | changes))


def test_segmentation_of_what_tokens_tell_apart():
    data = toy()
    found = results(segmentation, data, seeds=(0, 1))
    score = found["segmentation_miou"]
    assert score.value > 0.9 and score.low <= score.value <= score.high and len(score.seeds) == 2
    assert found["segmentation_miou_seen"] == score  # every scene holds every class
    assert found["segmentation_accuracy"].value > 0.95 and found["segmentation_macro_f1"].value > 0.95
    assert set(found["per_class"]) == {"red", "green", "blue"}
    pictures = [found[f"prediction/{scene.key}"] for scene in data.scenes]
    assert all(picture.dtype == np.uint8 and picture.shape == (48, 56) for picture in pictures)
    pooled = sum(overlap.confusion(p, scene.mask, 3) for p, scene in zip(pictures, data.scenes, strict=True))
    assert found["confusion"] == pooled.tolist()  # all folds, first seed
    assert score.seeds[0] == overlap.mean_iou(pooled)
    assert results(segmentation, data, seeds=(0, 1))["segmentation_miou"] == score


def test_segmentation_of_shuffled_labels_fails():
    assert results(segmentation, toy(shuffled=True))["segmentation_miou"].value < 0.35


def test_enlarged_scenes_are_labeled_at_their_own_size():
    found = results(segmentation, toy(), scale=2)
    assert found["prediction/scene0"].shape == (48, 56) and found["segmentation_miou"].value > 0.95


def test_classes_that_training_lacks_count_but_for_seen():
    data = toy(folds=(((0,), (1,)),), number=2)
    data.scenes[0].mask[data.scenes[0].mask == 2] = IGNORE
    found = results(segmentation, data)
    assert found["per_class"]["blue"] == 0.0 and np.asarray(found["confusion"])[:, 2].sum() == 0
    assert found["segmentation_miou"].value < 0.7 and found["segmentation_miou_seen"].value > 0.9


def test_change_where_tokens_differ():
    halves = (((0, 1, 2), (3, 4, 5)), ((3, 4, 5), (0, 1, 2)))
    found = results(change, toy(number=6, folds=halves, dates=2))
    assert found["change_f1"].value > 0.9 and found["change_iou"].value > 0.85
    assert set(found["prediction/scene0"].ravel()) == {0, 1}
    shuffled = results(change, toy(number=6, folds=halves, dates=2, shuffled=True))
    assert shuffled["change_f1"].value < 0.85  # 2/3 of all pixels are changed: calling all so gives 0.8


def test_a_test_without_change_breaks_nothing():
    data = toy(number=4, dates=2, folds=(((0, 1, 2), (3,)),))
    data.scenes[3].mask[:] = 0
    still = scenes.Scene("scene3", data.scenes[3].images[:1] * 2, data.scenes[3].mask)
    data = scenes.Dense(data.scenes[:3] + (still,), data.folds, data.class_names, 4, data.tokens)
    found = results(change, data)
    assert found["change_f1"].value == found["change_iou"].value == found["change_precision"].value == 1.0
    assert (found["change_f1"].low, found["change_f1"].high) == (None, None)  # of one unit nothing can be resampled
    assert found["per_class"]["changed"] is None


def test_a_test_scene_has_no_part_in_its_own_fold():
    """What is predicted for a scene does not change with that scene's labels."""
    data, other = toy(), toy()
    other.scenes[1].mask[:] = 2 - other.scenes[1].mask
    first, second = (results(segmentation, part) for part in (data, other))
    np.testing.assert_array_equal(first["prediction/scene1"], second["prediction/scene1"])
    assert np.any(first["prediction/scene0"] != second["prediction/scene0"])  # for which scene1 was trained on


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"window": 18}, "window=18 px is not a multiple of the patch size 4 px; try window=16"),
        ({"stride": 0}, "stride=0 px is not a multiple of the patch size 4 px; try stride=4"),
        ({"stride": 20}, "stride=20 px exceeds window=16 px and leaves gaps; choose stride <= window"),
        ({"scale": 3}, "scale=3 does not divide the patch size 4 px; choose a divisor"),
        ({"scale": 0}, "invalid scale=0; expected an integer >= 1"),
        ({"steps": 0}, "invalid steps=0; expected an integer >= 1"),
        ({"batch": -5}, "invalid batch=-5; expected an integer >= 1"),
        ({"tile": 0}, "invalid tile=0; expected an integer >= 1"),
        ({"blocks": ()}, "invalid blocks=(); expected at least one number, each >= 1"),
        ({"blocks": (0, 1)}, "invalid blocks=(0, 1); expected at least one number, each >= 1"),
        ({"learning_rates": ()}, "invalid learning_rates=(); expected at least one number, each > 0"),
        ({"learning_rates": (0.1, 0.0)},
         "invalid learning_rates=(0.1, 0.0); expected at least one number, each > 0"),
        ({"priors": ()}, "invalid priors=(); expected at least one number, each >= 0"),
        ({"priors": (float("nan"),)}, "invalid priors=(nan,); expected at least one number, each >= 0"),
        ({"held_out": 1.0}, "invalid held_out=1.0; expected a fraction of the images between 0 and 1, such as 0.2"),
        ({"held_out": 0.0}, "invalid held_out=0.0; expected a fraction of the images between 0 and 1, such as 0.2"),
        ({"seeds": ()}, "invalid seeds=(); expected at least one integer >= 0"),
        ({"seeds": (0, -1)}, "invalid seeds=(0, -1); expected at least one integer >= 0"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("task, dates", [(segmentation, 1), (change, 2)])
def test_settings_that_cannot_be(task, dates, changes, sentence):
    def tokens(*_):
        raise AssertionError("settings are checked before anything is encoded")

    with pytest.raises(UserError) as error:
        results(task, dataclasses.replace(toy(dates=dates), tokens=tokens), **changes)
    assert str(error.value) == sentence


def test_tokens_that_are_too_many_are_an_error(monkeypatch):
    """Those of training scenes count: 2 of 12 x 14 tokens of 3 values; others are not kept."""
    data = toy(folds=(((0, 1), (2,)),))
    found = results(segmentation, data)
    monkeypatch.setattr(pixel_probe, "MAX_BYTES", 2 * 12 * 14 * 3 * 4)
    assert results(segmentation, data)["segmentation_miou"] == found["segmentation_miou"]
    monkeypatch.setattr(pixel_probe, "MAX_BYTES", 2 * 12 * 14 * 3 * 4 - 1)
    with pytest.raises(
        UserError, match="336 tokens of 1 blocks with 3 values each.* use fewer blocks, a smaller scale"
    ):
        results(segmentation, data)


def test_a_test_without_labels_is_an_error():
    data = toy(folds=(((0, 1), (2,)),))
    for mask in (scene.mask for scene in data.scenes[:2]):
        mask[mask == 2] = IGNORE
    data.scenes[2].mask[data.scenes[2].mask < 2] = IGNORE  # only a class that is not trained on is left
    with pytest.raises(UserError, match="no labeled pixel of the test scenes has a class"):
        results(segmentation, data)


def test_tokens_that_are_not_finite_are_an_error():
    with pytest.raises(UserError, match="tokens of the encoder contain NaN"):
        dense.encode(lambda batch: means(batch) * np.float32(np.nan), picture(16, 16), 4, 16, 16)
