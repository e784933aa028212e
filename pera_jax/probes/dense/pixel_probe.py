"""The protocol of the dense tasks: choosing on held-out labels, refitting, testing.

For each fold and each seed the settings are chosen on a part of the training scenes that is held out (scenes where
there are several, else tiles of them), the head is fitted again to all training scenes, and the test scenes are
predicted once. The pixels of all folds are pooled.
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

# What both tasks take; `segmentation` says what each means.
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
MOST_BYTES = 2**34  # of the tokens of all training scenes, which the host keeps: 16 GiB


@dataclasses.dataclass(frozen=True)
class Tested:
    """What the folds gave together.

    Attributes:
      matrices: int64 [seeds, units, C, C], confusion matrices of the test units.
      seen: the same of only those pixels whose class the training scenes of the fold hold.
      pictures: the predicted classes uint8 [H, W] of each test scene by its key, of the first seed.
      chosen: for each seed and fold a dict of seed, fold, blocks, learning_rate, prior.
      held_out: the mean held-out score by number of blocks, learning rate and prior.
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
    """Trains, chooses and tests on all folds, with all seeds.

    Args:
      settings: window, stride, scale, blocks, learning_rates, priors, steps, batch, held_out, tile, seeds; see the tasks.
      tokens_of: the tokens float32 [n, h, w, D] of a scene, h = ceil(H scale / patch).
      units_of: the unit of the interval, from 0, that each pixel [H, W] of a scene belongs to.
      statistic: of confusion matrices [..., C, C]; the largest on the held-out part is chosen.

    Raises:
      UserError: settings that cannot be; nothing can be held out; no test pixel of a class that is trained on; training
        tokens of more than `MOST_BYTES`.
    """
    scenes, classes = data.scenes, len(data.class_names)
    _check(data, settings)
    priors = settings["priors"]
    training = sorted({place for train, _ in data.folds for place in train})
    heads = Heads(scenes, training, tokens_of, classes, data.patch // settings["scale"], settings)

    matrices, seen, pictures, chosen, held_out = [], [], {}, [], []
    for seed in settings["seeds"]:
        of_seed, seen_of_seed = [], []
        for number, (train, test) in enumerate(data.folds):
            masks = [scenes[place].mask for place in train]
            fitted, held = dense.hold_out(masks, settings["held_out"], settings["tile"], seed)
            models = heads.fit(train, fitted, range(len(heads.grid)), seed)
            found = heads.confusions(train, held, models, offsets(fitted, classes, priors))  # [G, O, C, C]
            held_out.append(statistic(found))
            best, prior = np.unravel_index(np.argmax(held_out[-1]), held_out[-1].shape)  # of equal ones the first
            blocks, rate = heads.grid[best]
            chosen.append(
                {"seed": seed, "fold": number, "blocks": blocks, "learning_rate": rate, "prior": priors[prior]}
            )
            model = heads.fit(train, masks, [best], seed)
            offset = offsets(masks, classes, priors[prior : prior + 1])
            for place in test:
                scene, units = scenes[place], units_of(scenes[place])
                predicted = heads.predict(place, model, offset)
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
    """Raises UserError for settings that cannot be, and for test scenes that cannot be scored."""
    splits.check_settings(settings)
    for name in ("scale", "steps", "batch", "tile"):
        if settings[name] < 1:
            raise UserError(f"{name}={settings[name]} must be 1 or more")
    for name, low, needed in (
        ("blocks", 1, "numbers from 1"), ("learning_rates", 1e-12, "numbers above 0"), ("priors", 0, "numbers from 0"),
    ):  # fmt: skip
        values = settings[name]
        if not values or not all(low <= value < np.inf for value in values):
            raise UserError(f"{name}={values} must hold at least one value to choose from, {needed}")
    dense.check_windows(data.patch, settings["window"], settings["stride"])
    if data.patch % settings["scale"]:
        raise UserError(f"scale={settings['scale']} does not divide the patch of {data.patch} px")
    for train, test in data.folds:
        known = set().union(*(np.unique(data.scenes[place].mask) for place in train)) - {IGNORE}
        if any(known.intersection(np.unique(data.scenes[place].mask)) for place in test):
            return
    raise UserError("the test scenes hold no labelled pixel of a class that is trained on; there is nothing to score")


def offsets(masks: list[np.ndarray], classes: int, priors: Sequence[float]) -> np.ndarray:
    """What is added to the logits: minus `prior` times the logarithm of each class's share of the labels.

    Logit adjustment, Menon et al., arXiv:2007.07314: 0 favours classes as often as they occur, 1 all classes alike; of
    two classes it moves the threshold. A class that does not occur is never predicted.

    Returns:
      float32 [O, C].
    """
    counts = sum(np.bincount(mask.ravel(), minlength=IGNORE + 1)[:classes] for mask in masks)
    logs = np.log(np.maximum(counts, 1) / counts.sum())
    return np.where(counts > 0, -np.float64(priors)[:, None] * logs, -np.inf).astype(np.float32)


def _check_size(number: int, blocks: int, width: int) -> None:
    """Raises UserError where `number` tokens are more than the host should keep."""
    size = number * blocks * width * 4
    if size > MOST_BYTES:
        raise UserError(
            f"the training scenes have {number:,} places with {blocks} blocks of {width} values each, "
            f"{size / 2**30:.1f} GiB, and at most {MOST_BYTES / 2**30:g} GiB are kept; take fewer blocks, a smaller scale, "
            "or fewer training scenes"
        )


def _flat(tokens: np.ndarray) -> np.ndarray:
    """[n, h, w, D] -> [h w, n D]."""
    return rearrange(tokens, "n h w d -> (h w) (n d)")


class Heads:
    """The tokens of the training scenes in one array, and the heads that are fitted to parts of them.

    Scenes that are only tested are encoded when they are.
    """

    def __init__(self, scenes, training, tokens_of, classes, px, settings):
        self._scenes, self._tokens_of, self._classes, self._px, self._settings = scenes, tokens_of, classes, px, settings
        self._sizes = [tuple(-(-side // px) for side in scene.mask.shape) for scene in scenes]
        self._parts, number = {}, 0  # rows of a scene's tokens
        for place in training:
            height, width = self._sizes[place]
            self._parts[place] = slice(number, number + height * width)
            number += height * width
        self._tokens = None
        for place, part in self._parts.items():
            tokens = tokens_of(scenes[place])[-max(settings["blocks"]) :]  # [n, h, w, D]
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

    def _cells(self, places, masks):
        """Corners and labels of the cells of the scenes at `places` that hold a label."""
        corners, labels = [], []
        for place, mask in zip(places, masks, strict=True):
            cut = pixel_head.cells(mask, *self._sizes[place], self._px)
            labelled = np.any(cut != IGNORE, axis=1)
            corners.append(pixel_head.corners(*self._sizes[place])[labelled] + self._parts[place].start)
            labels.append(cut[labelled])
        return np.concatenate(corners), np.concatenate(labels)

    def fit(self, places, masks, heads, seed):
        """Fits those of the grid to the masks of the scenes at `places`: weights [F, G, C], bias [G, C]."""
        heads = list(heads)
        rates = np.array([self.grid[head][1] for head in heads])
        return pixel_head.fit(
            self._tokens, *self._cells(places, masks), self._classes, rates, self._kept[:, heads],
            self._settings["steps"], self._settings["batch"], seed,
        )  # fmt: skip

    def confusions(self, places, masks, models, offsets):
        """Confusion matrices int64 [G, O, C, C] over the masks of the scenes at `places`."""
        corners, labels = self._cells(places, masks)
        found = pixel_head.predict(self._tokens, corners, *models, offsets, self._px)  # [K, P, G, O]
        return np.array(
            [[overlap.confusion(found[:, :, g, o], labels, self._classes) for o in range(found.shape[3])]
             for g in range(found.shape[2])]
        )  # fmt: skip

    def predict(self, place, model, offset):
        """The classes uint8 [H, W] of the scene at `place`."""
        if place in self._parts:
            tokens = self._tokens[self._parts[place]]
        else:
            tokens = _flat(self._tokens_of(self._scenes[place])[-self._last :])
        corners = pixel_head.corners(*self._sizes[place])
        found = pixel_head.predict(tokens, corners, *model, offset, self._px)[:, :, 0, 0]
        return pixel_head.picture(found, self._scenes[place].mask.shape, self._sizes[place][1], self._px)


def details(tested: Tested, class_names: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """What a task tells beside its scores: per_class, confusion, chosen, held_out, pictures."""
    pooled = tested.matrices.sum(axis=1)  # [seeds, C, C]
    by_class = overlap.mean(overlap.iou(pooled).T)  # over seeds; NaN where no seed has the class
    yield "per_class", {
        name: None if np.isnan(value) else float(value) for name, value in zip(class_names, by_class, strict=True)
    }
    yield "confusion", pooled[0].tolist()
    yield "chosen", tested.chosen
    yield "held_out", tested.held_out
    for key, picture in tested.pictures.items():
        yield f"prediction/{key}", picture
