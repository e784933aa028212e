"""Scores and splits on arrays, compared with scikit-learn and their definitions."""

import functools

import numpy as np
import pytest
from sklearn import metrics

from pera_jax.common.errors import UserError
from pera_jax.probes import scores, splits

# ---------------------------------------------------------------- one label for an image


def guesses(seed):
    """Predicted and true classes of every kind: random, few classes in many, one class only, all right, one image."""
    rng = np.random.default_rng(seed)
    classes, number = int(rng.integers(2, 12)), int(rng.integers(1, 80))
    used = rng.choice(classes, int(rng.integers(1, classes + 1)), replace=False)
    labels, predicted = rng.choice(used, number), rng.integers(0, classes, number)
    return (labels if seed % 5 == 0 else predicted), labels, classes


@pytest.mark.parametrize("seed", range(30))
def test_scores_of_one_label_are_those_of_scikit_learn(seed):
    predicted, labels, classes = guesses(seed)
    everything = np.arange(classes)
    assert scores.accuracy(predicted, labels) == pytest.approx(metrics.accuracy_score(labels, predicted))
    expected = metrics.confusion_matrix(labels, predicted, labels=everything)
    np.testing.assert_array_equal(scores.confusion(predicted, labels, classes), expected)
    # Without `labels` scikit-learn too counts the classes that either array holds.
    expected = metrics.f1_score(labels, predicted, average="macro", zero_division=0)
    assert scores.macro_f1(predicted, labels, classes) == pytest.approx(expected)
    expected = metrics.f1_score(labels, predicted, labels=everything, average=None, zero_division=np.nan)
    np.testing.assert_allclose(scores.f1_by_class(predicted, labels, classes), expected)
    expected = metrics.recall_score(labels, predicted, labels=everything, average=None, zero_division=np.nan)
    np.testing.assert_allclose(scores.accuracy_by_class(predicted, labels, classes), expected)


def test_f1_and_class_accuracy_with_absent_classes():
    labels, predicted = np.array([0, 0, 0, 1, 1, 3]), np.array([0, 0, 1, 1, 3, 2])
    # class 0: 2 right of 2 predicted, 3 true; 1: 1 of 2, 2; 2: 0 of 1, 0; 3: 0 of 1, 1; 4: in neither
    assert scores.macro_f1(predicted, labels, 5) == pytest.approx((4 / 5 + 2 / 4 + 0 + 0) / 4)
    np.testing.assert_allclose(scores.accuracy_by_class(predicted, labels, 5), [2 / 3, 1 / 2, np.nan, 0.0, np.nan])


# ---------------------------------------------------------------- several labels for an image


def rankings(seed):
    """Scores and truth with ties of every kind, classes without positives, classes of positives only."""
    rng = np.random.default_rng(seed)
    number, classes = int(rng.integers(2, 60)), int(rng.integers(2, 9))
    truth = rng.random((number, classes)) < rng.choice([0.05, 0.5, 0.95])
    truth[0, 0] = True  # at least one
    kind = seed % 4
    if kind == 0:
        return rng.normal(size=truth.shape) + truth, truth
    if kind == 1:
        return rng.integers(0, 3, truth.shape).astype(np.float32), truth
    if kind == 2:
        return np.zeros(truth.shape), truth
    return np.where(rng.random(truth.shape) < 0.3, -np.inf, rng.integers(-2, 2, truth.shape)), truth


@pytest.mark.parametrize("seed", range(40))
def test_average_precision_is_that_of_scikit_learn(seed):
    found, truth = rankings(seed)
    finite = np.maximum(found, -1e9)  # scikit-learn takes no infinities
    expected = metrics.average_precision_score(truth, finite, average="micro")
    assert scores.map_micro(found, truth) == pytest.approx(expected, abs=1e-12)
    present = truth.any(axis=0)
    expected = metrics.average_precision_score(truth[:, present], finite[:, present], average=None)
    for c, value in zip(np.flatnonzero(present), np.atleast_1d(expected), strict=True):
        assert scores.average_precision(found[:, c], truth[:, c]) == pytest.approx(value, abs=1e-12)
    assert scores.map_macro(found, truth) == pytest.approx(np.mean(expected), abs=1e-12)
    assert all(np.isnan(scores.average_precision(found[:, c], truth[:, c])) for c in np.flatnonzero(~present))


# ---------------------------------------------------------------- resamples and intervals


@pytest.mark.parametrize("seed", range(8))
def test_counts_are_copies_of_images(seed):
    """A score with counts is the score of the images written out as often as they count."""
    rng = np.random.default_rng(seed)
    predicted, labels, classes = guesses(seed)
    found, truth = rankings(seed)
    for score, output, target in (
        (scores.accuracy, predicted, labels),
        (functools.partial(_macro_f1, classes=classes), predicted, labels),
        (scores.map_micro, found, truth),
        (scores.map_macro, found, truth),
    ):
        number = len(target)
        drawn = rng.integers(0, number, (70, number))  # more than are computed at once
        counts = np.stack([np.bincount(row, minlength=number) for row in drawn]).astype(float)
        expected = [score(output[row], target[row]) for row in drawn]
        np.testing.assert_allclose(score(output, target, counts), expected, atol=1e-12)


def _macro_f1(predicted, labels, counts=None, *, classes):
    return scores.macro_f1(predicted, labels, classes, counts)


def interval_of_mean(values, seed):
    return scores.interval(lambda counts: counts @ values / len(values), len(values), seed)


def test_bootstrap_interval_covers():
    rng, truth, covered = np.random.default_rng(7), 0.7, 0
    for trial in range(200):
        low, high = interval_of_mean(rng.random(150) < truth, seed=trial)
        covered += low <= truth <= high
        width = 2 * 1.96 * np.sqrt(truth * (1 - truth) / 150)
        assert 0.7 * width < high - low < 1.3 * width
    assert 0.90 <= covered / 200 <= 0.985  # 95 % wanted; the percentile interval is a little narrow at n = 150


def test_interval_does_not_depend_on_how_many_resamples_are_held(monkeypatch):
    values = np.random.default_rng(0).random(41)
    expected = interval_of_mean(values, seed=5)
    monkeypatch.setattr(scores, "_COUNTS", 41 * 7)
    assert interval_of_mean(values, seed=5) == expected


def test_a_score_over_seeds_is_the_mean_and_its_interval_narrower_than_that_of_one_seed():
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 4, 400)
    predictions = [np.where(rng.random(400) < 0.6, labels, rng.integers(0, 4, 400)) for _ in range(3)]
    found = scores.over_seeds(scores.accuracy, predictions, labels, seed=0)
    assert found.seeds == tuple(np.mean(predicted == labels) for predicted in predictions)
    assert found.value == pytest.approx(np.mean(found.seeds))
    right = np.mean([predicted == labels for predicted in predictions], axis=0)
    assert (found.low, found.high) == pytest.approx(interval_of_mean(right, seed=0))
    single = scores.over_seeds(scores.accuracy, predictions[:1], labels, seed=0)
    assert single.seeds == () and single.value == found.seeds[0]
    assert single.high - single.low > found.high - found.low  # the three err on different images


# ---------------------------------------------------------------- splits


def test_hold_out_keeps_the_classes_and_repeats():
    labels = np.repeat([0, 1, 2, 4], [50, 10, 2, 1])
    fit, held = splits.hold_out(labels, 0.2, seed=3)
    assert sorted([*fit, *held]) == list(range(63))
    assert np.bincount(labels[held], minlength=5).tolist() == [10, 2, 1, 0, 0]
    np.testing.assert_array_equal(held, splits.hold_out(labels, 0.2, seed=3)[1])
    assert held.tolist() != splits.hold_out(labels, 0.2, seed=4)[1].tolist()
    with pytest.raises(UserError, match="held out"):
        splits.hold_out(np.arange(4), 0.2, seed=0)


@pytest.mark.parametrize("seed", range(10))
def test_hold_out_of_several_labels_keeps_rare_ones_in_both_parts(seed):
    rng = np.random.default_rng(seed)
    labels = rng.random((200, 6)) < [0.9, 0.5, 0.2, 0.1, 0.03, 0.0]
    labels[:2, 4] = True
    fit, held = splits.hold_out(labels, 0.2, seed)
    assert sorted([*fit, *held]) == list(range(200)) and 30 <= len(held) <= 50
    assert labels[fit, 4].any() and labels[held, 4].any()


def test_hold_out_of_several_labels_holds_out_labels_or_ends():
    """No score is defined on images that carry no label at all."""
    labels = np.zeros((40, 4), bool)
    labels[[3, 8, 9], [0, 1, 2]] = labels[8, 0] = True  # each the only image of its rarest label
    with pytest.raises(UserError, match="no image with a label can be held out"):
        splits.hold_out(labels, 0.2, seed=0)
    labels[20, 2] = True
    for seed in range(10):
        fit, held = splits.hold_out(labels, 0.2, seed)
        assert labels[fit].any() and labels[held].any()


def test_shares_are_named_in_percent():
    assert [splits.split_name(share) for share in (0.1, 0.2, 0.28, 0.5, 0.005)] == [
        "10/90", "20/80", "28/72", "50/50", "0.5/99.5",
    ]  # fmt: skip
