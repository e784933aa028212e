"""The protocol of linear and logistic classifiers: choose on held-out training images, refit on all, test once.

Feature variants: class tokens of the last {1, 4} blocks, with or without the mean patch token of each block (Oquab et
al., "DINOv2", arXiv:2304.07193, section 7). For each seed, a part of the training images is held out, the variant and
the hyperparameters are chosen on it, and the classifier is refitted to all training images and tested.

A score is the mean over the seeds; its interval bootstraps the test images. With `shares`, training and test images are
pooled and split at random by class, once per seed: the 10/90, 20/80 and 50/50 protocols of remote-sensing benchmarks.
Such a score is the mean over these splits, each with its own choice of hyperparameters. It has no interval; the values
of the seeds show the spread.

Settings:
  blocks: numbers of last blocks whose tokens are concatenated.
  held_out: fraction of the training images held out to choose hyperparameters.
  shares: fractions of all images to train on, in addition to the split of the dataset; default: none.
  seeds: seeds of held-out splits, batches and the splits of `shares`; the first one is also the seed of the intervals.

Details:
  chosen, chosen_20/80, ...: the chosen hyperparameters by seed. held_out: the held-out scores of all choices by seed.
  per_class: accuracy and F1 (average precision for multi-label) of each class, means over the seeds, and its number of
    test images; null for a class without test images.
  failed_20/80, ...: an error message in place of the score, if a split leaves too few images.
  confusion: confusion matrix [true class][predicted class] of the first seed; not for multi-label.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from pera_jax.common.errors import UserError
from pera_jax.encoder import extract as features
from pera_jax.probes import scores, splits
from pera_jax.probes.classification.labeled import Labeled

SETTINGS = {"blocks": (1, 4), "held_out": 0.2, "shares": (), "seeds": (0, 1, 2)}

_ROWS = 2**13  # copied to float64 at a time

# (Variants of N images, labels, indices to fit, held out, classes, seed, settings) -> (choice, table); the choice has a
# "variant"
Choose = Callable[..., tuple[dict[str, Any], dict[str, Any]]]
# (choice, features [N, F], labels, features to predict [M, F], classes, seed, settings) -> (logits [M, classes], notes)
Predict = Callable[..., tuple[np.ndarray, dict[str, Any]]]


class Variants(Mapping[str, np.ndarray]):
    """Feature variants [N, F] by name: `class_1`, `class_mean_1`, `class_4`, `class_mean_4`; fewer for a shallow
    network.

    Each is concatenated on access and not cached: for 100,000 images the largest takes several GiB.
    """

    def __init__(self, tokens: features.Features, blocks: tuple[int, ...]):
        self._tokens = tokens
        self._parts = {
            f"{'class_mean' if means else 'class'}_{number}": (number, means)
            for number in sorted({min(number, tokens.class_tokens.shape[1]) for number in blocks})
            for means in (False, True)
        }

    def __getitem__(self, name: str) -> np.ndarray:
        return self._tokens.concatenated(*self._parts[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    def cut(self, name: str, *indices: np.ndarray) -> list[np.ndarray]:
        """The rows `indices` of one variant, for each array of indices."""
        rows = self[name]
        return [rows[part] for part in indices]


def chunks(rows: int) -> Iterator[slice]:
    """Slices that cover `rows` rows, so that float64 copies stay small."""
    return (slice(first, first + _ROWS) for first in range(0, rows, _ROWS))


def standardization(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(mean, 1 / standard deviation) of the columns of [N, F], float64 [F] each; the scale of constant columns is 0."""
    mean = features.mean(axis=0, dtype=np.float64)
    squares, largest = np.zeros_like(mean), np.zeros_like(mean)
    for rows in chunks(len(features)):
        squares += np.square(features[rows] - mean).sum(axis=0)
        largest = np.maximum(largest, np.abs(features[rows]).max(axis=0))
    std = np.sqrt(squares / len(features))
    varies = std > 1e-6 * largest  # smaller is rounding of float32
    return mean, np.divide(1.0, std, out=np.zeros_like(std), where=varies)


def standardized(features: np.ndarray, mean: np.ndarray, scale: np.ndarray, dtype: type) -> np.ndarray:
    """`(features - mean) * scale` [N, F], computed in float64 and rounded to `dtype`."""
    standard = np.empty(features.shape, dtype)
    for rows in chunks(len(features)):
        standard[rows] = (features[rows] - mean) * scale
    return standard


def measures(several: bool, classes: int) -> dict[str, Callable]:
    """The metrics by suffix of the score's name, as functions (logits [M, classes], truth, counts) -> value.

    Hyperparameters are chosen by the first metric.
    """
    if several:
        return {"_map_micro": scores.map_micro, "_map_macro": scores.map_macro}

    def accuracy(logits, truth, counts=None):
        return scores.accuracy(np.argmax(logits, axis=1), truth, counts)

    def macro_f1(logits, truth, counts=None):
        return scores.macro_f1(np.argmax(logits, axis=1), truth, classes, counts)

    return {"": accuracy, "_macro_f1": macro_f1}


def run(
    task: str, data: Labeled, settings: dict[str, Any], choose: Choose, predict: Predict, *, seeded: bool
) -> Iterator[tuple[str, Any]]:
    """Yields the scores of `task` and the details above.

    Args:
      seeded: whether `predict` depends on the seed; if not, seeds with the same choice are fitted once.

    Raises:
      UserError: no test images; labels or settings rejected by `splits`.
    """
    if data.test is None:
        raise UserError(f"{task} needs a test split; use knn (leave-one-out) for a dataset without one")
    if not settings["blocks"] or min(settings["blocks"]) < 1:
        raise UserError(f"invalid blocks={settings['blocks']}; expected at least one integer >= 1")
    splits.check(data)
    splits.check_settings(settings)
    seeds, several, classes = settings["seeds"], data.train_labels.ndim == 2, data.classes
    train, test = Variants(data.train, settings["blocks"]), Variants(data.test, settings["blocks"])
    labels, truth = data.train_labels, data.test_labels

    def decide(seed, train, labels):
        fit, held = splits.hold_out(labels, settings["held_out"], seed)
        return choose(train, labels, fit, held, classes, seed, settings)

    def answer(choice, seed, train, labels, test):
        variant = choice["variant"]
        return predict(choice, train[variant], labels, test[variant], classes, seed, settings)

    answers, logits, chosen, tables = {}, [], [], []
    for seed in seeds:
        choice, table = decide(seed, train, labels)
        key = (seed if seeded else None, *choice.values())
        if key not in answers:
            answers[key] = answer(choice, seed, train, labels, test)
        logits.append(answers[key][0])
        chosen.append({"seed": seed} | choice | answers[key][1])
        tables.append(table)
    for suffix, measure in measures(several, classes).items():
        yield task + suffix, scores.over_seeds(measure, logits, truth, seeds[0])
    yield "chosen", chosen
    yield "held_out", tables
    yield "per_class", _per_class(logits, truth, data.class_names)
    if not several:
        yield "confusion", scores.confusion(np.argmax(logits[0], axis=1), truth, classes).tolist()

    if not settings["shares"]:
        return
    pooled = features.Features(*(
        np.concatenate([getattr(part, name) for part in (data.train, data.test)])
        for name in ("class_tokens", "patch_means")
    ))  # fmt: skip
    everything = np.concatenate([labels, truth])
    for share in settings["shares"]:
        name = splits.split_name(share)
        try:  # a fraction too small for the classes does not affect the scores above
            values, chosen = {suffix: [] for suffix in measures(several, classes)}, []
            for seed in seeds:
                part, rest = splits.hold_out(everything, 1.0 - share, seed)
                train, test = (Variants(pooled.take(indices), settings["blocks"]) for indices in (part, rest))
                choice, _ = decide(seed, train, everything[part])
                found, notes = answer(choice, seed, train, everything[part], test)
                chosen.append({"seed": seed} | choice | notes)
                for suffix, measure in measures(several, classes).items():
                    values[suffix].append(measure(found, everything[rest]))
        except UserError as error:
            yield f"failed_{name}", str(error)
            continue
        for suffix, reached in values.items():
            yield f"{task}_{name}{suffix}", scores.Score(float(np.mean(reached)), seeds=tuple(reached))
        yield f"chosen_{name}", chosen


def _per_class(logits, truth, names) -> dict[str, dict[str, Any]]:
    classes = len(names)
    if truth.ndim == 2:
        columns = {
            "average_precision": [
                [scores.average_precision(found[:, c], truth[:, c]) for c in range(classes)] for found in logits
            ]
        }
        images = truth.sum(axis=0)
    else:
        predictions = [np.argmax(found, axis=1) for found in logits]
        columns = {
            "accuracy": [scores.accuracy_by_class(predicted, truth, classes) for predicted in predictions],
            "f1": [scores.f1_by_class(predicted, truth, classes) for predicted in predictions],
        }
        images = np.bincount(truth, minlength=classes)
    means = {name: np.mean(values, axis=0) for name, values in columns.items()}
    return {
        name: {key: None if np.isnan(values[c]) else float(values[c]) for key, values in means.items()}
        | {"images": int(images[c])}
        for c, name in enumerate(names)
    }
