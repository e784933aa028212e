"""Classification metrics and their bootstrap intervals.

Single-label: labels and predictions are integers [N] below `classes`. Multi-label: labels are bool [N, classes] and
predictions are scores float [N, classes]. Every metric also takes `counts` float64 [R, N], the number of times that
each of R bootstrap resamples contains each image, and then returns R values.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import scipy.sparse

_COUNTS = 2**24  # entries of `counts` held at once by the bootstrap: 128 MiB
_AT_ONCE = 32  # resamples per batch of average precision


@dataclasses.dataclass(frozen=True)
class Score:
    """A metric on the test images.

    Attributes:
      value: the metric; with several seeds, their mean.
      low, high: 95% bootstrap interval over the test units, or None.
      seeds: the value of each seed, if there are several.
    """

    value: float
    low: float | None = None
    high: float | None = None
    seeds: tuple[float, ...] = ()


# ---------------------------------------------------------------- single-label


def accuracy(predicted: np.ndarray, labels: np.ndarray, counts: np.ndarray | None = None) -> float | np.ndarray:
    """The fraction of images predicted correctly: a float, or with `counts` float64 [R]."""
    right = (predicted == labels).astype(np.float64)
    return float(right.mean()) if counts is None else counts @ right / counts.sum(axis=1)


def confusion(predicted: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """The confusion matrix int64 [classes, classes]: counts by (true class, predicted class)."""
    return confusions(predicted, labels, np.zeros(len(labels), np.int64), 1, classes)[0]


def confusions(predicted: np.ndarray, labels: np.ndarray, units: np.ndarray, number: int, classes: int) -> np.ndarray:
    """One confusion matrix per unit, int64 [number, classes, classes]; `units` [N] is the unit of each sample."""
    cells = (units.astype(np.int64) * classes + labels) * classes + predicted
    return np.bincount(cells, minlength=number * classes**2).reshape(number, classes, classes)


def accuracy_by_class(predicted: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """The recall of each class, float64 [classes]; NaN for a class without images."""
    table = confusion(predicted, labels, classes)
    return ratio(np.diag(table), table.sum(axis=1))


def f1_by_class(
    predicted: np.ndarray, labels: np.ndarray, classes: int, counts: np.ndarray | None = None
) -> np.ndarray:
    """The F1 score of each class, float64 [classes] or, with `counts`, [R, classes]; NaN for a class in neither
    array."""
    if counts is None:
        counts = np.ones((1, len(labels)))
        return f1_by_class(predicted, labels, classes, counts)[0]
    true, guessed = np.eye(classes)[labels], np.eye(classes)[predicted]  # [N, classes]
    return ratio(2.0 * (counts @ (true * guessed)), counts @ (true + guessed))


def macro_f1(
    predicted: np.ndarray, labels: np.ndarray, classes: int, counts: np.ndarray | None = None
) -> float | np.ndarray:
    """The mean of `f1_by_class` over classes in truth or prediction: a float, or with `counts` float64 [R]."""
    values = np.nanmean(f1_by_class(predicted, labels, classes, counts), axis=-1)
    return float(values) if counts is None else values


# ---------------------------------------------------------------- multi-label


def average_precision(scores: np.ndarray, truth: np.ndarray, counts: np.ndarray | None = None) -> float | np.ndarray:
    """Average precision, `sum_n (recall_n - recall_(n-1)) precision_n` over thresholds n.

    Equal scores share one threshold. NaN without positives.

    Args:
      scores: [N]; truth: bool [N].

    Returns:
      A float, or with `counts` float64 [R].
    """
    return _average_precision(scores, truth, np.arange(len(scores)), counts)


def map_micro(scores: np.ndarray, truth: np.ndarray, counts: np.ndarray | None = None) -> float | np.ndarray:
    """Average precision over all (image, class) pairs in one ranking: a float, or with `counts` float64 [R]."""
    images = np.repeat(np.arange(len(scores)), scores.shape[1])
    return _average_precision(scores.ravel(), truth.ravel(), images, counts)


def map_macro(scores: np.ndarray, truth: np.ndarray, counts: np.ndarray | None = None) -> float | np.ndarray:
    """The mean average precision over classes that have positives: a float, or with `counts` float64 [R]."""
    values = [average_precision(scores[:, c], truth[:, c], counts) for c in np.flatnonzero(truth.any(axis=0))]
    if not values:
        return float("nan") if counts is None else np.full(len(counts), np.nan)
    values = np.stack(values)  # [classes] or [classes, R]; NaN if a class has no positive in a resample
    means = ratio(np.nansum(values, axis=0), np.sum(~np.isnan(values), axis=0))
    return float(means) if counts is None else means


def _average_precision(scores, truth, images, counts):
    """Average precision of scores [E] with truth [E]; `images` [E] is the image of each element."""
    if counts is None:
        return float(_average_precision(scores, truth, np.zeros(len(scores), int), np.ones((1, 1)))[0])
    order = np.argsort(-scores, kind="stable")
    scores, truth, images = scores[order], truth[order], images[order]
    ends = np.flatnonzero(np.append(scores[1:] != scores[:-1], True))  # last element of each threshold
    used = ends[np.unique(np.searchsorted(ends, np.flatnonzero(truth)))]  # thresholds where recall changes
    if not len(used):
        return np.full(len(counts), np.nan)
    # Counts of elements and of positives per image between consecutive thresholds: [thresholds, N].
    piece, shape = np.searchsorted(used, np.arange(used[-1] + 1)), (len(used), counts.shape[1])
    images, truth = images[: used[-1] + 1], truth[: used[-1] + 1]
    elements = scipy.sparse.csr_array((np.ones(len(images)), (piece, images)), shape)
    positives = scipy.sparse.csr_array((np.ones(truth.sum()), (piece[truth], images[truth])), shape)
    values = []
    for first in range(0, len(counts), _AT_ONCE):
        columns = np.ascontiguousarray(counts[first : first + _AT_ONCE].T)  # [N, r]
        found = positives @ columns  # [thresholds, r]
        precision = ratio(np.cumsum(found, axis=0), np.cumsum(elements @ columns, axis=0), empty=0.0)
        values.append(ratio(np.sum(found * precision, axis=0), np.sum(found, axis=0)))
    return np.concatenate(values)


def ratio(part, whole, empty: float = np.nan) -> np.ndarray:
    """`part / whole` in float64; `empty` where `whole` is 0."""
    part, whole = np.asarray(part, np.float64), np.asarray(whole, np.float64)
    return np.divide(part, whole, out=np.full(whole.shape, empty), where=whole > 0)


# ---------------------------------------------------------------- intervals


def interval(
    score: Callable[[np.ndarray], np.ndarray], images: int, seed: int, resamples: int = 1000, level: float = 0.95
) -> tuple[float, float]:
    """The percentile bootstrap interval (low, high) of a metric over the test images.

    It covers only the sampling of test images, not the randomness of training.

    Args:
      score: maps counts float64 [r, images] to r values; NaN values (resamples without positives) are ignored.
      images: number of test images.
    """
    rng, chunk, values = np.random.default_rng(seed), max(_COUNTS // images, 1), []
    for first in range(0, resamples, chunk):
        rows = min(chunk, resamples - first)
        drawn = rng.integers(0, images, (rows, images)) + images * np.arange(rows)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=rows * images).reshape(rows, images).astype(np.float64)
        values.append(score(counts))
    low, high = np.nanquantile(np.concatenate(values), [(1.0 - level) / 2.0, (1.0 + level) / 2.0])
    return float(low), float(high)


def over_seeds(score: Callable, predictions: Sequence[np.ndarray], truth: np.ndarray, seed: int) -> Score:
    """The mean of a metric over several seeds, with the bootstrap interval of the mean.

    Args:
      score: a metric of (prediction, truth, counts), with optional counts.
      predictions: for the test images, one per seed.
      seed: seed of the bootstrap.
    """
    values = [score(predicted, truth) for predicted in predictions]
    low, high = interval(
        lambda counts: np.mean([score(predicted, truth, counts) for predicted in predictions], axis=0),
        len(truth),
        seed,
    )
    return Score(float(np.mean(values)), low, high, tuple(values) if len(values) > 1 else ())
