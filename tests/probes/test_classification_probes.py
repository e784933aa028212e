"""The protocol of the classification tasks: which data each choice may use, scores and details, invalid input."""

import dataclasses
import json
import tracemalloc

import numpy as np
import pytest
from toy_features import TASKS, images, labeled, run, tokens

from pera_jax.common.errors import UserError
from pera_jax.encoder import extract as features
from pera_jax.probes.classification import supervised
from pera_jax.probes.classification.labeled import Labeled
from pera_jax.probes.runner import results

# ---------------------------------------------------------------- the protocol


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("name", TASKS)
def test_choices_never_look_at_the_test_images(name, several):
    data = labeled(6, several=several, noise=4.0)
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
    data = labeled(2, noise=4.0)
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
    data = labeled(2, several=True, noise=2.0)
    found, details = run(name, data, shares=(0.5,), seeds=(0, 1))
    assert list(found) == [f"{name}{share}_map_{kind}" for share in ("", "_50/50") for kind in ("micro", "macro")]
    assert all(score.value > 0.6 for score in found.values())  # chance is 0.4
    mean = np.mean([row["average_precision"] for row in details["per_class"].values()])
    assert mean == pytest.approx(found[f"{name}_map_macro"].value)
    assert [row["images"] for row in details["per_class"].values()] == data.test_labels.sum(axis=0).tolist()


def test_of_a_better_variant_the_better_one_is_chosen():
    data = labeled(6, noise=2.0)
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
    data = Labeled(images(rng, labels, dims=64), images(rng, tests, dims=64), labels, tests, ("a", "b", "c"))
    for name in TASKS:
        found, _ = run(name, data, seeds=(0, 1))
        assert found["knn20_best" if name == "knn" else name].value >= 2 / 3
    assert sorted(run("knn", data)[0]) == ["knn10", "knn20", "knn20_best"]


@pytest.mark.parametrize("name", ["linear", "logistic"])
def test_rows_are_worked_on_in_pieces_with_the_same_scores_and_little_memory(name, monkeypatch):
    rng = np.random.default_rng(0)
    labels, tests = rng.integers(0, 4, 2500), rng.integers(0, 4, 20)
    data = Labeled(images(rng, labels, 8.0, 4, 32), images(rng, tests, 8.0, 4, 32), labels, tests, tuple("abcd"))
    quick = {"seeds": (0,)} | ({"smallest": -4, "largest": -3} if name == "logistic" else {})
    whole, _ = run(name, data, **quick)
    monkeypatch.setattr(supervised, "_ROWS", 300)
    tracemalloc.start()
    in_pieces, _ = run(name, data, **quick)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert {key: score.value for key, score in in_pieces.items()} == pytest.approx(
        {key: score.value for key, score in whole.items()}, abs=1e-6
    )
    assert peak < 5 * (data.train.class_tokens.nbytes + data.train.patch_means.nbytes)


# ---------------------------------------------------------------- bad input


def relabeled(data, train=lambda labels: labels, test=lambda labels: labels):
    return dataclasses.replace(data, train_labels=train(data.train_labels), test_labels=test(data.test_labels))


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize(
    ("several", "change", "sentence"),
    [
        (False, {"train": lambda y: 0 * y + 2}, "all training images have the class class 2"),
        (False, {"train": lambda y: y % 2}, "training split has no images of class 2, class 3, but the test split has"),
        (True, {"train": lambda y: y & False}, "no training image has a label"),
        (True, {"test": lambda y: y & False}, "no test image has a label"),
        (True, {"train": lambda y: y | True}, "all training images have the same labels"),
        (True, {"train": lambda y: y & [True, True, True, False]}, "no images of class 3, but the test split has"),
    ],
)
def test_labels_that_cannot_be_learned(name, several, change, sentence):
    with pytest.raises(UserError, match=sentence):
        run(name, relabeled(labeled(several=several), **change))


@pytest.mark.parametrize("name", TASKS)
def test_few_labels_among_many_images_give_numbers_or_one_sentence(name):
    data, sparse = labeled(several=True), np.zeros((120, 4), bool)
    sparse[[5, 60, 61, 62], [0, 1, 2, 3]] = True
    with pytest.raises(UserError, match="no image with a label can be held out"):
        run(name, relabeled(data, train=lambda y: sparse))
    sparse[[70, 71, 72], 1] = True
    found, details = run(name, relabeled(data, train=lambda y: sparse))
    json.dumps([details, [dataclasses.asdict(score) for score in found.values()]], allow_nan=False)


@pytest.mark.parametrize(
    ("name", "settings", "sentence"),
    [
        ("knn", {"k": (200, 500)}, r"has 120 images, too few for k=200"),
        ("knn", {"k": ()}, "invalid k="),
        ("knn", {"k": (0, 20)}, "invalid k="),
        ("knn", {"held_out": 1.0}, "invalid held_out=1.0"),
        ("knn", {"temperature": 0.0}, "invalid temperature=0.0"),
        ("linear", {"seeds": ()}, "invalid seeds="),
        ("linear", {"shares": (0.2, 20)}, "invalid shares=20"),
        ("linear", {"learning_rates": ()}, "invalid learning_rates="),
        ("linear", {"batch": 0}, "invalid batch=0"),
        ("logistic", {"blocks": (0,)}, "invalid blocks="),
        ("logistic", {"smallest": 2, "largest": 1}, "invalid range smallest=2, largest=1"),
        ("logistic", {"iterations": 0}, "invalid iterations=0"),
        ("logistic", {"tolerance": 0.0}, "invalid tolerance=0.0"),
    ],
)
def test_settings_that_cannot_be_used(name, settings, sentence):
    with pytest.raises(UserError, match=sentence):
        run(name, labeled(), **settings)


def test_without_test_images_only_neighbors_work():
    data = dataclasses.replace(labeled(), test=None, test_labels=None)
    for name in ("linear", "logistic"):
        with pytest.raises(UserError, match=f"{name} needs a test split"):
            run(name, data)
    few = labeled(number=10, tests=0)
    with pytest.raises(UserError, match="has 10 images, too few for k=10"):
        run("knn", dataclasses.replace(few, test=None, test_labels=None))


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize(
    ("part", "change", "sentence"),
    [
        ("train", lambda x: x[:0], "the training split has no images"),
        ("test", lambda x: x[:0], "the test split has no images"),
        (
            "train",
            lambda x: np.where(np.arange(len(x))[:, None, None] == 3, np.nan, x),
            "of the training images contain NaN",
        ),
        (
            "test",
            lambda x: np.where(np.arange(len(x))[:, None, None] == 3, np.inf, x),
            "of the test images contain NaN",
        ),
        ("train", lambda x: 0.0 * x + 7.0, "all training images have the same features"),
        ("train", lambda x: 0.0 * x, "all training images have the same features"),
    ],
)
def test_features_that_tell_nothing_are_one_sentence(name, part, change, sentence):
    data = labeled()
    tokens_of = getattr(data, part)
    changed = features.Features(change(tokens_of.class_tokens), change(tokens_of.patch_means))
    labels = getattr(data, f"{part}_labels")[: len(changed.class_tokens)]
    with pytest.raises(UserError, match=sentence):
        run(name, dataclasses.replace(data, **{part: changed, f"{part}_labels": labels}))


def test_a_share_that_fails_leaves_the_other_scores_as_they_are():
    data = labeled(number=40, tests=20)
    alone, _ = run("linear", data, seeds=(0,))
    found, details = run("linear", data, seeds=(0,), shares=(0.01, 0.5))
    assert {name: found[name] for name in alone} == alone and "linear_50/50" in found and "linear_1/99" not in found
    assert "no class has two training images" in details["failed_1/99"] and "chosen_1/99" not in details
    entry = {"details": details}
    assert results.failed_shares(entry) == {"1/99": details["failed_1/99"]}
