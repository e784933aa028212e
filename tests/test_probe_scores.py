"""Nearest neighbours, linear classifiers and scores on arrays, against their definitions."""

import numpy as np
import pytest
import scipy.optimize
import scipy.special

from pera_jax.errors import UserError
from pera_jax.probes import colour, knn, linear, scores

# ---------------------------------------------------------------- nearest neighbours


def naive_knn(train, labels, queries, classes, k, temperature):
    """The definition as loops in float64: sort by (similarity, index), add the votes, take the first largest."""
    predictions = []
    for query in queries.astype(float):
        similarity = []
        for index, row in enumerate(train.astype(float)):
            length = np.linalg.norm(row) * np.linalg.norm(query)
            similarity.append((-(row @ query / length if length else 0.0), index))
        votes = np.zeros(classes)
        for negative, index in sorted(similarity)[:k]:
            votes[labels[index]] += np.exp(-negative / temperature)
        predictions.append(int(np.argmax(votes)))
    return predictions


@pytest.mark.parametrize("kind", ["random", "tied", "one_class"])
def test_knn_is_its_definition(monkeypatch, kind):
    monkeypatch.setattr(knn, "_SIMILARITIES", 1000)  # 120 training rows: chunks of 8 queries, the last one padded
    rng = np.random.default_rng(1)
    if kind == "tied":  # entries of +-1 in 4 dimensions: 16 points, lengths and similarities exact, ties everywhere
        train, queries = (rng.choice([-1.0, 1.0], (n, 4)) for n in (120, 30))
        train[7] = queries[3] = 0.0
    else:
        train, queries = rng.normal(size=(120, 8)), rng.normal(size=(30, 8))
    labels = np.zeros(120, int) if kind == "one_class" else rng.integers(0, 5, 120)
    predicted = knn.predict(train, labels, queries, 6, ks=(1, 10, 20, 120, 200))
    assert sorted(predicted) == [1, 10, 20, 120]  # 200 is more than there are
    for k, values in predicted.items():
        assert values.tolist() == naive_knn(train, labels, queries, 6, k, knn.TEMPERATURE), k
    if kind == "tied":
        _, indices = knn.nearest(train, train, 20)
        for row, found in enumerate(indices):
            assert found.tolist() == np.argsort(-(train @ train[row]), kind="stable")[:20].tolist()


def test_knn_of_equal_votes_takes_the_lowest_class():
    similarities = np.array([[0.5, 0.5, 0.25, 0.25, 0.1]], np.float32)
    assert knn.vote(similarities, np.array([[3, 1, 1, 3, 0]]), 4) == [1]


# ---------------------------------------------------------------- linear classifiers


def clouds(number, rng, dims=12, classes=4, noise=1.0):
    """Classes around fixed centres, on axes of very different scale and offset."""
    centres = 3.0 * np.random.default_rng(5).normal(size=(classes, dims))
    labels = rng.integers(0, classes, number)
    points = centres[labels] + noise * rng.normal(size=(number, dims))
    scales = np.logspace(-3, 3, dims)
    return (scales * points + 10 * scales).astype(np.float32), labels


def logistic_regression(x, y, classes, l2):
    """Minimises the mean cross-entropy + l2 |W|^2 / 2 to convergence; returns weights and bias."""
    x, hot = x.astype(float), np.eye(classes)[y]

    def objective(flat):
        weights, bias = flat[: x.shape[1] * classes].reshape(-1, classes), flat[x.shape[1] * classes :]
        logits = x @ weights + bias
        logs = logits - scipy.special.logsumexp(logits, axis=1, keepdims=True)
        error = (np.exp(logs) - hot) / len(x)
        value = -np.sum(hot * logs) / len(x) + l2 * np.sum(weights**2) / 2
        return value, np.concatenate([(x.T @ error + l2 * weights).ravel(), error.sum(axis=0)])

    start = np.zeros((x.shape[1] + 1) * classes)
    flat = scipy.optimize.minimize(objective, start, jac=True, method="L-BFGS-B", options={"maxiter": 2000}).x
    return flat[: x.shape[1] * classes].reshape(-1, classes), flat[x.shape[1] * classes :]


@pytest.mark.parametrize("noise", [0.3, 6.0])
def test_linear_reaches_logistic_regression(noise):
    rng = np.random.default_rng(2)
    (train, train_labels), (test, test_labels) = clouds(600, rng, noise=noise), clouds(2000, rng, noise=noise)
    mean, std = train.mean(axis=0), train.std(axis=0)
    reference = max(
        np.mean(np.argmax((test - mean) / std @ weights + bias, axis=1) == test_labels)
        for weights, bias in (
            logistic_regression((train - mean) / std, train_labels, 4, l2) for l2 in (1e-4, 1e-3, 1e-2, 1e-1)
        )
    )
    found = linear.probe({"all": train}, train_labels, {"all": test}, test_labels, 4)["scores"]["linear"]
    assert found["value"] >= reference - (0.0 if noise < 1 else 0.01)
    assert (reference == 1.0) == (noise < 1)


def test_linear_finds_the_optimum_of_its_loss():
    """A setting of the grid ends at the minimum that a converged solver finds, not only at its accuracy."""
    train, labels = clouds(512, np.random.default_rng(3), noise=6.0)
    mean, std = train.mean(axis=0), train.std(axis=0)
    weights, bias = linear.fit(train, labels, 4, np.array([0.01, 0.1]), np.array([1e-2, 1e-2]), seed=0)
    expected, _ = logistic_regression((train - mean) / std, labels, 4, 1e-2)
    np.testing.assert_allclose(weights[1] * std[:, None], expected, atol=0.05 * np.abs(expected).max())
    logits = train @ weights[1] + bias[1]
    np.testing.assert_array_equal(linear.predict(weights, bias, train)[1], np.argmax(logits, axis=1))


def test_linear_survives_constant_and_huge_features():
    train, labels = clouds(200, np.random.default_rng(4))
    train = np.concatenate([train, np.full((200, 1), 1e4), np.zeros((200, 1))], axis=1)
    weights, bias = linear.fit(train, labels, 4, np.array([0.1]), np.array([0.0]), seed=0)
    assert np.mean(linear.predict(weights, bias, train)[0] == labels) > 0.99
    assert not weights[0, -2:].any()


@pytest.mark.parametrize("task", [knn.probe, linear.probe])
def test_selection_never_looks_at_the_test_split(task):
    rng = np.random.default_rng(6)
    good, labels = clouds(300, rng, noise=2.0)
    variants = {"noise": rng.normal(size=(300, 5)), "good": good / good.std(axis=0), "half": good[:, :3]}
    test = {name: values[:60] for name, values in variants.items()}
    shuffled = {name: rng.permutation(values) for name, values in test.items()}
    first = task(variants, labels, test, labels[:60], 4)
    other = task(variants, labels, shuffled, (labels[:60] + 1) % 4, 4)
    assert first["chosen"] == other["chosen"] and first["held_out"] == other["held_out"]
    assert "good" in (first["chosen"], first["chosen"]["variant"] if isinstance(first["chosen"], dict) else None)
    assert first["scores"] != other["scores"]


# ---------------------------------------------------------------- scores


def test_hold_out_keeps_the_classes_and_repeats():
    labels = np.repeat([0, 1, 2, 4], [50, 10, 2, 1])
    fit, held = scores.hold_out(labels, 0.2, seed=3)
    assert sorted([*fit, *held]) == list(range(63))
    assert np.bincount(labels[held], minlength=5).tolist() == [10, 2, 1, 0, 0]
    np.testing.assert_array_equal(held, scores.hold_out(labels, 0.2, seed=3)[1])
    assert held.tolist() != scores.hold_out(labels, 0.2, seed=4)[1].tolist()
    with pytest.raises(UserError, match="held out"):
        scores.hold_out(np.arange(4), 0.2, seed=0)


def test_f1_and_class_accuracy_with_absent_classes():
    labels, predicted = np.array([0, 0, 0, 1, 1, 3]), np.array([0, 0, 1, 1, 3, 2])
    # class 0: 2 right of 2 predicted, 3 true; 1: 1 of 2, 2; 2: 0 of 1, 0; 3: 0 of 1, 1; 4: in neither
    assert scores.macro_f1(predicted, labels, 5) == pytest.approx((4 / 5 + 2 / 4 + 0 + 0) / 4)
    np.testing.assert_allclose(scores.accuracy_by_class(predicted, labels, 5), [2 / 3, 1 / 2, np.nan, 0.0, np.nan])
    assert scores.accuracy(predicted, labels) == 0.5


def test_bootstrap_interval_covers():
    rng, truth, covered = np.random.default_rng(7), 0.7, 0
    for trial in range(200):
        low, high = scores.bootstrap_interval(rng.random(150) < truth, seed=trial)
        covered += low <= truth <= high
        width = 2 * 1.96 * np.sqrt(truth * (1 - truth) / 150)
        assert 0.7 * width < high - low < 1.3 * width
    assert 0.90 <= covered / 200 <= 0.985  # 95 % wanted; the percentile interval is a little narrow at n = 150


def test_colour_is_the_nearest_mean_and_deviation():
    rng = np.random.default_rng(8)
    images = rng.integers(0, 256, (9, 20, 30, 3), dtype=np.uint8) // rng.integers(1, 9, (9, 1, 1, 3), dtype=np.uint8)
    measured = np.stack([colour.statistics(image / np.float32(255)) for image in images])
    pixels = images.reshape(9, -1, 3) / 255.0
    np.testing.assert_allclose(measured, np.concatenate([pixels.mean(1), pixels.std(1)], axis=1), atol=1e-6)
    labels = np.arange(9)
    assert colour.predict(measured, labels, measured[::-1] + 1e-4).tolist() == labels[::-1].tolist()
