"""Segmentation metrics of confusion matrices.

A confusion matrix is int64 [true class, predicted class] and counts labeled pixels. All metrics accept leading axes,
[..., C, C], to evaluate many bootstrap resamples at once.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from pera_jax.data.images import foreign
from pera_jax.probes import scores
from pera_jax.probes.scores import Score, ratio

IGNORE = foreign.NO_LABEL  # mask value of unlabeled pixels


def confusion(predicted: np.ndarray, truth: np.ndarray, classes: int) -> np.ndarray:
    """The confusion matrix int64 [C, C] of two arrays of equal shape; ignores pixels where `truth` is IGNORE.

    Args:
      predicted, truth: class indices below `classes`, at most 255.
    """
    return confusions(predicted, truth, np.zeros(np.shape(truth), np.int64), 1, classes)[0]


def confusions(predicted: np.ndarray, truth: np.ndarray, units: np.ndarray, number: int, classes: int) -> np.ndarray:
    """The confusion matrix of each unit, int64 [number, C, C]; see `confusion`.

    Args:
      units: int, shape of `truth`: the unit of each pixel, below `number`.
    """
    labeled = truth != IGNORE
    return scores.confusions(predicted[labeled], truth[labeled], units[labeled], number, classes)


def _parts(matrix):
    """The numbers of correct, predicted and true pixels of each class: float64 [..., C] each."""
    matrix = np.asarray(matrix, np.float64)
    return np.diagonal(matrix, axis1=-2, axis2=-1), matrix.sum(axis=-2), matrix.sum(axis=-1)


def mean(values):
    """The mean of the non-NaN values over the last axis; NaN if there are none."""
    known = ~np.isnan(values)
    return ratio(np.where(known, values, 0.0).sum(axis=-1), known.sum(axis=-1))


def iou(matrix: np.ndarray) -> np.ndarray:
    """IoU of each class, float64 [..., C]; NaN for a class in neither truth nor prediction."""
    right, predicted, true = _parts(matrix)
    return ratio(right, predicted + true - right)


def f1(matrix: np.ndarray) -> np.ndarray:
    """F1 score of each class, float64 [..., C]; NaN as for `iou`."""
    right, predicted, true = _parts(matrix)
    return ratio(2.0 * right, predicted + true)


def mean_iou(matrix: np.ndarray) -> np.ndarray:
    """The mean of `iou` over the classes in truth or prediction, float64 [...]; NaN without labeled pixels."""
    return mean(iou(matrix))


def macro_f1(matrix: np.ndarray) -> np.ndarray:
    """The mean of `f1` over the classes in truth or prediction, float64 [...]; NaN without labeled pixels."""
    return mean(f1(matrix))


def accuracy(matrix: np.ndarray) -> np.ndarray:
    """The fraction of labeled pixels that are correct, float64 [...]; NaN without labeled pixels."""
    right, _, true = _parts(matrix)
    return ratio(right.sum(axis=-1), true.sum(axis=-1))


def change_f1(matrix: np.ndarray) -> np.ndarray:
    """`f1` of class 1 of [..., 2, 2]; 1 if class 1 is neither in truth nor in prediction."""
    return np.nan_to_num(f1(matrix)[..., 1], nan=1.0)


def change_iou(matrix: np.ndarray) -> np.ndarray:
    """`iou` of class 1 of [..., 2, 2]; 1 if class 1 is neither in truth nor in prediction."""
    return np.nan_to_num(iou(matrix)[..., 1], nan=1.0)


def change_precision(matrix: np.ndarray) -> np.ndarray:
    """Precision of class 1 of [..., 2, 2]; without predicted pixels 1 if there are no true pixels, else 0."""
    right, predicted, true = (part[..., 1] for part in _parts(matrix))
    return np.where(predicted > 0, ratio(right, predicted), true == 0)


def change_recall(matrix: np.ndarray) -> np.ndarray:
    """Recall of class 1 of [..., 2, 2]; without true pixels 1 if there are no predicted pixels, else 0."""
    right, predicted, true = (part[..., 1] for part in _parts(matrix))
    return np.where(true > 0, ratio(right, true), predicted == 0)


def score(
    matrices: np.ndarray,
    statistic: Callable[[np.ndarray], np.ndarray],
    seed: int,
    resamples: int = 1000,
    level: float = 0.95,
) -> Score:
    """A metric of the pooled pixels of all units: its mean over the seeds, with a bootstrap interval.

    The interval covers only the sampling of test units: units with labeled pixels are resampled, identically for all
    seeds, and their matrices added. With a single unit there is no interval.

    Args:
      matrices: int64 [seeds, units, C, C].
      statistic: one of the metrics above.
      seed: seed of the bootstrap.
    """
    matrices = np.asarray(matrices, np.float64)
    classes = matrices.shape[-1]
    matrices = matrices[:, matrices[0].sum(axis=(1, 2)) > 0]  # the truth is the same for all seeds
    seeds, units = matrices.shape[:2]
    values = statistic(matrices.sum(axis=1))  # [seeds]
    found = Score(float(values.mean()), seeds=tuple(float(value) for value in values))
    if units < 2:
        return found
    drawn = np.random.default_rng(seed).multinomial(units, np.full(units, 1.0 / units), resamples)  # [R, units]
    pooled = np.stack([drawn @ each.reshape(units, -1) for each in matrices], axis=1)  # [R, seeds, C C]
    resampled = statistic(pooled.reshape(resamples, seeds, classes, classes)).mean(axis=1)  # [R]
    low, high = np.quantile(resampled, [(1.0 - level) / 2.0, (1.0 + level) / 2.0])
    return dataclasses.replace(found, low=float(low), high=float(high))
