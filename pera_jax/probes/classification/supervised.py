"""The protocol that linear and logistic classifiers share: choose on a part of the training images, refit, test once.

Variants of the features: class tokens of the last {1, 4} blocks, alone or each with the mean of its patch tokens
(Oquab et al., "DINOv2", arXiv:2304.07193, section 7). For each seed a part of the training images is held out, the
classifier chooses the variant and its own settings there, is fitted to all training images and tested.

A score is the mean over the seeds; its interval resamples the test images and takes the mean over the seeds each time.
With `shares` the training and test images are pooled and split by class at random, the share to train on and the rest
to test, once for each seed: the protocols 10/90, 20/80 and 50/50 of the remote sensing benchmarks. Such a score is the
mean over these splits, each with a choice of its own on its own training part, and has no interval: the values of the
seeds show how much it moves.

Settings:
  blocks: numbers of last blocks whose tokens are put side by side.
  held_out: share of the training images to choose on.
  shares: shares of all images to train on, besides the data set's own split; none by default.
  seeds: of the held-out parts, the batches and the splits of `shares`; the first one also of the bootstrap intervals.

Details:
  chosen, chosen_20/80, ...: what was chosen, by seed. held_out: what each choice reached on the held-out part, by seed.
  per_class: mean over the seeds of accuracy and F1 (of several labels of average precision) by class, and the number of
    test images that are of it; null where there is none.
  failed_20/80, ...: a sentence instead of the score of a share that leaves too few images.
  confusion: of the first seed, [true class][predicted class] numbers of images; not of several labels.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from pera_jax.common.errors import UserError
from pera_jax.encoder import extract as features
from pera_jax.probes import scores, splits
from pera_jax.probes.classification.labeled import Labelled

SETTINGS = {"blocks": (1, 4), "held_out": 0.2, "shares": (), "seeds": (0, 1, 2)}

_ROWS = 2**13  # of which float64 copies are made at once

# (Variants of N images, labels, indices to fit, held out, classes, seed, settings) -> (choice, table); the choice has a
# "variant"
Choose = Callable[..., tuple[dict[str, Any], dict[str, Any]]]
# (choice, features [N, F], labels, features to predict [M, F], classes, seed, settings) -> (logits [M, classes], notes)
Predict = Callable[..., tuple[np.ndarray, dict[str, Any]]]


class Variants(Mapping[str, np.ndarray]):
    """Features [N, F] by name: `class_1`, `class_mean_1`, `class_4`, `class_mean_4`; of fewer blocks if there are.

    Each is put together where it is asked for, and not kept: of 100,000 images the largest takes several GiB.
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
        """Some of the rows of one variant, for each of `indices`."""
        rows = self[name]
        return [rows[part] for part in indices]


def pieces(rows: int) -> Iterator[slice]:
    """So many rows, a few at a time: what is worked on in float64 is never copied whole."""
    return (slice(first, first + _ROWS) for first in range(0, rows, _ROWS))


def standardisation(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(mean, 1 / deviation) of the columns of [N, F], float64 [F]; constants, which tell nothing, get 0."""
    mean = features.mean(axis=0, dtype=np.float64)
    squares, largest = np.zeros_like(mean), np.zeros_like(mean)
    for rows in pieces(len(features)):
        squares += np.square(features[rows] - mean).sum(axis=0)
        largest = np.maximum(largest, np.abs(features[rows]).max(axis=0))
    std = np.sqrt(squares / len(features))
    varies = std > 1e-6 * largest  # below lies what float32 rounds
    return mean, np.divide(1.0, std, out=np.zeros_like(std), where=varies)


def standardised(features: np.ndarray, mean: np.ndarray, scale: np.ndarray, dtype: type) -> np.ndarray:
    """`(features - mean) * scale` [N, F], computed in float64 and rounded to `dtype`."""
    standard = np.empty(features.shape, dtype)
    for rows in pieces(len(features)):
        standard[rows] = (features[rows] - mean) * scale
    return standard


def measures(several: bool, classes: int) -> dict[str, Callable]:
    """What is measured, by the end of the score's name, each as (logits [M, classes], truth, counts) -> value.

    The first one is what choices are made by.
    """
    if several:
        return {"_map_micro": scores.map_micro, "_map_macro": scores.map_macro}

    def accuracy(logits, truth, counts=None):
        return scores.accuracy(np.argmax(logits, axis=1), truth, counts)

    def macro_f1(logits, truth, counts=None):
        return scores.macro_f1(np.argmax(logits, axis=1), truth, classes, counts)

    return {"": accuracy, "_macro_f1": macro_f1}


def run(
    task: str, data: Labelled, settings: dict[str, Any], choose: Choose, predict: Predict, *, seeded: bool
) -> Iterator[tuple[str, Any]]:
    """Yields the scores of `task` and the details above.

    Args:
      seeded: whether `predict` depends on the seed; otherwise seeds that choose the same are fitted once.

    Raises:
      UserError: no test images; labels and settings that `splits` refuses.
    """
    if data.test is None:
        raise UserError(f"{task} needs test images besides the training images; use knn for a set that has no split")
    if not settings["blocks"] or min(settings["blocks"]) < 1:
        raise UserError(f"blocks is {settings['blocks']}; give at least one whole number above 0")
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
        name = splits.name_of(share)
        try:  # a share that is too small for the classes leaves the scores above as they are
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
