"""How well predictions fit the truth, and how far a score would move on other test images.

Classes are integers [N] from 0 to classes - 1; of several labels for an image, truth is bool [N, classes] and a
prediction is a matrix of scores [N, classes], the larger the likelier. Every score takes `counts` float64 [R, N] too:
how often each of R resamples of the images holds each image; it then gives R values at once.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import scipy.sparse

_COUNTS = 2**24  # entries of `counts` that a bootstrap holds at once: 128 MiB
_AT_ONCE = 32  # resamples whose average precision is computed at once


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


# ---------------------------------------------------------------- one label for an image


def accuracy(predicted: np.ndarray, labels: np.ndarray, counts: np.ndarray | None = None) -> float | np.ndarray:
    """The share of images whose class is predicted: a float, with `counts` float64 [R]."""
    right = (predicted == labels).astype(np.float64)
    return float(right.mean()) if counts is None else counts @ right / counts.sum(axis=1)


def confusion(predicted: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """The number of images by [true class, predicted class], int64 [classes, classes]."""
    return np.bincount(labels * classes + predicted, minlength=classes * classes).reshape(classes, classes)


def accuracy_by_class(predicted: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """The share of each class's images that is predicted, float64 [classes]; NaN for a class without images."""
    table = confusion(predicted, labels, classes)
    return _quotients(np.diag(table), table.sum(axis=1))


def f1_by_class(
    predicted: np.ndarray, labels: np.ndarray, classes: int, counts: np.ndarray | None = None
) -> np.ndarray:
    """`2 right / (predicted + true)` by class, float64 [classes] ([R, classes]); NaN where neither array has it."""
    if counts is None:
        counts = np.ones((1, len(labels)))
        return f1_by_class(predicted, labels, classes, counts)[0]
    true, guessed = np.eye(classes)[labels], np.eye(classes)[predicted]  # [N, classes]
    return _quotients(2.0 * (counts @ (true * guessed)), counts @ (true + guessed))


def macro_f1(
    predicted: np.ndarray, labels: np.ndarray, classes: int, counts: np.ndarray | None = None
) -> float | np.ndarray:
    """The mean of `f1_by_class` over the classes that the prediction or the truth holds: a float, with `counts` [R]."""
    values = np.nanmean(f1_by_class(predicted, labels, classes, counts), axis=-1)
    return float(values) if counts is None else values


# ---------------------------------------------------------------- several labels for an image


def average_precision(scores: np.ndarray, truth: np.ndarray, counts: np.ndarray | None = None) -> float | np.ndarray:
    """The mean precision at the ranks of the positives, `sum_n (recall_n - recall_(n-1)) precision_n`.

    Equal scores share one threshold n. NaN without a positive.

    Args:
      scores: [N]; truth: bool [N].

    Returns:
      A float, with `counts` float64 [R].
    """
    return _average_precision(scores, truth, np.arange(len(scores)), counts)


def map_micro(scores: np.ndarray, truth: np.ndarray, counts: np.ndarray | None = None) -> float | np.ndarray:
    """Average precision over all pairs of image and class in one ranking: a float, with `counts` float64 [R]."""
    images = np.repeat(np.arange(len(scores)), scores.shape[1])
    return _average_precision(scores.ravel(), truth.ravel(), images, counts)


def map_macro(scores: np.ndarray, truth: np.ndarray, counts: np.ndarray | None = None) -> float | np.ndarray:
    """The mean over classes of average precision, without the classes that have no positive: float or float64 [R]."""
    values = [average_precision(scores[:, c], truth[:, c], counts) for c in np.flatnonzero(truth.any(axis=0))]
    if not values:
        return float("nan") if counts is None else np.full(len(counts), np.nan)
    values = np.stack(values)  # [classes] or [classes, R]; of a resample a class may have no positive
    means = _quotients(np.nansum(values, axis=0), np.sum(~np.isnan(values), axis=0))
    return float(means) if counts is None else means


def _average_precision(scores, truth, images, counts):
    """Of elements [E] that belong to the images [E] whose counts are given."""
    if counts is None:
        return float(_average_precision(scores, truth, np.zeros(len(scores), int), np.ones((1, 1)))[0])
    order = np.argsort(-scores, kind="stable")
    scores, truth, images = scores[order], truth[order], images[order]
    ends = np.flatnonzero(np.append(scores[1:] != scores[:-1], True))  # the last element of each threshold
    used = ends[np.unique(np.searchsorted(ends, np.flatnonzero(truth)))]  # without a positive no recall changes
    if not len(used):
        return np.full(len(counts), np.nan)
    # How many elements of each image lie between two used thresholds, and how many positives: [thresholds, N].
    piece, shape = np.searchsorted(used, np.arange(used[-1] + 1)), (len(used), counts.shape[1])
    images, truth = images[: used[-1] + 1], truth[: used[-1] + 1]
    elements = scipy.sparse.csr_array((np.ones(len(images)), (piece, images)), shape)
    positives = scipy.sparse.csr_array((np.ones(truth.sum()), (piece[truth], images[truth])), shape)
    values = []
    for first in range(0, len(counts), _AT_ONCE):
        columns = np.ascontiguousarray(counts[first : first + _AT_ONCE].T)  # [N, r]
        found = positives @ columns  # [thresholds, r]
        precision = _quotients(np.cumsum(found, axis=0), np.cumsum(elements @ columns, axis=0), empty=0.0)
        values.append(_quotients(np.sum(found * precision, axis=0), np.sum(found, axis=0)))
    return np.concatenate(values)


def _quotients(above, below, empty=np.nan):
    above, below = np.asarray(above, np.float64), np.asarray(below, np.float64)
    return np.divide(above, below, out=np.full(below.shape, empty), where=below > 0)


# ---------------------------------------------------------------- intervals


def interval(
    score: Callable[[np.ndarray], np.ndarray], images: int, seed: int, resamples: int = 1000, level: float = 0.95
) -> tuple[float, float]:
    """The percentile bootstrap interval of a score over resampled test images: (low, high).

    It tells the chance of the drawn test images only, not that of training.

    Args:
      score: takes counts float64 [r, images] and gives r values; NaN (a resample without a positive) is left out.
    """
    rng, chunk, values = np.random.default_rng(seed), max(_COUNTS // images, 1), []
    for first in range(0, resamples, chunk):
        rows = min(chunk, resamples - first)
        drawn = rng.integers(0, images, (rows, images)) + images * np.arange(rows)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=rows * images).reshape(rows, images).astype(np.float64)
        values.append(score(counts))
    low, high = np.nanquantile(np.concatenate(values), [(1.0 - level) / 2.0, (1.0 + level) / 2.0])
    return float(low), float(high)


def bootstrap_interval(
    values: np.ndarray, seed: int, resamples: int = 1000, level: float = 0.95
) -> tuple[float, float]:
    """`interval` of the mean of `values` [N], one of each test unit: with `predicted == labels` of the accuracy."""
    values = np.asarray(values, np.float64)
    return interval(lambda counts: counts @ values / len(values), len(values), seed, resamples, level)


def over_seeds(score: Callable, predictions: Sequence[np.ndarray], truth: np.ndarray, seed: int) -> Score:
    """The mean of a score over the predictions of several seeds, with the interval of that mean.

    Args:
      score: takes (prediction, truth) and, for the interval, counts.
      predictions: of the test images, one for each seed.
      seed: of the resamples.
    """
    values = [score(predicted, truth) for predicted in predictions]
    low, high = interval(
        lambda counts: np.mean([score(predicted, truth, counts) for predicted in predictions], axis=0),
        len(truth),
        seed,
    )
    return Score(float(np.mean(values)), low, high, tuple(values) if len(values) > 1 else ())
