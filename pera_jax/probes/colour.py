"""The baseline that looks at nothing but colour: nearest neighbour on each band's mean and standard deviation.

Features that do not beat it have learnt nothing of what lies where in an image.
"""

from typing import Any

import numpy as np

from pera_jax.probes import scores


def statistics(image: np.ndarray) -> np.ndarray:
    """Mean and standard deviation of each band of an image [H, W, C] of values in [0, 1]: float32 [2 C]."""
    bands = np.ascontiguousarray(image.reshape(-1, image.shape[-1]).T, np.float32)  # [C, H W]
    return np.concatenate([bands.mean(axis=1), bands.std(axis=1)])


def predict(train: np.ndarray, labels: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """The label of the nearest row of `train` [N, F] (Euclidean; of equally near ones the first), int [M]."""
    train = train.astype(np.float64)
    return np.array([labels[np.argmin(np.sum((train - query) ** 2, axis=1))] for query in queries])


def probe(
    train: np.ndarray, train_labels: np.ndarray, test: np.ndarray, test_labels: np.ndarray, seed: int = 0
) -> dict[str, Any]:
    """`scores`: `colour`, the accuracy on `test` as value, low, high (bootstrap, 95 %); `settings`: the seed."""
    predicted = predict(train, train_labels, test)
    low, high = scores.bootstrap_interval(predicted == test_labels, seed)
    accuracy = scores.accuracy(predicted, test_labels)
    return {"scores": {"colour": {"value": accuracy, "low": low, "high": high}}, "settings": {"seed": seed}}
