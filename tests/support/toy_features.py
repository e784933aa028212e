"""Labeled features for the tests of the classification probes, and a quick run of a task."""

import numpy as np

from pera_jax.encoder import extract as features
from pera_jax.probes import scores
from pera_jax.probes.classification import knn, linear, logistic
from pera_jax.probes.classification.labeled import Labeled

TASKS = {"knn": knn, "linear": linear, "logistic": logistic}


def tokens(class_tokens: np.ndarray, patch_means: np.ndarray) -> features.Features:
    return features.Features(class_tokens.astype(np.float32), patch_means.astype(np.float32))


def images(rng, labels, noise=1.0, blocks=2, dims=6):
    """Features around a center of each label set, better in the later block; axes of very different scale."""
    hot = labels if labels.ndim == 2 else np.eye(8)[labels]
    centers = np.random.default_rng(5).normal(size=(2, blocks, hot.shape[1], dims))
    points = np.einsum("nc,pbcd->pnbd", hot.astype(float), 2.0 * centers)
    points += noise * rng.normal(size=points.shape) * np.linspace(2, 1, blocks)[:, None]
    return tokens(*(10.0 + points * np.logspace(-1, 1, dims)))


def labeled(seed=0, number=120, tests=60, classes=4, several=False, **options) -> Labeled:
    rng = np.random.default_rng(seed)
    if several:
        labels = rng.random((number + tests, classes)) < 0.4
    else:
        labels = np.concatenate([np.arange(classes), rng.integers(0, classes, number + tests - classes)])
    train, test = labels[:number], labels[number:]
    names = tuple(f"class {c}" for c in range(classes))
    return Labeled(images(rng, train, **options), images(rng, test, **options), train, test, names)


def run(name: str, data: Labeled, **settings):
    """(scores, details) of a task, made quick."""
    task = TASKS[name]
    quick = {"linear": {"steps": 60, "epochs": 1}, "logistic": {"smallest": -3, "largest": 1}, "knn": {}}[name]
    assert not (quick | settings).keys() - task.SETTINGS.keys()
    found = dict(task.run(data, task.SETTINGS | quick | settings))
    values = {key: value for key, value in found.items() if isinstance(value, scores.Score)}
    assert all(key.startswith(name) for key in values)
    return values, {key: value for key, value in found.items() if key not in values}
