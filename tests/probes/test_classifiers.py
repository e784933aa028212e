"""kNN, linear and logistic regression on features, compared with scikit-learn and their definitions."""

import dataclasses
import warnings

import jax
import numpy as np
import pytest
from sklearn import exceptions, linear_model, metrics, multiclass, neighbors, preprocessing
from toy_features import labeled, run, tokens

from pera_jax.probes import scores, splits
from pera_jax.probes.classification import knn, linear, logistic, supervised

# ---------------------------------------------------------------- nearest neighbors


def naive_knn(train, labels, queries, classes, k, temperature):
    """The definition as loops in float64: sort by (similarity, index), add the votes, take the first largest."""
    predictions = []
    for query in queries.astype(float):
        similarity = []
        for index, row in enumerate(train.astype(float)):
            length = np.linalg.norm(row) * np.linalg.norm(query)
            similarity.append((-(row @ query / length if length else 0.0), index))
        shares = np.zeros(classes)
        for negative, index in sorted(similarity)[:k]:
            shares[labels[index]] += np.exp(-negative / temperature)
        predictions.append(int(np.argmax(shares)))
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
        assert values.tolist() == naive_knn(train, labels, queries, 6, k, 0.07), k
    if kind == "tied":
        _, indices = knn.nearest(train, train, 20)
        for row, found in enumerate(indices):
            assert found.tolist() == np.argsort(-(train @ train[row]), kind="stable")[:20].tolist()
        # Left out of its own neighbors, the rest keeps its order, though others are just as near.
        _, indices = knn.nearest(train, train, 20, own=np.arange(120))
        for row, found in enumerate(indices):
            order = np.argsort(-(train @ train[row]), kind="stable")
            assert found.tolist() == order[order != row][:20].tolist()


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("several", [False, True])
def test_knn_is_that_of_scikit_learn(seed, several):
    data = labeled(seed, several=several, noise=6.0)
    train, test = data.train.class_tokens[:, -1], data.test.class_tokens[:, -1]
    found, _ = run("knn", data, k=(1, 10, 20, 100, 200), temperature=0.05)
    assert {name.removesuffix("_map_micro").removesuffix("_map_macro") for name in found} == {
        "knn1", "knn10", "knn20", "knn100", "knn20_best",
    }  # fmt: skip
    for k in (1, 10, 20, 100):
        model = neighbors.KNeighborsClassifier(
            k, metric="cosine", algorithm="brute", weights=lambda distances: np.exp((1.0 - distances) / 0.05)
        ).fit(train, data.train_labels)
        shares = model.predict_proba(test)
        if several:
            shares = np.stack([share[:, 1] for share in shares], axis=1)
            for kind in ("micro", "macro"):
                expected = metrics.average_precision_score(data.test_labels, shares, average=kind)
                assert found[f"knn{k}_map_{kind}"].value == pytest.approx(expected, abs=2e-3)  # float32: near ties
        else:
            assert found[f"knn{k}"].value == np.mean(np.argmax(shares, axis=1) == data.test_labels)


def test_knn_of_equal_votes_takes_the_lowest_class():
    similarities = np.array([[0.5, 0.5, 0.25, 0.25, 0.1]], np.float32)
    shares = knn.votes(similarities, np.array([[3, 1, 1, 3, 0]]), 4, 0.07)
    assert shares[0, 1] == shares[0, 3] and np.argmax(shares) == 1 and shares.sum() == pytest.approx(1.0)


@pytest.mark.parametrize("several", [False, True])
def test_without_test_images_each_is_left_out_of_its_own_vote(several):
    """The same as one test image against all the others, for every image; copies of it may vote."""
    data = labeled(3, number=30, tests=0, several=several, noise=4.0)
    train = data.train.class_tokens[:, -1].copy()
    train[7] = train[3]
    data = dataclasses.replace(data, train=tokens(train[:, None], train[:, None]), test=None, test_labels=None)
    found, details = run("knn", data, k=(5, 29, 30))
    assert details == {} and {name.split("_")[0] for name in found} == {"knn5", "knn29"}
    for k in (5, 29):
        outputs = []
        for index in range(30):
            rest = np.delete(np.arange(30), index)
            one = knn.predict(train[rest], data.train_labels[rest], train[index : index + 1], 4, (k,))
            outputs.append(one[k][0])
        if several:
            expected = scores.map_micro(np.array(outputs), data.train_labels)
            assert found[f"knn{k}_map_micro"].value == pytest.approx(expected, abs=1e-6)
        else:
            assert found[f"knn{k}"].value == np.mean(np.array(outputs) == data.train_labels)
            monitor = jax.jit(knn.leave_one_out, static_argnums=(2, 3))(train, data.train_labels, 4, k)
            assert float(monitor) == pytest.approx(found[f"knn{k}"].value)


# ---------------------------------------------------------------- logistic regression


def scikit_learn(train, targets, c):
    """(weights, bias) for standardized features, converged."""
    model = linear_model.LogisticRegression(C=c, tol=1e-10, max_iter=1000, solver="newton-cholesky")
    if targets.ndim == 2:
        models = multiclass.OneVsRestClassifier(model).fit(train, targets).estimators_
        return np.concatenate([m.coef_ for m in models]).T, np.concatenate([m.intercept_ for m in models])
    model.fit(train, targets)
    return model.coef_.T, model.intercept_


def problem(seed):
    rng = np.random.default_rng(seed)
    kind = ("plain", "two classes", "several", "wide", "copies", "absent class", "one image", "constant")[seed % 8]
    number, dims, classes = (20, 60, 3) if kind == "wide" else (80, 5, 2 if kind == "two classes" else 4)
    labels = rng.integers(0, classes, number)
    x = rng.normal(size=(number, dims)) + rng.normal(size=(classes, dims))[labels]
    x = x * np.logspace(-3, 2, dims) + 5.0
    if kind == "several":
        labels = rng.random((number, classes)) < 0.3
    if kind == "copies":
        x, labels = np.repeat(x, 2, axis=0), np.repeat(labels, 2)
        x = np.concatenate([x, x], axis=1)
    if kind == "absent class":
        labels[labels == 1] = 3
    if kind == "one image":
        labels[labels == 2] = 0
        labels[5] = 2
    if kind == "constant":
        x[:, 2], x[:, 4] = 1e4, 0.0
    return x, labels, classes


@pytest.mark.parametrize("seed", range(16))
def test_logistic_regression_is_that_of_scikit_learn(seed):
    """Weights and logits to 1e-4 of the largest."""
    x, labels, classes = problem(seed)
    model = logistic.Problem(x, labels, classes)
    # float64 leaves a deviation of 1e-12 to a constant 1e4, which their scaler would blow up to 1
    standard = preprocessing.StandardScaler().fit_transform(x * (x.std(axis=0) > 1e-8))
    for c in (1e-3, 1.0, 30.0):  # each from the last one's solution
        found = model.solve(c, tolerance=1e-7, iterations=5000)
        assert found.gradient <= 1e-7
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", exceptions.ConvergenceWarning)
            expected, bias = scikit_learn(standard, labels, c)
        present = np.unique(labels) if labels.ndim == 1 else np.arange(classes)
        logits = (x @ found.weights + found.bias)[:, present]
        if len(present) == 2 and labels.ndim == 1:
            found_weights, logits = (found.weights[:, 1] - found.weights[:, 0])[:, None], logits[:, 1:] - logits[:, :1]
        else:
            found_weights = found.weights[:, present]
        scale = np.abs(expected).max()
        np.testing.assert_allclose(found_weights * x.std(axis=0)[:, None], expected, atol=1e-4 * scale)
        shift = 0.0 if logits.shape[1] == 1 or labels.ndim == 2 else 1.0  # one constant is free in a softmax
        theirs = standard @ expected + bias
        np.testing.assert_allclose(
            logits - shift * logits.mean(axis=1, keepdims=True),
            theirs - shift * theirs.mean(axis=1, keepdims=True),
            atol=1e-4 * np.abs(theirs).max(),
        )
        if labels.ndim == 1 and len(present) < classes:
            assert set(np.argmax(x @ found.weights + found.bias, axis=1)) <= set(present)


def test_a_fit_uses_one_thread_of_scipy_and_gives_the_others_back(monkeypatch):
    """Also if it fails; threads of two libraries that wait for each other make it three times slower."""
    libraries, during = logistic._blas_of_scipy().lib_controllers, []
    assert libraries and all("numpy" not in library.filepath for library in libraries)
    for library in libraries:
        library.set_num_threads(2)

    def failing(*_, **__):
        during.extend(library.num_threads for library in libraries)
        raise FloatingPointError

    monkeypatch.setattr(logistic.scipy.optimize, "minimize", failing)
    features, labels = np.random.default_rng(0).normal(size=(12, 3)).astype(np.float32), np.arange(12) % 3
    with pytest.raises(FloatingPointError):
        logistic.Problem(features, labels, 3).solve(1.0, 1e-3, 10)
    assert during == [1] * len(libraries)
    assert [library.num_threads for library in libraries] == [2] * len(libraries)


def test_classes_that_all_or_no_images_carry_keep_their_odds():
    x, labels, _ = problem(2)
    labels[:, 1], labels[:, 3] = True, False
    found = logistic.Problem(x, labels, 4).solve(1.0, 1e-6, 2000)
    assert not found.weights[:, [1, 3]].any() and found.bias[1] == -found.bias[3] == pytest.approx(np.log(161))
    rest = logistic.Problem(x, labels[:, [0, 2]], 2).solve(1.0, 1e-6, 2000)
    np.testing.assert_allclose(found.weights[:, [0, 2]], rest.weights)
    nothing = logistic.Problem(x, labels[:, [1, 3]], 2).solve(1.0, 1e-6, 2000)
    assert not nothing.weights.any() and nothing.gradient == 0.0


def test_what_has_not_converged_is_told():
    _, details = run("logistic", labeled(seed=1), iterations=3, seeds=(0,))
    assert "not converged after at most 3 iterations" in details["unconverged"]
    assert not details["chosen"][0]["converged"]
    _, details = run("logistic", labeled(seed=1), seeds=(0,))
    assert "unconverged" not in details and details["chosen"][0]["converged"]


@pytest.mark.parametrize(("images", "noise"), [(10, 1.0), (10, 3.0)])
def test_the_best_c_of_the_whole_range_is_found_where_few_images_are(images, noise, monkeypatch):
    """As scikit-learn's over the decades: with few images a prediction changes only far above the smallest C."""
    rng, classes = np.random.default_rng(images), 30
    labels = np.repeat(np.arange(classes), images)
    centers = rng.normal(size=(classes, 6))
    x, nothing = centers[labels] + noise / 3 * rng.normal(size=(len(labels), 6)), np.zeros((len(labels), 1, 1))
    variants = supervised.Variants(tokens(x[:, None], nothing), (1,))
    fit, held = splits.hold_out(labels, 0.2, 0)
    scaled = preprocessing.StandardScaler().fit(x[fit]).transform(x)

    def reached(power):
        model = linear_model.LogisticRegression(C=10.0**power, max_iter=3000, tol=1e-7).fit(scaled[fit], labels[fit])
        return model.score(scaled[held], labels[held])

    expected = {power: reached(power) for power in range(-4, 3)}
    assert expected[-4] == expected[-3] < max(expected.values()) - 0.05  # the plateau on which a search could end
    choice, table = logistic.choose(variants, labels, fit, held, classes, 0, logistic.SETTINGS)
    assert max(table["class_1"].values()) >= max(expected.values()) - 1.5 / len(held)
    assert "end" not in choice and 10.0**-1 <= choice["C"] <= 10.0**3
    monkeypatch.setattr(logistic, "ROUGH", 1e-6)
    monkeypatch.setattr(logistic, "FITTED", 0.0)  # no decade is left out
    _, table = logistic.choose(variants, labels, fit, held, classes, 0, logistic.SETTINGS | {"largest": 2})
    found = {power: table["class_1"][f"{10.0**power:.4g}"] for power in expected}
    assert found == pytest.approx(expected, abs=1.5 / len(held))  # one image on the border


def test_the_loss_of_a_solution_is_that_of_scikit_learn():
    for seed in (0, 1, 2):  # several classes, two, several labels
        x, labels, classes = problem(seed)
        model = logistic.Problem(x, labels, classes)
        found = model.solve(1.0, 1e-7, 5000)
        logits = found.logits(x)
        truth = np.eye(classes)[labels] if labels.ndim == 1 else labels.astype(float)
        shares = np.broadcast_to(truth.mean(axis=0), truth.shape)
        if labels.ndim == 1:
            odds = np.exp(logits - logits.max(axis=1, keepdims=True))
            expected = [metrics.log_loss(labels, p / p.sum(axis=1, keepdims=True)) for p in (odds, shares)]
        else:
            expected = [
                sum(metrics.log_loss(truth[:, c], p[:, c]) for c in range(classes))
                for p in (1 / (1 + np.exp(-logits)), shares)
            ]
        assert [found.loss, model.bias_only_loss] == pytest.approx(expected, rel=1e-9)


def test_an_end_of_the_range_that_is_best_is_told():
    found = lambda **ends: run("logistic", labeled(seed=1, noise=3.0), seeds=(0,), **ends)[1]  # noqa: E731
    assert (
        found(smallest=-6, largest=-3)["at_the_end"]
        == "the best C = 1e-3 is the largest in the range; set logistic.largest to -1"
    )
    assert "at_the_end" not in found(smallest=-6, largest=5) and "at_the_end" not in found(smallest=-3, largest=-3)


# ---------------------------------------------------------------- linear classifiers


def clouds(number, rng, noise):
    """Classes around fixed centers, on axes of very different scale and offset."""
    labels = rng.integers(0, 4, number)
    points = 3.0 * np.random.default_rng(5).normal(size=(4, 12))[labels] + noise * rng.normal(size=(number, 12))
    return ((points + 10.0) * np.logspace(-3, 3, 12)).astype(np.float32), labels


@pytest.mark.parametrize("several", [False, True])
def test_linear_finds_the_optimum_of_its_loss(several):
    """A setting of the grid ends at the minimum that a converged solver finds, not only at its accuracy."""
    train, labels = clouds(512, np.random.default_rng(3), noise=6.0)
    targets = np.eye(4, dtype=bool)[labels] if several else labels
    weights, _ = linear.fit(train, targets, 4, np.array([0.01, 0.1]), np.array([1e-2, 1e-2]), seed=0)
    expected = logistic.Problem(train, targets, 4).solve(1.0 / (512 * 1e-2), 1e-7, 2000)
    std = train.std(axis=0, dtype=float)[:, None]
    np.testing.assert_allclose(
        weights[1] * std, expected.weights * std, atol=0.05 * np.abs(expected.weights * std).max()
    )


def test_linear_survives_constant_and_huge_features():
    train, labels = clouds(200, np.random.default_rng(4), noise=1.0)
    train = np.concatenate([train, np.full((200, 1), 1e4), np.zeros((200, 1))], axis=1)
    weights, bias = linear.fit(train, labels, 4, np.array([0.1, 1e30]), np.array([0.0, 1e30]), seed=0)
    found = linear.logits(weights, bias, train)
    assert np.mean(np.argmax(found[0], axis=1) == labels) > 0.99
    assert not weights[0, -2:].any() and not np.isnan(found).any()
