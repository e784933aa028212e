"""How well predicted pixels fit the true ones: scores of confusion matrices.

A confusion matrix is int64 [true class, predicted class], counts of labelled pixels. All scores take any leading axes,
[..., C, C], so that the matrices of many resampled test sets are scored at once.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from pera_jax.data.images import foreign
from pera_jax.probes.scores import Score

IGNORE = foreign.NO_LABEL  # in masks: a pixel without label


def confusion(predicted: np.ndarray, truth: np.ndarray, classes: int) -> np.ndarray:
    """The confusion matrix int64 [C, C] of two arrays of equal shape; pixels with `truth` IGNORE do not count.

    Args:
      predicted, truth: below `classes`, which is at most 255.
    """
    return confusions(predicted, truth, np.zeros(np.shape(truth), np.int64), 1, classes)[0]


def confusions(predicted: np.ndarray, truth: np.ndarray, units: np.ndarray, number: int, classes: int) -> np.ndarray:
    """The confusion matrices int64 [number, C, C] of the pixels of each unit; as `confusion`.

    Args:
      units: int, of the shape of `truth`: the unit, below `number`, that each pixel belongs to.
    """
    labelled = truth != IGNORE
    cells = (units[labelled].astype(np.int64) * classes + truth[labelled]) * classes + predicted[labelled]
    return np.bincount(cells, minlength=number * classes**2).reshape(number, classes, classes)


def _parts(matrix):
    """Pixels that are right, predicted and true, of each class: float64 [..., C]."""
    matrix = np.asarray(matrix, np.float64)
    return np.diagonal(matrix, axis1=-2, axis2=-1), matrix.sum(axis=-2), matrix.sum(axis=-1)


def _share(part, whole):
    """`part / whole`, NaN where the whole is 0."""
    return np.divide(part, whole, out=np.full(np.shape(whole), np.nan), where=whole > 0)


def mean(values):
    """The mean over the last axis of what is not NaN; NaN where nothing is left."""
    known = ~np.isnan(values)
    return _share(np.where(known, values, 0.0).sum(axis=-1), known.sum(axis=-1))


def iou(matrix: np.ndarray) -> np.ndarray:
    """Intersection over union of each class, float64 [..., C]; NaN for a class in neither truth nor prediction."""
    right, predicted, true = _parts(matrix)
    return _share(right, predicted + true - right)


def f1(matrix: np.ndarray) -> np.ndarray:
    """`2 right / (predicted + true)` of each class, float64 [..., C]; NaN as for `iou`."""
    right, predicted, true = _parts(matrix)
    return _share(2.0 * right, predicted + true)


def mean_iou(matrix: np.ndarray) -> np.ndarray:
    """The mean of `iou` over the classes in truth or prediction, float64 [...]; NaN without labelled pixels."""
    return mean(iou(matrix))


def macro_f1(matrix: np.ndarray) -> np.ndarray:
    """The mean of `f1` over the classes in truth or prediction, float64 [...]; NaN without labelled pixels."""
    return mean(f1(matrix))


def accuracy(matrix: np.ndarray) -> np.ndarray:
    """The share of labelled pixels that is right, float64 [...]; NaN without labelled pixels."""
    right, _, true = _parts(matrix)
    return _share(right.sum(axis=-1), true.sum(axis=-1))


def change_f1(matrix: np.ndarray) -> np.ndarray:
    """`f1` of class 1 of [..., 2, 2]; 1 where there is nothing to find and nothing was found."""
    return np.nan_to_num(f1(matrix)[..., 1], nan=1.0)


def change_iou(matrix: np.ndarray) -> np.ndarray:
    """`iou` of class 1 of [..., 2, 2]; 1 where there is nothing to find and nothing was found."""
    return np.nan_to_num(iou(matrix)[..., 1], nan=1.0)


def change_precision(matrix: np.ndarray) -> np.ndarray:
    """The share of class 1 in what was predicted as such; where nothing was, 1 if there was nothing to find, else 0."""
    right, predicted, true = (part[..., 1] for part in _parts(matrix))
    return np.where(predicted > 0, _share(right, predicted), true == 0)


def change_recall(matrix: np.ndarray) -> np.ndarray:
    """The share of class 1 that was found; where there was nothing to find, 1 if nothing was found, else 0."""
    right, predicted, true = (part[..., 1] for part in _parts(matrix))
    return np.where(true > 0, _share(right, true), predicted == 0)


def score(
    matrices: np.ndarray,
    statistic: Callable[[np.ndarray], np.ndarray],
    seed: int,
    resamples: int = 1000,
    level: float = 0.95,
) -> Score:
    """A statistic of the pooled pixels of all units: of each seed, and the bootstrap interval of the mean over seeds.

    The interval tells the chance of the drawn test units only: the units with labelled pixels are resampled, the same
    ones for all seeds, and their matrices added. A single unit gives no interval.

    Args:
      matrices: int64 [seeds, units, C, C].
      statistic: one of the functions above.
      seed: of the resampling.
    """
    matrices = np.asarray(matrices, np.float64)
    classes = matrices.shape[-1]
    matrices = matrices[:, matrices[0].sum(axis=(1, 2)) > 0]  # the truth, and so the count, is the same for all seeds
    seeds, units = matrices.shape[:2]
    values = statistic(matrices.sum(axis=1))  # [seeds]
    found = Score(float(values.mean()), seeds=tuple(float(value) for value in values))
    if units < 2:
        return found
    drawn = np.random.default_rng(seed).multinomial(units, np.full(units, 1.0 / units), resamples)  # [R, units]
    pooled = np.stack([drawn @ of_seed.reshape(units, -1) for of_seed in matrices], axis=1)  # [R, seeds, C C]
    resampled = statistic(pooled.reshape(resamples, seeds, classes, classes)).mean(axis=1)  # [R]
    low, high = np.quantile(resampled, [(1.0 - level) / 2.0, (1.0 + level) / 2.0])
    return dataclasses.replace(found, low=float(low), high=float(high))
