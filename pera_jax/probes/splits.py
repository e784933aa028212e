"""Stratified splits of labeled images, and checks of labels and features."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from pera_jax.common import text
from pera_jax.common.errors import UserError
from pera_jax.encoder.extract import Features
from pera_jax.probes.classification.labeled import Labeled


def strata(labels: np.ndarray) -> np.ndarray:
    """The stratum of each image for stratified splits, int64 [N].

    The class; for multi-label images (bool [N, classes]) the rarest label of the image, or -1 without labels, so that
    rare classes appear in both parts.
    """
    if labels.ndim == 1:
        return labels.astype(np.int64)
    images = np.where(labels, labels.sum(axis=0), len(labels) + 1)  # [N, classes]
    return np.where(labels.any(axis=1), np.argmin(images, axis=1), -1)


def hold_out(labels: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Splits labeled images by `strata` into (fit indices, held-out indices), each ascending.

    In a stratum of n images `round(fraction * n)` are held out, at least 1 and at most n - 1, chosen by `seed`.

    Raises:
      UserError: no class has two images; with multi-label images, no image with a label can be held out.
    """
    rng, held, groups = np.random.default_rng(seed), [], strata(labels)
    for group in np.unique(groups):
        members = rng.permutation(np.flatnonzero(groups == group))
        held.append(members[: min(max(round(fraction * len(members)), 1), len(members) - 1)])
    held = np.sort(np.concatenate(held)) if held else np.zeros(0, np.int64)
    if not len(held):
        raise UserError(
            "no class has two training images, so no images can be held out; add images or train on a larger fraction"
        )
    if labels.ndim == 2 and not labels[held].any():
        raise UserError(
            "no two training images share their rarest label, so no image with a label can be held out; add images or "
            "train on a larger fraction"
        )
    return np.setdiff1d(np.arange(len(labels)), held), held


def split_name(fraction: float) -> str:
    """The name of a split with this training fraction, in percent: "20/80"."""
    return f"{100 * fraction:g}/{100 - 100 * fraction:g}"


def check(data: Labeled) -> None:
    """Raises UserError for unusable labels or features: no images, no labels, a single class, a test class without
    training images, features that are NaN, infinite or the same for all images."""
    for part, tokens in (("training", data.train), ("test", data.test)):
        if tokens is None:
            continue
        if not len(tokens.class_tokens):
            raise UserError(f"the {part} split has no images; use another split, or convert the dataset again")
        if not all(np.isfinite(bound).all() for bound in _bounds(tokens)):
            raise UserError(
                f"the features of the {part} images contain NaN or infinite values; probe an earlier checkpoint"
            )
    several, names = data.train_labels.ndim == 2, np.array(data.class_names)
    if several and not data.train_labels.any():
        raise UserError("no training image has a label; check the labels of the training split")
    if several and data.test_labels is not None and not data.test_labels.any():
        raise UserError("no test image has a label; check the labels of the test split")
    if not several:
        present = np.unique(data.train_labels)
        if len(present) < 2:
            raise UserError(
                f"all training images have the class {text.several(names[present])}, so there is nothing to classify; "
                "add images of another class"
            )
    elif (data.train_labels == data.train_labels[0]).all():
        raise UserError(
            "all training images have the same labels, so there is nothing to classify; add images with other labels"
        )
    if data.test_labels is not None:
        tested = np.flatnonzero(data.test_labels.any(axis=0)) if several else np.unique(data.test_labels)
        trained = np.flatnonzero(data.train_labels.any(axis=0)) if several else present
        lacking = np.setdiff1d(tested, trained)
        if len(lacking):
            raise UserError(
                f"the training split has no images of {text.several(names[lacking])}, but the test split has; convert "
                "both splits from images of the same classes"
            )
    bounds = _bounds(data.train)
    if not any((high - low > 1e-6 * np.maximum(high, -low)).any() for low, high in zip(bounds[::2], bounds[1::2])):
        raise UserError(
            "all training images have the same features: the network has collapsed, or the images are identical; probe "
            "an earlier checkpoint, or check the images"
        )


def _bounds(tokens: Features) -> list[np.ndarray]:
    """Minimum and maximum over the images, of class tokens and of patch means; NaN if any value is NaN."""
    arrays = (tokens.class_tokens, tokens.patch_means)
    return [bound for values in arrays for bound in (values.min(axis=0), values.max(axis=0))]


def check_settings(settings: Mapping[str, Any]) -> None:
    """Raises UserError for invalid `held_out`, `seeds` or `shares` (if present)."""
    for name in ("held_out", "shares"):
        values = settings.get(name, ())
        for value in values if isinstance(values, (tuple, list)) else (values,):
            if not 0.0 < value < 1.0:
                raise UserError(
                    f"invalid {name}={value}; expected a fraction of the images between 0 and 1, such as 0.2"
                )
    if not settings["seeds"] or min(settings["seeds"]) < 0:
        raise UserError(f"invalid seeds={settings['seeds']}; expected at least one integer >= 0")
