"""The protocol of the dense tasks: choose on held-out labels, refit, test once.

For each fold and seed, hyperparameters are chosen on held-out training scenes (or tiles of them, if there are too few
scenes), the head is refitted to all training scenes, and the test scenes are predicted once. The pixels of all folds
are pooled.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from einops import rearrange

from pera_jax.common.errors import UserError
from pera_jax.data.labelled.scenes import Dense, Scene
from pera_jax.probes import splits
from pera_jax.probes.dense import dense, overlap, pixel_head
from pera_jax.probes.dense.overlap import IGNORE

# Common settings; documented in `segmentation`.
SETTINGS = {
    "window": 224,
    "stride": 112,
    "scale": 1,
    "blocks": (1, 4),
    "learning_rates": (0.01, 0.03, 0.1, 0.3, 1.0),
    "steps": 300,
    "batch": 8192,
    "held_out": 0.2,
    "folds": 5,
    "seeds": (0, 1, 2),
}
MAX_BYTES = 2**34  # of host memory for the tokens of all training scenes: 16 GiB


@dataclasses.dataclass(frozen=True)
class Tested:
    """The results of all folds.

    Attributes:
      matrices: int64 [seeds, units, C, C], confusion matrices of the test units.
      seen: the same, for pixels whose class occurs in the training scenes of the fold.
      pictures: predicted classes uint8 [H, W] of each test scene by its key, from the first seed.
      chosen: one dict of seed, fold, blocks, learning_rate and prior for each seed and fold.
      held_out: mean held-out score by number of blocks, learning rate and prior.
    """

    matrices: np.ndarray
    seen: np.ndarray
    pictures: dict[str, np.ndarray]
    chosen: list[dict[str, Any]]
    held_out: dict[str, dict[str, dict[str, float]]]


def probe(
    data: Dense,
    settings: dict[str, Any],
    tokens_of: Callable[[Scene], np.ndarray],
    units_of: Callable[[Scene], np.ndarray],
    statistic: Callable[[np.ndarray], np.ndarray],
) -> Tested:
    """Runs the protocol on all folds with all seeds.

    Args:
      settings: window, stride, scale, blocks, learning_rates, priors, steps, batch, held_out, tile, seeds; see the
        tasks.
      tokens_of: scene -> tokens float32 [n, h, w, D], h = ceil(H scale / patch).
      units_of: scene -> bootstrap unit of each pixel, int [H, W], from 0.
      statistic: metric of confusion matrices [..., C, C]; the largest held-out value is chosen.

    Raises:
      UserError: invalid settings; no labels can be held out; no test pixel has a class of the training scenes; the
        training tokens exceed `MAX_BYTES`.
    """
    scenes, classes = data.scenes, len(data.class_names)
    _check(data, settings)
    priors = settings["priors"]
    training = sorted({index for train, _ in data.folds for index in train})
    heads = Heads(scenes, training, tokens_of, classes, data.patch // settings["scale"], settings)

    matrices, seen, pictures, chosen, held_out = [], [], {}, [], []
    for seed in settings["seeds"]:
        of_seed, seen_of_seed = [], []
        for number, (train, test) in enumerate(data.folds):
            masks = [scenes[index].mask for index in train]
            fitted, held = dense.hold_out(masks, settings["held_out"], settings["tile"], seed)
            models = heads.fit(train, fitted, range(len(heads.grid)), seed)
            found = heads.confusions(train, held, models, offsets(fitted, classes, priors))  # [G, O, C, C]
            held_out.append(statistic(found))
            best, prior = np.unravel_index(np.argmax(held_out[-1]), held_out[-1].shape)  # the first among equals
            blocks, rate = heads.grid[best]
            chosen.append(
                {"seed": seed, "fold": number, "blocks": blocks, "learning_rate": rate, "prior": priors[prior]}
            )
            model = heads.fit(train, masks, [best], seed)
            offset = offsets(masks, classes, priors[prior : prior + 1])
            for index in test:
                scene, units = scenes[index], units_of(scenes[index])
                predicted = heads.predict(index, model, offset)
                pictures.setdefault(scene.key, predicted)
                lacking = np.flatnonzero(np.isinf(offset[0]))
                known = np.where(np.isin(scene.mask, lacking), np.uint8(IGNORE), scene.mask)
                for truth, results in ((scene.mask, of_seed), (known, seen_of_seed)):
                    results.append(overlap.confusions(predicted, truth, units, int(units.max()) + 1, classes))
        matrices.append(np.concatenate(of_seed))
        seen.append(np.concatenate(seen_of_seed))
    means, table = np.mean(held_out, axis=0), {}
    for (blocks, rate), values in zip(heads.grid, means.tolist(), strict=True):
        table.setdefault(str(blocks), {})[str(rate)] = dict(zip(map(str, priors), values, strict=True))
    return Tested(np.stack(matrices), np.stack(seen), pictures, chosen, table)


def _check(data: Dense, settings: dict[str, Any]) -> None:
    """Raises UserError for invalid settings, and for test scenes without a class of the training scenes."""
    splits.check_settings(settings)
    for name in ("scale", "steps", "batch", "tile"):
        if settings[name] < 1:
            raise UserError(f"invalid {name}={settings[name]}; expected an integer >= 1")
    for name, low, needed in (
        ("blocks", 1, ">= 1"), ("learning_rates", 1e-12, "> 0"), ("priors", 0, ">= 0"),
    ):  # fmt: skip
        values = settings[name]
        if not values or not all(low <= value < np.inf for value in values):
            raise UserError(f"invalid {name}={values}; expected at least one number, each {needed}")
    dense.check_windows(data.patch, settings["window"], settings["stride"])
    if data.patch % settings["scale"]:
        raise UserError(f"scale={settings['scale']} does not divide the patch size {data.patch} px; choose a divisor")
    for train, test in data.folds:
        known = set().union(*(np.unique(data.scenes[index].mask) for index in train)) - {IGNORE}
        if any(known.intersection(np.unique(data.scenes[index].mask)) for index in test):
            return
    raise UserError(
        "no labeled pixel of the test scenes has a class of the training scenes, so there is nothing to score; check "
        "the labels"
    )


def offsets(masks: list[np.ndarray], classes: int, priors: Sequence[float]) -> np.ndarray:
    """Offsets of the logits: minus `prior` times the log frequency of each class among the labels.

    Logit adjustment, Menon et al., arXiv:2007.07314: 0 predicts classes at their frequency, 1 treats all classes
    equally; with two classes it shifts the threshold. A class without labels is never predicted.

    Returns:
      float32 [O, C].
    """
    counts = sum(np.bincount(mask.ravel(), minlength=IGNORE + 1)[:classes] for mask in masks)
    logs = np.log(np.maximum(counts, 1) / counts.sum())
    return np.where(counts > 0, -np.float64(priors)[:, None] * logs, -np.inf).astype(np.float32)


def _check_size(number: int, blocks: int, width: int) -> None:
    """Raises UserError if `number` tokens exceed `MAX_BYTES`."""
    size = number * blocks * width * 4
    if size > MAX_BYTES:
        raise UserError(
            f"the training scenes need {size / 2**30:.1f} GiB for {number:,} tokens of {blocks} blocks with {width} "
            f"values each, above the limit of {MAX_BYTES / 2**30:g} GiB; use fewer blocks, a smaller scale, or fewer "
            "training scenes"
        )


def _flat(tokens: np.ndarray) -> np.ndarray:
    """[n, h, w, D] -> [h w, n D]."""
    return rearrange(tokens, "n h w d -> (h w) (n d)")


class Heads:
    """The tokens of the training scenes in one array, and the heads fitted to them.

    Scenes used only for testing are encoded on demand.
    """

    def __init__(self, scenes, training, tokens_of, classes, px, settings):
        self._scenes, self._tokens_of, self._classes, self._px, self._settings = (
            scenes,
            tokens_of,
            classes,
            px,
            settings,
        )
        self._sizes = [tuple(-(-side // px) for side in scene.mask.shape) for scene in scenes]
        self._parts, number = {}, 0  # rows of the tokens of each scene
        for index in training:
            height, width = self._sizes[index]
            self._parts[index] = slice(number, number + height * width)
            number += height * width
        self._tokens = None
        for index, part in self._parts.items():
            tokens = tokens_of(scenes[index])[-max(settings["blocks"]) :]  # [n, h, w, D]
            last, width = len(tokens), tokens.shape[3]
            if self._tokens is None:
                _check_size(number, last, width)
                self._tokens = np.empty((number, last * width), np.float32)  # [T, n D]
            self._tokens[part] = _flat(tokens)
        blocks = sorted({min(number, last) for number in settings["blocks"]})
        self.grid = [(number, rate) for number in blocks for rate in settings["learning_rates"]]
        self._last = last
        from_end = last - np.arange(last * width) // width  # [F]; the last block is 1
        self._kept = np.stack([from_end <= number for number, _ in self.grid], axis=1)  # [F, G]

    def _cells(self, indices, masks):
        """Corners and labels of the cells with at least one label, of the scenes `indices`."""
        corners, labels = [], []
        for index, mask in zip(indices, masks, strict=True):
            cut = pixel_head.cells(mask, *self._sizes[index], self._px)
            labeled = np.any(cut != IGNORE, axis=1)
            corners.append(pixel_head.corners(*self._sizes[index])[labeled] + self._parts[index].start)
            labels.append(cut[labeled])
        return np.concatenate(corners), np.concatenate(labels)

    def fit(self, indices, masks, heads, seed):
        """Fits the heads of the grid to the masks of the scenes `indices`; returns weights [F, G, C], bias [G, C]."""
        heads = list(heads)
        rates = np.array([self.grid[head][1] for head in heads])
        return pixel_head.fit(
            self._tokens, *self._cells(indices, masks), self._classes, rates, self._kept[:, heads],
            self._settings["steps"], self._settings["batch"], seed,
        )  # fmt: skip

    def confusions(self, indices, masks, models, offsets):
        """Confusion matrices int64 [G, O, C, C] over the masks of the scenes `indices`."""
        corners, labels = self._cells(indices, masks)
        found = pixel_head.predict(self._tokens, corners, *models, offsets, self._px)  # [K, P, G, O]
        return np.array(
            [[overlap.confusion(found[:, :, g, o], labels, self._classes) for o in range(found.shape[3])]
             for g in range(found.shape[2])]
        )  # fmt: skip

    def predict(self, index, model, offset):
        """Predicts the classes uint8 [H, W] of the scene `index`."""
        if index in self._parts:
            tokens = self._tokens[self._parts[index]]
        else:
            tokens = _flat(self._tokens_of(self._scenes[index])[-self._last :])
        corners = pixel_head.corners(*self._sizes[index])
        found = pixel_head.predict(tokens, corners, *model, offset, self._px)[:, :, 0, 0]
        return pixel_head.picture(found, self._scenes[index].mask.shape, self._sizes[index][1], self._px)


def details(tested: Tested, class_names: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """The details of a task: per_class, confusion, chosen, held_out, predictions."""
    pooled = tested.matrices.sum(axis=1)  # [seeds, C, C]
    by_class = overlap.mean(overlap.iou(pooled).T)  # over seeds; NaN if no seed has the class
    yield "per_class", {
        name: None if np.isnan(value) else float(value) for name, value in zip(class_names, by_class, strict=True)
    }
    yield "confusion", pooled[0].tolist()
    yield "chosen", tested.chosen
    yield "held_out", tested.held_out
    for key, picture in tested.pictures.items():
        yield f"prediction/{key}", picture
