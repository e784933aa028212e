"""kNN, linear and logistic regression on features, against scikit-learn and their definitions; what they refuse."""

import dataclasses
import warnings

import jax
import numpy as np
import pytest
from sklearn import exceptions, linear_model, metrics, multiclass, neighbors, preprocessing

from pera_jax.errors import UserError
from pera_jax.probes import features, knn, linear, logistic, scores
from pera_jax.probes.labelled import Labelled

TASKS = {"knn": knn, "linear": linear, "logistic": logistic}


def tokens(class_tokens: np.ndarray, patch_means: np.ndarray) -> features.Features:
    rest = len(dataclasses.fields(features.Features)) - 2
    return features.Features(class_tokens.astype(np.float32), patch_means.astype(np.float32), *[None] * rest)


def images(rng, labels, noise=1.0, blocks=2, dims=6):
    """Features around a centre of each label set, better in the later block; axes of very different scale."""
    hot = labels if labels.ndim == 2 else np.eye(8)[labels]
    centres = np.random.default_rng(5).normal(size=(2, blocks, hot.shape[1], dims))
    points = np.einsum("nc,pbcd->pnbd", hot.astype(float), 2.0 * centres)
    points += noise * rng.normal(size=points.shape) * np.linspace(2, 1, blocks)[:, None]
    return tokens(*(10.0 + points * np.logspace(-1, 1, dims)))


def labelled(seed=0, number=120, tests=60, classes=4, several=False, **options) -> Labelled:
    rng = np.random.default_rng(seed)
    if several:
        labels = rng.random((number + tests, classes)) < 0.4
    else:
        labels = np.concatenate([np.arange(classes), rng.integers(0, classes, number + tests - classes)])
    train, test = labels[:number], labels[number:]
    names = tuple(f"class {c}" for c in range(classes))
    return Labelled(images(rng, train, **options), images(rng, test, **options), train, test, names)


def run(name: str, data: Labelled, **settings):
    """(scores, details) of a task, made quick."""
    task = TASKS[name]
    quick = {"linear": {"steps": 60, "epochs": 1}, "logistic": {"smallest": -3, "largest": 1}, "knn": {}}[name]
    assert not (quick | settings).keys() - task.SETTINGS.keys()
    found = dict(task.run(data, task.SETTINGS | quick | settings))
    values = {key: value for key, value in found.items() if isinstance(value, scores.Score)}
    assert all(key.startswith(name) for key in values)
    return values, {key: value for key, value in found.items() if key not in values}


# ---------------------------------------------------------------- nearest neighbours


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
        # Left out of its own neighbours, the rest keeps its order, though others are just as near.
        _, indices = knn.nearest(train, train, 20, own=np.arange(120))
        for row, found in enumerate(indices):
            order = np.argsort(-(train @ train[row]), kind="stable")
            assert found.tolist() == order[order != row][:20].tolist()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("several", [False, True])
def test_knn_is_that_of_scikit_learn(seed, several):
    data = labelled(seed, several=several, noise=6.0)
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
    data = labelled(3, number=30, tests=0, several=several, noise=4.0)
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
    """(weights, bias) for standardised features, converged."""
    model = linear_model.LogisticRegression(C=c, tol=1e-9, max_iter=20000)
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
        np.testing.assert_allclose(found_weights * x.std(axis=0)[:, None], expected, atol=1e-3 * scale)
        shift = 0.0 if logits.shape[1] == 1 or labels.ndim == 2 else 1.0  # one constant is free in a softmax
        theirs = standard @ expected + bias
        np.testing.assert_allclose(
            logits - shift * logits.mean(axis=1, keepdims=True),
            theirs - shift * theirs.mean(axis=1, keepdims=True),
            atol=1e-3 * np.abs(theirs).max(),
        )
        if labels.ndim == 1 and len(present) < classes:
            assert set(np.argmax(x @ found.weights + found.bias, axis=1)) <= set(present)


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
    _, details = run("logistic", labelled(seed=1), iterations=3, seeds=(0,))
    assert "was left after at most 3 iterations" in details["unconverged"]
    assert not details["chosen"][0]["converged"]
    _, details = run("logistic", labelled(seed=1), seeds=(0,))
    assert "unconverged" not in details and details["chosen"][0]["converged"]


# ---------------------------------------------------------------- linear classifiers


def clouds(number, rng, noise):
    """Classes around fixed centres, on axes of very different scale and offset."""
    labels = rng.integers(0, 4, number)
    points = 3.0 * np.random.default_rng(5).normal(size=(4, 12))[labels] + noise * rng.normal(size=(number, 12))
    return ((points + 10.0) * np.logspace(-3, 3, 12)).astype(np.float32), labels


@pytest.mark.parametrize("several", [False, True])
def test_linear_finds_the_optimum_of_its_loss(several):
    """A setting of the grid ends at the minimum that a converged solver finds, not only at its accuracy."""
    train, labels = clouds(512, np.random.default_rng(3), noise=6.0)
    targets = np.eye(4, dtype=bool)[labels] if several else labels
    weights, bias = linear.fit(train, targets, 4, np.array([0.01, 0.1]), np.array([1e-2, 1e-2]), seed=0)
    expected = logistic.Problem(train, targets, 4).solve(1.0 / (512 * 1e-2), 1e-7, 2000)
    std = train.std(axis=0, dtype=float)[:, None]
    np.testing.assert_allclose(weights[1] * std, expected.weights * std, atol=0.05 * np.abs(expected.weights * std).max())


def test_linear_survives_constant_and_huge_features():
    train, labels = clouds(200, np.random.default_rng(4), noise=1.0)
    train = np.concatenate([train, np.full((200, 1), 1e4), np.zeros((200, 1))], axis=1)
    weights, bias = linear.fit(train, labels, 4, np.array([0.1, 1e30]), np.array([0.0, 1e30]), seed=0)
    found = linear.logits(weights, bias, train)
    assert np.mean(np.argmax(found[0], axis=1) == labels) > 0.99
    assert not weights[0, -2:].any() and not np.isnan(found).any()


# ---------------------------------------------------------------- the protocol


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("name", TASKS)
def test_choices_never_look_at_the_test_images(name, several):
    data = labelled(6, several=several, noise=4.0)
    rng = np.random.default_rng(0)
    found, details = run(name, data)
    order = rng.permutation(len(data.test_labels))
    other = dataclasses.replace(
        data,
        test=tokens(data.test.class_tokens[order], rng.normal(size=data.test.patch_means.shape)),
        test_labels=rng.permuted(data.test_labels, axis=0),
    )
    found_other, details_other = run(name, other)
    assert details["chosen"] == details_other["chosen"] and details["held_out"] == details_other["held_out"]
    assert [choice["seed"] for choice in details["chosen"]] == [0, 1, 2] == list(range(len(details["held_out"])))
    assert found != found_other


@pytest.mark.parametrize("name", ["linear", "logistic"])
def test_scores_of_one_label(name):
    data = labelled(2, noise=4.0)
    found, details = run(name, data, shares=(0.2, 0.5), seeds=(3, 4))
    assert list(found) == [
        name, f"{name}_macro_f1",
        f"{name}_20/80", f"{name}_20/80_macro_f1", f"{name}_50/50", f"{name}_50/50_macro_f1",
    ]  # fmt: skip
    for key, score in found.items():
        assert len(score.seeds) == 2 and score.value == pytest.approx(np.mean(score.seeds))
        assert score.low is None if "/" in key else score.low <= score.value <= score.high
        assert score.value > 0.35  # chance is a quarter
    confusion = np.array(details["confusion"])
    assert confusion.trace() / confusion.sum() == pytest.approx(found[name].seeds[0])
    np.testing.assert_array_equal(confusion.sum(axis=1), np.bincount(data.test_labels))
    classes = details["per_class"].values()
    assert sum(row["accuracy"] * row["images"] for row in classes) / 60 == pytest.approx(found[name].value)
    assert np.mean([row["f1"] for row in classes]) == pytest.approx(found[f"{name}_macro_f1"].value)
    assert [choice["seed"] for choice in details["chosen_20/80"]] == [3, 4]


@pytest.mark.parametrize("name", ["linear", "logistic"])
def test_scores_of_several_labels(name):
    data = labelled(2, several=True, noise=2.0)
    found, details = run(name, data, shares=(0.5,), seeds=(0, 1))
    assert list(found) == [f"{name}{share}_map_{kind}" for share in ("", "_50/50") for kind in ("micro", "macro")]
    assert all(score.value > 0.6 for score in found.values())  # chance is 0.4
    mean = np.mean([row["average_precision"] for row in details["per_class"].values()])
    assert mean == pytest.approx(found[f"{name}_map_macro"].value)
    assert [row["images"] for row in details["per_class"].values()] == data.test_labels.sum(axis=0).tolist()


def test_of_a_better_variant_the_better_one_is_chosen():
    data = labelled(6, noise=2.0)
    rng = np.random.default_rng(0)
    hidden = [rng.normal(size=split.class_tokens.shape) for split in (data.train, data.test)]
    data = dataclasses.replace(
        data, train=tokens(hidden[0], data.train.patch_means), test=tokens(hidden[1], data.test.patch_means)
    )
    for name in TASKS:
        found, details = run(name, data)
        assert all(choice["variant"].startswith("class_mean") for choice in details["chosen"])
        assert found["knn20_best" if name == "knn" else name].value >= 0.5
    assert run("knn", data)[0]["knn20"].value < 0.45


def test_more_dimensions_than_images_and_a_class_of_one_image():
    rng = np.random.default_rng(0)
    labels = np.array([0] * 10 + [1] * 11 + [2])
    tests = np.array([0, 1, 2])
    data = Labelled(images(rng, labels, dims=64), images(rng, tests, dims=64), labels, tests, ("a", "b", "c"))
    for name in TASKS:
        found, _ = run(name, data, seeds=(0, 1))
        assert found["knn20_best" if name == "knn" else name].value >= 2 / 3
    assert sorted(run("knn", data)[0]) == ["knn10", "knn20", "knn20_best"]


# ---------------------------------------------------------------- bad input


def relabelled(data, train=lambda labels: labels, test=lambda labels: labels):
    return dataclasses.replace(data, train_labels=train(data.train_labels), test_labels=test(data.test_labels))


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize(
    ("several", "change", "sentence"),
    [
        (False, {"train": lambda y: 0 * y + 2}, "all training images are of one class, class 2"),
        (False, {"train": lambda y: y % 2}, "holds images of class 2, class 3, which the training split lacks"),
        (True, {"train": lambda y: y & False}, "the training images carry no label at all"),
        (True, {"test": lambda y: y & False}, "the test images carry no label at all"),
        (True, {"train": lambda y: y | True}, "all training images carry the same labels"),
        (True, {"train": lambda y: y & [True, True, True, False]}, "images of class 3, which the training split lacks"),
    ],
)
def test_labels_that_cannot_be_learnt(name, several, change, sentence):
    with pytest.raises(UserError, match=sentence):
        run(name, relabelled(labelled(several=several), **change))


@pytest.mark.parametrize(
    ("name", "settings", "sentence"),
    [
        ("knn", {"k": (200, 500)}, r"holds 120 images, and 200 nearest neighbours ask for more"),
        ("knn", {"k": ()}, "k is"),
        ("knn", {"k": (0, 20)}, "k is"),
        ("knn", {"held_out": 1.0}, "held_out holds 1.0"),
        ("knn", {"temperature": 0.0}, "temperature is 0.0"),
        ("linear", {"seeds": ()}, "seeds is"),
        ("linear", {"shares": (0.2, 20)}, "shares holds 20"),
        ("linear", {"learning_rates": ()}, "learning_rates is"),
        ("linear", {"batch": 0}, "batch is 0"),
        ("logistic", {"blocks": (0,)}, "blocks is"),
        ("logistic", {"smallest": 2, "largest": 1}, "smallest is 2 and largest 1"),
        ("logistic", {"iterations": 0}, "iterations is 0"),
        ("logistic", {"tolerance": 0.0}, "tolerance is 0.0"),
    ],
)
def test_settings_that_cannot_be_used(name, settings, sentence):
    with pytest.raises(UserError, match=sentence):
        run(name, labelled(), **settings)


def test_without_test_images_only_neighbours_work():
    data = dataclasses.replace(labelled(), test=None, test_labels=None)
    for name in ("linear", "logistic"):
        with pytest.raises(UserError, match=f"{name} needs test images"):
            run(name, data)
    few = labelled(number=10, tests=0)
    with pytest.raises(UserError, match="holds 10 images, and 10 nearest neighbours ask for more"):
        run("knn", dataclasses.replace(few, test=None, test_labels=None))
