"""How well predicted classes fit the true ones, and how the images are split to choose settings.

All label arrays are integers [N] from 0 to classes - 1.
"""

import dataclasses

import numpy as np

from pera_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Score:
    """One number on the test images.

    Attributes:
      low, high: the bootstrap interval of 95 % over test units, where there is one.
      seeds: the value of each seed, where there are several; `value` is their mean.
    """

    value: float
    low: float | None = None
    high: float | None = None
    seeds: tuple[float, ...] = ()


def accuracy(predicted: np.ndarray, labels: np.ndarray) -> float:
    """The share of images whose class is predicted."""
    return float(np.mean(predicted == labels))


def accuracy_by_class(predicted: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """The share of each class's images that is predicted, float64 [classes]; NaN for a class without images."""
    images = np.bincount(labels, minlength=classes)
    right = np.bincount(labels[predicted == labels], minlength=classes)
    return np.divide(right, images, out=np.full(classes, np.nan), where=images > 0)


def macro_f1(predicted: np.ndarray, labels: np.ndarray, classes: int) -> float:
    """The mean over classes of `2 right / (predicted + true)`. Classes that neither array holds do not count."""
    right = np.bincount(labels[predicted == labels], minlength=classes)
    both = np.bincount(predicted, minlength=classes) + np.bincount(labels, minlength=classes)
    return float(np.mean(2.0 * right[both > 0] / both[both > 0]))


def bootstrap_interval(
    values: np.ndarray, seed: int, resamples: int = 1000, level: float = 0.95
) -> tuple[float, float]:
    """The percentile bootstrap interval of the mean of `values` [N] over resampled images: (low, high).

    With `predicted == labels` it is the interval of the accuracy. It tells the chance of the drawn test images only,
    not that of training.
    """
    rng, values = np.random.default_rng(seed), np.asarray(values, np.float64)
    means = [np.mean(values[rng.integers(0, len(values), len(values))]) for _ in range(resamples)]
    low, high = np.quantile(means, [(1.0 - level) / 2.0, (1.0 + level) / 2.0])
    return float(low), float(high)


def hold_out(labels: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Cuts a training set by classes to choose settings on: (indices to fit, indices held out), each ascending.

    Of a class with n images `round(share n)` are held out, at least one and at most n - 1; `seed` decides which.

    Raises:
      UserError: no class has two images.
    """
    rng, held = np.random.default_rng(seed), []
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        held.append(members[: min(max(round(share * len(members)), 1), len(members) - 1)])
    held = np.sort(np.concatenate(held)) if held else np.zeros(0, np.int64)
    if not len(held):
        raise UserError("the training split has no class with two images, so nothing can be held out; add images")
    return np.setdiff1d(np.arange(len(labels)), held), held
