"""Labelled images cut in two by class: a part to choose settings on, or a share to train on; and what cannot be cut."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from pera_jax.common import text
from pera_jax.common.errors import UserError
from pera_jax.encoder.extract import Features
from pera_jax.probes.classification.labeled import Labelled


def strata(labels: np.ndarray) -> np.ndarray:
    """What a split keeps the proportions of, int64 [N].

    The class; of several labels (bool [N, classes]) the one with the fewest images, so that rare classes come into both
    parts, and -1 for an image without a label.
    """
    if labels.ndim == 1:
        return labels.astype(np.int64)
    images = np.where(labels, labels.sum(axis=0), len(labels) + 1)  # [N, classes]
    return np.where(labels.any(axis=1), np.argmin(images, axis=1), -1)


def hold_out(labels: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Cuts labelled images by `strata`: (indices to fit, indices held out), each ascending.

    Of n images of a class `round(share n)` are held out, at least one and at most n - 1; `seed` decides which.

    Raises:
      UserError: no class has two images; of several labels, no image that carries one could be held out.
    """
    rng, held, groups = np.random.default_rng(seed), [], strata(labels)
    for group in np.unique(groups):
        members = rng.permutation(np.flatnonzero(groups == group))
        held.append(members[: min(max(round(share * len(members)), 1), len(members) - 1)])
    held = np.sort(np.concatenate(held)) if held else np.zeros(0, np.int64)
    if not len(held):
        raise UserError("no class has two training images, so nothing can be held out; add images or train on more")
    if labels.ndim == 2 and not labels[held].any():
        raise UserError(
            "no two training images have the same rarest label, so no image with a label can be held out; add images or "
            "train on more"
        )
    return np.setdiff1d(np.arange(len(labels)), held), held


def name_of(share: float) -> str:
    """A share of the images that trains, and the rest, in percent: "20/80"."""
    return f"{100 * share:g}/{100 - 100 * share:g}"


def check(data: Labelled) -> None:
    """Raises UserError for labels or features that nothing can be learnt from: no images, no class, one class only, a
    class that the test asks for and training lacks, features that are not finite or the same for all images."""
    for part, tokens in (("training", data.train), ("test", data.test)):
        if tokens is None:
            continue
        if not len(tokens.class_tokens):
            raise UserError(f"the {part} split holds no image; name another one, or convert it anew")
        if not all(np.isfinite(bound).all() for bound in _bounds(tokens)):
            raise UserError(f"features of the {part} images are not finite; probe an earlier checkpoint")
    several, names = data.train_labels.ndim == 2, np.array(data.class_names)
    if several and not data.train_labels.any():
        raise UserError("the training images carry no label at all; check the labels of the training split")
    if several and data.test_labels is not None and not data.test_labels.any():
        raise UserError("the test images carry no label at all; check the labels of the test split")
    if not several:
        present = np.unique(data.train_labels)
        if len(present) < 2:
            raise UserError(
                f"all training images are of one class, {text.several(names[present])}, so there is nothing to tell "
                "apart; add images of another class"
            )
    elif (data.train_labels == data.train_labels[0]).all():
        raise UserError("all training images carry the same labels, so there is nothing to tell apart; add images")
    if data.test_labels is not None:
        tested = np.flatnonzero(data.test_labels.any(axis=0)) if several else np.unique(data.test_labels)
        trained = np.flatnonzero(data.train_labels.any(axis=0)) if several else present
        lacking = np.setdiff1d(tested, trained)
        if len(lacking):
            raise UserError(
                f"the test split holds images of {text.several(names[lacking])}, which the training split lacks; "
                "convert both splits from images of the same classes"
            )
    bounds = _bounds(data.train)
    if not any((high - low > 1e-6 * np.maximum(high, -low)).any() for low, high in zip(bounds[::2], bounds[1::2])):
        raise UserError(
            "all training images have the same features, so nothing can be told from them: the network has collapsed, or "
            "the images are all the same; probe an earlier checkpoint, or look at the images"
        )


def _bounds(tokens: Features) -> list[np.ndarray]:
    """The least and the largest values over the images, of class tokens and of patch means; NaN where one is NaN."""
    arrays = (tokens.class_tokens, tokens.patch_means)
    return [bound for values in arrays for bound in (values.min(axis=0), values.max(axis=0))]


def check_settings(settings: Mapping[str, Any]) -> None:
    """Raises UserError where `held_out`, `seeds` or `shares` (where there is one) cannot be used."""
    for name in ("held_out", "shares"):
        values = settings.get(name, ())
        for value in values if isinstance(values, (tuple, list)) else (values,):
            if not 0.0 < value < 1.0:
                raise UserError(f"{name} holds {value}, but a share of the images lies between 0 and 1, as 0.2 does")
    if not settings["seeds"] or min(settings["seeds"]) < 0:
        raise UserError(f"seeds is {settings['seeds']}; give at least one whole number that is not negative")
